"""The command line, as typed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_conformance.model import golden
from recorded import relative, vectors

from dsv4_core import cli
from dsv4_core.text.tokenizer import Vocabulary, load_tokenizer


def dsv4(*args, ok=True, **environment):
    result = CliRunner().invoke(cli.root, [str(a) for a in args], env=environment)
    if ok:
        assert result.exit_code == 0, (result.output, result.exception)
    return result


def failure(*args):
    """Run as ``main`` does; give the message and the exit status."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dsv4", *map(str, args)])
        patch.setenv("DSV4_ONE_PROCESS", "1")
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return stop.value.code


def test_demo():
    result = dsv4("demo", "-n", 12)
    assert "> What is kludge?" in result.output
    assert "12 generated" in result.output
    assert "dsv4 chat" in result.output
    assert "reference" in result.output


def test_generate_text_and_ids():
    text = dsv4("generate", "--chat", "What is kludge?", "-n", 8, "-b", "reference").stdout
    vocabulary = Vocabulary(load_tokenizer(golden.checkpoint_path("tiny-jargon")))
    prompt = "<｜begin▁of▁sentence｜><｜User｜>What is kludge?<｜Assistant｜></think>"
    ids = ",".join(map(str, vocabulary.marked(prompt)))
    again = dsv4("generate", "--tokens", ids, "-n", 8, "-b", "reference").stdout
    words = dsv4(
        "generate", "-p", prompt, "-n", 8, "-b", "reference"
    ).stdout  # control tokens that a text spells are words
    assert text != words
    assert text == again
    assert text.strip()
    ids = dsv4("generate", golden.checkpoint_path("tiny-flash"), "--tokens", "1,2,3", "-n", 5, "-b", "reference").stdout
    assert len(ids.split()) == 5
    speculative = dsv4(
        "generate", "--chat", "What is kludge?", "-n", 8, "-b", "reference", "--speculative", "--numerics", "float64"
    )
    plain = dsv4("generate", "--chat", "What is kludge?", "-n", 8, "-b", "reference", "--numerics", "float64")
    assert speculative.stdout == plain.stdout
    assert "drafts accepted" in speculative.output


@pytest.mark.parametrize(("numerics", "limit"), [("float64", 3e-6), ("float32", 1e-5)])
def test_logits(tmp_path, numerics, limit):
    want = vectors("tiny-flash", "golden")
    np.save(tmp_path / "t.npy", want["prompt"])
    model = golden.checkpoint_path("tiny-flash")
    dsv4(
        "logits",
        model,
        "--tokens",
        tmp_path / "t.npy",
        "--prefill",
        300,
        "--chunk",
        64,
        "--mtp",
        "-b",
        "reference",
        "--numerics",
        numerics,
        "--out",
        tmp_path / "o.npz",
    )
    with np.load(tmp_path / "o.npz") as file:
        got = dict(file)
    assert got["logits"].shape == (2, 21, 256)
    assert got["logits"].dtype == numerics
    assert relative(got["logits"], want["exact.logits"]) < limit
    assert relative(got["mtp_logits"], want["exact.mtp_logits"]) < limit


def test_logits_of_a_bad_file(tmp_path, capsys):
    (tmp_path / "t.npy").write_text("not numpy")
    assert failure("logits", "--tokens", tmp_path / "t.npy", "--prefill", 3, "--out", tmp_path / "o.npz") == 2
    assert "not a .npy file of token ids" in capsys.readouterr().err
    np.save(tmp_path / "t.npy", np.zeros((2, 3), np.int64))
    assert failure("logits", "--tokens", tmp_path / "t.npy", "--prefill", 3, "--mtp", "--out", tmp_path / "o.npz") == 2
    assert "shape [2, 3] must be [batch, total] with total more than --prefill 3" in capsys.readouterr().err
    np.save(tmp_path / "t.npy", np.full((1, 3), 9999))
    assert (
        failure(
            "logits", "-b", "reference", "--tokens", tmp_path / "t.npy", "--prefill", 3, "--out", tmp_path / "o.npz"
        )
        == 2
    )
    assert "token id 9999 at [0, 0] is outside the vocabulary 0 .. 2047" in capsys.readouterr().err


def test_explain():
    out = dsv4("explain", "-b", "reference", "--model", "flash").output
    assert "0 that nobody runs" in out
    assert "expert_linear" in out
    assert "float4_e2m1fn@1x32" in out


def test_init_inspect_generate(tmp_path):
    made = tmp_path / "model"
    dsv4("init", made, "--preset", "tiny", "--layers", 4, "--seed", 7)
    report = json.loads(dsv4("inspect", made, "--json").output)["result"]
    assert not report["findings"]
    assert len(dsv4("generate", made, "--tokens", "1,2,3", "-n", 4, "-b", "reference").stdout.split()) == 4
    assert failure("init", made, "--preset", "tiny") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate",), "give one of --prompt, --chat, --tokens and --prompts"),
        (("generate", "--chat", "x", "--tokens", "1"), "give one of"),
        (("generate", "--chat", "x", "--draft-confidence", "0.5"), "give --speculative, too"),
        (("generate", "--chat", "x", "--drafter", "embedded"), "--drafter says what drafts; give --speculative, too"),
        (("generate", "--chat", "x", "-b", "reference", "--speculative", "2"), "proposes 1 to 1 tokens a step"),
        (("generate", "--tokens", "1", "-b", "gpu"), "unknown backend 'gpu'; installed:"),
        (("generate", "nowhere", "--tokens", "1"), "nowhere: no such directory"),
        (
            ("generate", "--tokens", "2048", "-b", "reference"),
            "token id 2048 at [0] is outside the vocabulary 0 .. 2047",
        ),
        (("generate", "--tokens", "1", "-b", "reference", "-n", "5000"), "max_position_embeddings"),
        (("generate", "--tokens", "1", "-b", "reference", "-O", "soc=9"), "'reference' has no option 'soc'"),
        (("generate", "--tokens", "1", "--weight-cache", "2 Gigs"), "'2 Gigs' is not a size"),
        (("nosuch",), "No such command 'nosuch'"),
    ],
)
def test_what_the_user_gets_wrong(args, message, capsys):
    assert failure(*args) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer(capsys):
    assert failure("generate", golden.checkpoint_path("tiny-flash"), "--chat", "x") == 2
    assert "has no tokenizer.json; give --tokens" in capsys.readouterr().err


LIBRARIES = ("torch", "triton", "torch_npu")


def every_command(group=cli.root, words=()):
    """The words of every command there is, groups included."""
    import click

    yield words
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield from every_command(command, (*words, name))


@pytest.mark.parametrize("hidden", [False, True])
def test_help_of_every_command(hidden, monkeypatch):
    """Where torch is installed it is hidden, so that this is the first environment of the
    README.
    """
    if hidden:
        for name in list(sys.modules):
            if name.partition(".")[0] in {*LIBRARIES, "dsv4_backend_cuda", "dsv4_backend_ascend", "dsv4_backend_torch"}:
                monkeypatch.delitem(sys.modules, name)
        for name in LIBRARIES:
            monkeypatch.setitem(sys.modules, name, None)
    commands = list(every_command())
    assert {("generate",), ("conformance", "run"), ("kernels", "build"), ("ascend", "selftest")} <= set(commands)
    for words in commands:
        shown = dsv4(*words, "--help").output
        assert "Usage:" in shown
        assert "Cannot be used" not in shown, shown
    assert not hidden or not {name for name in LIBRARIES if sys.modules.get(name)}


@pytest.mark.parametrize(
    "command", ["generate -p a -n 300 --ignore-eos -b reference", "plan --model flash --context 64K"]
)
def test_whoever_reads_may_leave(command):
    """``dsv4 ... | head``: no message, and not the status of success."""
    command = [sys.executable, "-m", "dsv4_core", *command.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.read(3)
        run.stdout.close()
        said = run.stderr.read().decode()
    assert (run.returncode, said) == (141, "")


def test_words_of_a_file_are_words(tmp_path):
    """Neither a terminal's sequences nor rich's markup in a configuration or a directory's name
    count.
    """
    directory = tmp_path / "a[red]b"
    shutil.copytree(golden.checkpoint_path("tiny-flash"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"\x1b]0;x\x07[/bold]": "[/]"}))
    output = dsv4("inspect", directory, "--no-audit").output
    assert "a[red]b" in output
    assert "\\x1b]0;x\\x07[/bold]" in output
    assert "\x1b" not in output
