"""dsv4 chat: turns, commands, cut-off turns, and a cache that is kept."""

import json
import os
import signal
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


def test_the_command_reads_a_pipe():
    result = CliRunner().invoke(
        cli.root, ["chat", "-b", "reference", "-n", "3", "--temperature", "0"], input="Hi\n/stats\n"
    )
    assert result.exit_code == 0
    assert "3 generated" in result.stdout


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
