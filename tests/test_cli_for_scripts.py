"""The command line as people and scripts meet it: prompts, help, suggestions, completion, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_conformance.model import golden

from dsv4_core import cli
from dsv4_core.cli import schema
from dsv4_core.contract import registry
from dsv4_core.files.writing import named

ROOT = Path(__file__).parents[1]
CHAT = ("--chat", "What is kludge?", "-b", "reference", "-n", 6)


def dsv4(*args, ok=True, stdin=None):
    result = CliRunner().invoke(cli.root, [str(a) for a in args], input=stdin)
    if ok:
        assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*args, stdin=None):
    result = dsv4(*args, ok=False, stdin=stdin)
    assert result.exit_code != 0, result.output
    return f"{result.stderr}{result.exception}"


def document(command, *args, status=0):
    """Run with ``--json``; hold what is printed to the form of that command and to the JSON
    Schema.
    """
    result = dsv4(*args, "--json", ok=False)
    assert result.exit_code == status, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert (found["command"], found["schema"], found["ok"]) == (command, schema.SCHEMA, status == 0)
    jsonschema.Draft202012Validator(schema.json_schema()).validate(found)
    return msgspec.convert(found["result"], schema.RESULTS[command], strict=True)


def test_several_prompts_run_as_one_batch(tmp_path):
    both = dsv4(
        "generate",
        "--tokens",
        "1,2,3",
        "--tokens",
        "4,5",
        "-n",
        4,
        "-b",
        "reference",
        golden.checkpoint_path("tiny-flash"),
    )
    assert [len(line.split()) for line in both.stdout.splitlines()] == [4, 4]
    assert "2 sequences: 5 prompt tokens" in both.stderr
    texts = dsv4("generate", "-p", "one", "-p", "two", "-n", 3, "-b", "reference")
    assert texts.stdout.index("> one\n") < texts.stdout.index("> two\n")
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    assert dsv4("generate", "--prompts", file, "-n", 3, "-b", "reference").stdout == texts.stdout
    assert dsv4("generate", "--prompts", "-", "-n", 3, "-b", "reference", stdin="one\ntwo\n").stdout == texts.stdout


def test_a_file_of_prompts_of_every_kind(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n[1, 2, 3]\n[{"role": "user", "content": "What is kludge?"}]\n')
    found = document("generate", "generate", "--prompts", file, "-n", 3, "-b", "reference")
    chat = document("generate", "generate", *CHAT)
    assert [s.prompt_tokens for s in found.sequences][1:] == [3, chat.sequences[0].prompt_tokens]
    assert all(len(s.tokens) == 3 for s in found.sequences)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "no prompt; write one a line"),
        ("p.txt", "a\n\nb\n", "line 2: empty"),
        ("p.jsonl", '"a"\n{', "line 2: not JSON"),
        ("p.jsonl", "[1, true]", "line 1: must be a text"),
        ("p.jsonl", "[]", "line 1: must be a text"),
        ("p.jsonl", "3", "line 1: must be a text"),
        ("p.jsonl", "1" + "0" * 5000, "line 1: Integer value out of range"),
        ("p.jsonl", "[1, 18446744073709551615]", "token id 18446744073709551615 at [1] is outside"),
        ("p.jsonl", "[99999999999999999999999]", "token id 99999999999999999999999 at [0] is outside"),
        ("p.txt", b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_files_of_prompts_that_are_none(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused("generate", "--prompts", file, "-b", "reference")


def test_a_prompt_from_standard_input():
    want = dsv4("generate", *CHAT).stdout
    assert dsv4("generate", "--chat", "-", *CHAT[2:], stdin="What is kludge?\n").stdout == want
    ids = dsv4("generate", "--tokens", "1 2 3", "-n", 3, "-b", "reference").stdout
    assert dsv4("generate", "--tokens", "-", "-n", 3, "-b", "reference", stdin="1\n2\n3\n").stdout == ids
    assert "standard input can be read once" in refused("generate", "-p", "-", "-p", "-", "-b", "reference")
    assert "the prompt is empty" in refused("generate", "-p", "-", "-b", "reference", stdin="")


def test_a_stop_text():
    plain = dsv4("generate", *CHAT).stdout.rstrip("\n")
    stop = plain[2:5]
    assert dsv4("generate", *CHAT, "--stop", stop).stdout == plain.split(stop)[0] + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tokens", "1,x,3"), "'x' is no token id"),
        (("--tokens", ""), "the prompt is empty"),
        (("--tokens", "\uff11,2"), "is no token id"),
        (("--tokens", "1,2048"), "token id 2048 at [1] is outside the vocabulary"),
        (("--tokens", "1", "--tokens", "-5"), "token id -5"),
        (
            ("--tokens", "1,2", "-n", "5000"),
            "2 tokens and max_tokens = 5000; the model has 4096 positions (max_position_embeddings of config.json)",
        ),
        (("-p", "x", "-n", "0"), "0 is not in the range"),
        (("-p", "x", "--stop", ""), "an empty text would end"),
        (("-p", "x", "--stop-token", "5000"), "token id 5000"),
        (("-p", "x", "--thinking"), "--system and --thinking are of a conversation"),
        (("-p", "x", "--chat", "y"), "give one of --prompt, --chat, --tokens and --prompts"),
    ],
)
def test_what_is_wrong_is_said_before_weights_load(monkeypatch, args, message):
    from dsv4_core import session

    monkeypatch.setattr(session, "Model", lambda *_args, **_kwargs: pytest.fail("weights were loaded"))
    assert message in refused("generate", "-b", "reference", *args)


def test_a_name_of_the_hub_says_how_to_download_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for command in (
        ("generate", "-p", "x", "-b", "reference"),
        ("inspect",),
        ("explain", "-b", "reference", "-m"),
        ("plan", "-m"),
    ):
        said = refused(*command, "deepseek-ai/DeepSeek-V4-Flash")
        assert "hf download deepseek-ai/DeepSeek-V4-Flash" in said


def test_names_that_are_no_directory_say_what_to_do():
    assert "the model's name is empty" in refused("inspect", "")
    assert "an address, and dsv4 downloads nothing" in refused("inspect", "https://example.org/deepseek-ai/V4")
    for words in (("plan", "-m", "tiny", "--price"), ("generate", "-p", "x", "--speculative", "--draft-confidence")):
        assert "nan is no finite number" in refused(*words, "nan")
    assert "is not a number of tokens" in refused("plan", "-m", "tiny", "--context", "\u00b2")


def test_a_prompt_that_cannot_be_encoded_is_named_by_its_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one"\n[{"role": "nobody", "content": "x"}]\n')
    assert f"{file}, line 2: message 0 has role 'nobody'" in refused("generate", "--prompts", file, "-b", "reference")
    file.write_text(json.dumps([1] * 5000) + "\n")
    assert f"{file}, line 1: the prompt has 5000 tokens" in refused("generate", "--prompts", file, "-b", "reference")


def test_an_error_is_short_and_says_what_it_is_about(capsys):
    cli.told(f"dsv4: role {'x' * 5000}\nand more", 2)
    said = capsys.readouterr().err
    assert len(said) < 1100
    assert said.endswith("...\nand more\n")
    for error, told in (
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: no such file or directory"),
        (OSError(28, "No space left on device"), "standard output: no space left on device"),
        (OSError(98, "Address already in use"), "address already in use"),
        (OSError("words of our own"), "words of our own"),
    ):
        assert cli.system_error(error) == told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_named(tmp_path):
    command = [sys.executable, "-m", "dsv4_core", "generate", "-b", "reference", "--tokens", "1,2", "-n", "2"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "dsv4: standard output: no space left on device" in done.stderr
    with pytest.raises(OSError, match=r"x\.bin"), named(tmp_path / "x.bin"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("closed", "words", "status", "said"),
    [
        (0, ["chat", "-b", "reference"], 0, ""),
        (1, ["backends"], 2, "standard output: bad file descriptor"),
        (1, ["generate", "-b", "reference", "--tokens", "1,2", "-n", "2"], 2, "standard output: bad file descriptor"),
        (2, ["generate", "-b", "reference", "--tokens", "1,2", "-n", "2"], 0, ""),
    ],
)
def test_a_closed_stream_is_an_empty_input_or_an_output_that_fails(closed, words, status, said):
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_core", *words], preexec_fn=lambda: os.close(closed),
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "foreseen" not in done.stderr


def test_a_result_replaces_nothing_but_its_like(tmp_path):
    """An option's slip must not cost a model or a document."""
    ids, model = tmp_path / "ids.npy", tmp_path / "m"
    np.save(ids, np.array([[1, 2, 3]]))
    dsv4("init", model, "--preset", "tiny", "--layers", 1, "--experts", 4, "--seed", 0)
    logits = ("logits", model, "--tokens", ids, "--prefill", 2, "-b", "reference", "--out")
    config, weights = ((model / name).read_bytes() for name in ("config.json", "model-00001-of-00001.safetensors"))
    for victim in ("config.json", "model-00001-of-00001.safetensors"):
        assert "a file of another kind lies there" in refused(*logits, model / victim)
    assert "a file of another kind lies there" in refused(*logits, ids)
    for _ in range(2):
        dsv4(*logits, tmp_path / "out.npz")
    report = tmp_path / "report"
    dsv4("conformance", "run", "--op", "hc_expand", "--tier", "smoke", "-b", "reference", "-q", "--report", report)
    assert "a file of another kind" in refused("conformance", "matrix", report, "--out", model / "config.json")
    for _ in range(2):
        dsv4("conformance", "matrix", report, "--out", tmp_path / "matrix.md")
    assert (config, weights) == (
        (model / "config.json").read_bytes(),
        (model / "model-00001-of-00001.safetensors").read_bytes(),
    )


def test_weights_that_are_no_numbers_are_no_success(tmp_path):
    model, ids = tmp_path / "m", tmp_path / "ids.npy"
    dsv4("init", model, "--preset", "tiny", "--layers", 1, "--experts", 4, "--seed", 0)
    file = model / "model-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    at = 8 + int.from_bytes(data[:8], "little") + header["hc_head_base"]["data_offsets"][0]
    data[at : at + 4] = b"\0\0\xc0\x7f"  # of a norm it would be an error when opened
    file.write_bytes(data)
    for wish in ((), ("--temperature", "1"), ("--top-k", "3"), ("--speculative",)):
        said = refused("generate", model, "--tokens", "1,2,3", "-n", 3, "-b", "reference", *wish)
        assert "token 3 cannot be chosen: its logits hold NaN" in said
    np.save(ids, np.array([[1, 2, 3]]))
    said = refused("logits", model, "--tokens", ids, "--prefill", 2, "-b", "reference", "--out", tmp_path / "x.npz")
    assert "is the first that is no finite number" in said
    assert "cannot be chosen" in refused("bench", model, "--prompt", 4, "--tokens", 2, "--runs", 1, "-b", "reference")


def test_help_begins_with_what_a_newcomer_needs():
    text = dsv4("generate", "-h").output
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Prompt (one kind; several run as one batch)",
        "Generation",
        "Backend",
        "One vendor's",
        "Several ranks (each started by torchrun)",
        "Other options",
    ]
    assert "--help" in text.split("Other options:")[1]


def test_every_command_shows_its_help():
    def walk(group, path):
        for name in group.list_commands(None):
            command = group.get_command(None, name)
            yield (*path, name)
            if hasattr(command, "list_commands"):
                yield from walk(command, (*path, name))

    for path in walk(cli.root, ()):
        assert dsv4(*path, "--help").output.startswith(f"Usage: root {' '.join(path)}")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("genrate", "generate"), ("inspct", "inspect"), ("lst", ""), ("confromance", "conformance")],
)
def test_a_misspelt_command_is_suggested(typed, meant):
    said = refused(typed)
    assert f"No such command {typed!r}." in said
    assert (f"Did you mean {meant}" in said) if meant else ("--help` lists them" in said)


def test_a_misspelt_command_of_a_group_is_suggested():
    assert "Did you mean run?" in refused("conformance", "rnu")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    script = dsv4("completion", shell).stdout
    assert "_DSV4_COMPLETE" in script
    assert "dsv4" in script


def complete(*words):
    """What the shell would be offered after ``words``."""
    environment = os.environ | {
        "_DSV4_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["dsv4", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv = ['dsv4']; from dsv4_core.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_completion():
    assert complete("gen") == ["generate"]
    assert complete("generate", "--sp") == ["--speculative"]
    assert complete("generate", "-b", "ref") == ["reference"]
    assert "run" in complete("conformance", "")


def test_python_m_is_called_by_its_name():
    done = subprocess.run([sys.executable, "-m", "dsv4_core", "nosuch"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: python -m dsv4_core ")
    version = subprocess.run(
        [sys.executable, "-m", "dsv4_core", "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith("dsv4, version ")


def test_generate_as_json():
    result = document("generate", "generate", *CHAT)
    assert result.run.numerics == "native"
    assert result.sequences[0].finish == "length"
    assert result.sequences[0].text == dsv4("generate", *CHAT).stdout.rstrip("\n")
    assert result.drafts is None
    drafted = document("generate", "generate", *CHAT, "--speculative")
    assert drafted.drafts.proposed > 0
    ids = document(
        "generate", "generate", golden.checkpoint_path("tiny-flash"), "--tokens", "1,2", "-n", 2, "-b", "reference"
    )
    assert ids.sequences[0].text is None
    assert len(ids.sequences[0].tokens) == 2


def test_an_error_leaves_standard_output_empty():
    result = dsv4("generate", "--tokens", "9999", "-b", "reference", "--json", ok=False)
    assert result.exit_code != 0
    assert not result.stdout


def test_bench_as_json():
    result = document(
        "bench", "bench", "-b", "reference", "--prompt", 8, "--tokens", 2, "--runs", 1, "--hardware", "h100x1"
    )
    assert result.prefill.slowest == result.prefill.tokens_per_second > 0
    assert 0 < result.decode.roofline.share < 1
    plain = document("bench", "bench", "-b", "reference", "--prompt", 8, "--tokens", 2, "--runs", 1)
    assert plain.decode.roofline is None


def test_explain_as_json():
    result = document("explain", "explain", "-b", "reference", "-m", "tiny")
    assert result.missing == 0
    assert {op.by for op in result.ops} == {"reference"}
    assert "--layer 99: the model has layers 0 .." in refused("explain", "-b", "reference", "-m", "tiny", "--layer", 99)


def test_plan_and_inspect_as_json():
    result = document("plan", "plan", "-m", "tiny", "--context", "2K", "--hardware", "h100x1", "--price", 2)
    assert result.ceilings.decode.dollars_per_million_tokens > 0
    assert document("plan --claims", "plan", "--claims").claims[0].holds
    assert document("inspect", "inspect", "--no-audit").parameters["total"] > 0


def test_a_conformance_run_as_json_and_its_commands(tmp_path):
    asked = ("-b", "reference", "--op", "rms_norm", "--tier", "smoke", "--weight-cache", "1MiB", "--report", tmp_path)
    result = document("conformance run", "conformance", "run", *asked)
    assert result.command == " ".join(map(str, ("dsv4 conformance run", *asked, "--json")))
    assert set(result.statuses) == {"passed"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["command"] == result.command
    assert report["rerun"] == f"dsv4 conformance run --backend reference --weight-cache {1 << 20}"
    assert report["options"] == {"weight_cache": str(1 << 20)}
    assert result.command in (tmp_path / "report.html").read_text()


def test_backends_and_doctor_agree():
    """Both say the same of what can run, and a backend that can be constructed is said to run."""
    listed = {b.name: b for b in document("backends", "backends").backends}
    result = dsv4("doctor", "--json", ok=False)
    found = msgspec.convert(json.loads(result.stdout)["result"], schema.Doctored, strict=True)
    assert {b.name: b.status for b in found.backends} == {name: b.status for name, b in listed.items()}
    assert not any(b.loaded for b in found.backends)
    for name, b in listed.items():
        try:
            registry.create(name)
            runs = True
        except registry.BackendError:
            runs = False
        assert (b.status == "runs") == runs, name


def test_the_json_page_and_schema_are_fresh(tmp_path):
    schema.write(tmp_path)
    for name in ("json.md", "json.schema.json"):
        made = "python -m dsv4_core.cli.schema docs"
        assert (ROOT / "docs" / name).read_text() == (tmp_path / name).read_text(), f"make it again: {made}"
    jsonschema.Draft202012Validator.check_schema(schema.json_schema())
