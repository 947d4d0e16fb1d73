"""dsv4 chat: turns, commands, cut-off turns, and a cache that is kept."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import dsv4_core
from dsv4_core import cli
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.cli.chat import HELP, Talk, _write, talk
from dsv4_core.cli.generate import show
from dsv4_core.contract import registry
from dsv4_core.graph.engine import Engine
from dsv4_core.graph.generate import generate
from dsv4_core.graph.model import Model
from dsv4_core.graph.sampling import GREEDY
from dsv4_core.text.chat import encode
from dsv4_core.text.tokenizer import Vocabulary, load_tokenizer

TINY = Path(dsv4_core.__file__).parent / "data/tiny-jargon"


@pytest.fixture(scope="module")
def model():
    return Model(Checkpoint(TINY), registry.create("reference", numerics="native", batch_invariant=True))


@pytest.fixture
def talking(model):
    engine = Engine(model, slots=1, capacity=200)
    return Talk(engine, Vocabulary(load_tokenizer(TINY)), None, frozenset({1}), GREEDY, 6)


def spoken(session, *lines):
    """What is written for some lines: (text, dim) each."""
    waiting, written = iter(lines), []

    def read():
        line = next(waiting, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    talk(session, read, lambda text, dim: written.append((text, dim)))
    return "".join(text for text, dim in written if not dim), "".join(text for text, dim in written if dim)


def test_a_conversation_is_what_the_model_says(talking, model):
    said, _ = spoken(talking, "What is kludge?", "And a hack?")
    vocabulary, turns = talking.vocabulary, []
    for question, reply in zip(("What is kludge?", "And a hack?"), talking.messages[1::2], strict=True):
        turns.append({"role": "user", "content": question})
        out = [s[0] for s in generate(model, [vocabulary.ids(encode(turns))], max_tokens=6, stop=[1])]
        assert reply["content"] == vocabulary.text([t for t in out if t != 1])
        assert reply["content"] in said
        turns.append({"role": "assistant", "content": reply["content"]})
    assert talking.engine.stats.hit_tokens > 10  # the second turn goes on where the first ended
    assert "from the cache" in spoken(talking, "/stats")[1]


def test_thought_is_dimmed(talking):
    said, dimmed = spoken(talking, "/think on", "Why?")
    assert dimmed.startswith("thinking on\n")
    assert talking.messages[-1]["reasoning_content"]
    assert talking.messages[-1]["reasoning_content"] in dimmed
    assert said == "\n"


def test_a_turn_that_is_cut_off_is_kept_and_its_slot_is_free(talking):
    turn = talking.say("What is kludge?")
    first = next(turn).text
    turn.close()
    assert talking.messages[-1]["content"] == first
    assert talking.engine.idle
    assert spoken(talking, "Go on.")[0].strip()


def test_commands(talking, tmp_path):
    file = tmp_path / "talk.json"
    said, dimmed = spoken(
        talking, KeyboardInterrupt, "", "/system Be brief.", "Hi", f"/save {file}", "/system", f"/load {file}"
    )
    assert said.strip()
    assert json.loads(file.read_text()) == talking.messages
    assert [m["role"] for m in talking.messages] == ["system", "user", "assistant"]
    assert "3 turns in" in dimmed
    spoken(talking, "/new", "/quit", "never read")
    assert [m["role"] for m in talking.messages] == ["system"]
    assert spoken(talking, "/help") == ("", HELP + "\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sing", "'/sing' is no command"),
        ("/think maybe", "'/think maybe' is no command"),
        ("/effort high", "effort 'high' needs chat texts; begin with --encoding-profile"),
        ("/load nowhere.json", "nowhere.json: No such file"),
        ("/load a\0b", "character 8 of the line is NUL; nothing was sent"),
        ("/load ~nobody-of-that-name/x", "~nobody-of-that-name/x: No such file"),
        ("/system d\udce9", "character 10 of the line is no UTF-8; nothing was sent"),
        ("x" * 500, "the conversation has"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(talking, line, message):
    said, dimmed = spoken(talking, line)
    assert message in dimmed
    assert said == ""
    assert talking.messages == []


def test_loading_what_is_no_conversation(talking, tmp_path):
    for text in ("{}", "[1]", "[", '[{"role": {}}]', '[{"role": "robot"}]'):
        (tmp_path / "x.json").write_text(text)
        assert f"{tmp_path / 'x.json'}" in spoken(talking, f"/load {tmp_path / 'x.json'}")[1]


def test_saving_under_a_link_writes_what_it_leads_to(talking, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "talk.json")
    for _ in range(2):
        spoken(talking, f"/save {tmp_path / 'link'}")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "talk.json").read_text() == "[]\n"


def test_what_was_saved_before_a_turn_is_loaded_and_a_home_is_found(talking, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "0 turns from ~/none" in spoken(talking, "/save ~/none", "/load ~/none")[1]
    assert json.loads((tmp_path / "none").read_text()) == []


def test_an_effort_ends_with_the_thinking(talking):
    talking.texts = SimpleNamespace(efforts={"high": ""})
    spoken(talking, "/effort high")
    assert (talking.thinking, talking.effort) == (True, "high")
    spoken(talking, "/think off")
    assert (talking.thinking, talking.effort) == (False, None)


def test_an_interrupt_waits_for_the_step_and_ends_the_turn(model, talking, monkeypatch):
    """Ctrl-C in the middle of a step, twice: the turn is over, what was said is kept, and the next
    turn is told what it is told by an engine that saw no interrupt.
    """
    block, steps = model.block, []

    def interrupted(each, h, step):
        steps.append(each.index)
        if len(steps) == len(model.blocks) * 2 + 2:  # the second token's
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return block(each, h, step)

    monkeypatch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))
    monkeypatch.setattr(model, "block", interrupted)
    said, dimmed = spoken(talking, "What is kludge?")
    assert dimmed == "(ended)\n"
    assert talking.messages[-1]["content"] == said.removesuffix("\n") != ""
    assert talking.engine.idle
    spoken(talking, "And a hack?")
    turns = talking.messages[:3]
    out = [s[0] for s in generate(model, [talking.vocabulary.ids(encode(turns))], max_tokens=6, stop=[1])]
    assert talking.messages[-1]["content"] == talking.vocabulary.text([t for t in out if t != 1])


def test_a_model_that_fails_ends_the_turn_alone(model, talking, monkeypatch):
    def hiccups(*_):
        raise RuntimeError("the device hiccups")

    with monkeypatch.context() as patch:
        patch.setattr(model, "block", hiccups)
        assert spoken(talking, "Hi")[1] == "the model failed: the device hiccups\n"
    assert talking.messages == []
    assert spoken(talking, "Hi")[0].strip()


def test_the_command_reads_a_pipe():
    """Also lines that a Windows editor made, and bytes that are no text."""
    result = CliRunner().invoke(
        cli.root,
        ["chat", "-b", "reference", "-n", "3", "--temperature", "0"],
        input=b"caf\xe9\r\nHi\r\n/stats\r\n/quit\r\nnever",
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("character 4 of the line is no UTF-8; nothing was sent\n")
    assert "3 generated" in result.stdout
    words = ["chat", "-b", "reference", "--system", "caf\udce9"]
    assert isinstance(CliRunner().invoke(cli.root, words, input="").exception, ValueError)


def test_a_dumb_terminal_is_told_no_escapes(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for term, wanted in (("xterm", "\x1b[2mso\x1b[0m"), ("dumb", "so")):
        monkeypatch.setenv("TERM", term)
        _write("so", True)
        assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_terminal_is_as_it_was_after_a_signal_that_ends(number, tmp_path):
    """At the prompt, where keys are read one by one."""
    fdpexpect = pytest.importorskip("pexpect.fdpexpect")
    pytest.importorskip("prompt_toolkit")
    termios = pytest.importorskip("termios")
    known = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(tmp_path)}
    words = [sys.executable, "-m", "dsv4_core", "chat", "-b", "reference"]
    before = signal.signal(signal.Signals[number], signal.SIG_DFL)  # which nohup ignores, and a child inherits
    ours, theirs = os.openpty()
    with subprocess.Popen(words, env=known, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        signal.signal(signal.Signals[number], before)
        try:
            terminal = fdpexpect.fdspawn(ours, timeout=60)
            terminal.expect("Ctrl-D ends")
            terminal.expect(rb">[^\n]*\x1b\[\?25h")
            assert not termios.tcgetattr(theirs)[3] & termios.ICANON
            process.send_signal(signal.Signals[number])
            assert process.wait(60) == 128 + signal.Signals[number]
        finally:
            process.kill()  # one that did not end
    assert termios.tcgetattr(theirs)[3] & termios.ICANON
    os.close(theirs)
    os.close(ours)


@pytest.mark.parametrize("at_a_terminal", [True, False])
def test_what_a_model_says_moves_no_cursor(at_a_terminal, capsys, monkeypatch):
    """Escape sequences, bidirectional marks and returns that are generated: spelt at a terminal,
    left alone in a pipe.
    """
    said = "a\x1b[2J\rb\u202ec\x9bd"
    monkeypatch.setattr("sys.stdout.isatty", lambda: at_a_terminal)
    wanted = r"a\x1b[2J\rb\u202ec\x9bd" if at_a_terminal else said

    class Events(list):
        tokens, texts, finish = [[5], [6]], [said, said], ["stop", "stop"]

    event = SimpleNamespace(text=said, token=5, finish="stop")
    session = SimpleNamespace(tokenizer=object())
    show(session, Events([event]), ["hi"])
    assert capsys.readouterr().out == f"{wanted}\n"
    show(session, Events([event]), ["hi", "ho"])
    assert capsys.readouterr().out == f"> hi\n{wanted}\n\n> ho\n{wanted}\n\n"
    _write(said, False)
    assert capsys.readouterr().out == wanted


def test_the_command_at_a_terminal(tmp_path):
    """A prompt, a turn, Ctrl-C in the middle of a turn, which ends it and nothing else, editing,
    Ctrl-D. So hot a model seldom ends a reply by itself.
    """
    pexpect = pytest.importorskip("pexpect")
    pytest.importorskip("prompt_toolkit")
    words = ["-m", "dsv4_core", "chat", "-b", "reference", "--temperature", "50", "-n", "400", "--system", "Be brief."]
    known = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(tmp_path)}
    terminal = pexpect.spawn(
        sys.executable, words, env=known, encoding="utf-8", timeout=60, dimensions=(40, 100),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's background job
    )  # fmt: skip
    ready = r">[^\n]*\x1b\[\?25h"  # the prompt is drawn and the cursor shown
    terminal.expect("Ctrl-D ends")
    terminal.expect(ready)
    for _ in range(6):  # a reply may be done, or not have begun, when the key arrives
        terminal.send("Tell me about kludgez\x7f and foo\r")  # a slip, taken back
        terminal.expect(r"\n[^\n>]*[a-z]{2}")
        terminal.sendintr()
        if not terminal.expect([r"\(ended\)", pexpect.TIMEOUT], timeout=20):  # not the prompt: it is drawn often
            terminal.expect(ready)
            break
    else:
        pytest.fail("no reply was ended by Ctrl-C")
    terminal.send(f"/save {tmp_path / 'talk.json'}\r")
    terminal.expect(r"\d turns in")
    terminal.expect(ready)
    terminal.send("/stats\r")
    terminal.expect("generated")
    terminal.expect(ready)
    terminal.sendintr()  # at the prompt it ends nothing
    terminal.expect(ready)
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    turns = json.loads((tmp_path / "talk.json").read_text())
    assert [turn["role"] for turn in turns][:3] == ["system", "user", "assistant"]
    assert turns[1]["content"] == "Tell me about kludge and foo"
    assert turns[2]["content"]
