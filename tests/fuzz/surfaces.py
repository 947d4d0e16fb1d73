"""What is fuzzed: for every surface a sound state, the file of it that is damaged, and the command
that meets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import direct
import mutate
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from rewriting import small

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.create import create, preset

Damage = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Surface:
    """``file`` of the state is damaged by ``damage``; then ``commands`` (in turn, one an input) are
    run. A command whose first word begins with @ is a function of ``DIRECT``: what no command line
    reaches in a process.

    ``fresh``: folders of the state that a command writes, to be remade for every input. ``same``:
    where the command accepts, what it prints must be what the sound state gives: nothing that was
    damaged may change a result. ``result``: the same of the files in a folder, but for the
    manifest's own.
    """

    name: str
    file: str
    damage: Damage
    commands: tuple[tuple[str, ...], ...]
    fresh: tuple[str, ...] = ()
    same: bool = False
    result: str = ""
    slow: int = 1
    """Of how many inputs one is tried: where a command takes long."""
    named: tuple[str, ...] = field(default=())
    """What a message may name instead of the file; of a body that has no name, nothing."""


def run(*words: str) -> int:
    """Run a command in this process, as ``main`` does; give its status."""
    from dsv4_core import cli

    kept = sys.argv
    sys.argv = ["dsv4", *words]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    finally:
        sys.argv = kept
    raise AssertionError("main returned")


def prepare(folder: Path) -> None:
    """Make the sound states, once. Torch, where it is, is imported here, and not by every child
    that needs it.
    """
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
    small(folder / "model")
    micro = preset(PRESETS["tiny"], layers=1, experts=2, ratios=(4,), max_position=None, expert_dtype="fp4")
    create(folder / "micro", micro, expert_format="e2m1", seed=0, shard_size=1_000_000)
    _speaking(folder / "speaking")
    snapshot = folder / "hub/hub/models--a--b/snapshots/0123abcd"
    shutil.copytree(folder / "micro", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0123abcd")
    os.environ["HF_HOME"] = f"{folder / 'hub'}"
    _sayings(folder)
    np.save(folder / "tokens.npy", np.arange(8, dtype=np.int64).reshape(2, 4))
    (folder / "dsv4.toml").write_text('[run]\nbackend = "reference"\n')
    (folder / "xfails.toml").write_text('[[xfail]]\ncase = "gate/*"\nreason = "why"\nexpires = 2099-06-30\n')
    entry = {
        "memory_gb": 80,
        "bandwidth_gbs": 3350,
        "link_gbs": 450,
        "tflops": {"bfloat16": 989, "fp8": 1979, "vector": 67},
        "devices": 2,
        "source": "x",
    }
    (folder / "machine.json").write_text(json.dumps(entry))
    made = [
        ("conformance", "export", "bundle", "--op", "rms_norm", "--op", "cache_read", "--op", "gate"),
        (
            "conformance",
            "localise",
            "model",
            "--dump",
            "trace",
            "--tokens",
            "2",
            "--decode",
            "0",
            "--layers",
            "0",
            "-b",
            "reference",
        ),
        ("conformance", "run", "--op", "rms_norm", "--tier", "smoke", "-b", "reference", "-q", "--report", "report"),
        ("convert", "micro", "ranks", "--tp", "2"),
        ("convert", "micro", "copy", "--to", "bf16"),
    ]
    for words in made:
        assert run(*words) == 0, words
    _results(folder)
    _case(folder)
    partial = folder / "resumed.partial"
    shutil.copytree(folder / "copy", partial)
    for late in (
        "model.safetensors.index.json",
        "config.json",
        max(p.name for p in partial.glob("*.safetensors")),
    ):
        (partial / late).unlink()


def _speaking(speaking: Path) -> None:
    """The embedded model, with as small a tokenizer as can be, so that many can be tried."""
    from dsv4_core.checkpoint.weights import embedded

    speaking.mkdir()
    for file in embedded().iterdir():
        if file.suffix == ".safetensors":
            (speaking / file.name).symlink_to(file)
        elif file.is_file():
            shutil.copy(file, speaking)
    tokenizer = json.loads((speaking / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {word: token for word, token in model["vocab"].items() if token < 300}
    kept = [(a, b) for a, b in model["merges"] if {a, b, a + b} <= model["vocab"].keys()]
    model["merges"] = kept
    (speaking / "tokenizer.json").write_text(json.dumps(tokenizer))
    (speaking / "generation_config.json").write_text(
        json.dumps(
            {"_from_model_config": True, "bos_token_id": 0, "do_sample": True, "eos_token_id": 1, "temperature": 0.6}
            | {"top_p": 0.95, "transformers_version": "4.46.3"}
        )
    )


def _sayings(folder: Path) -> None:
    """What people and programs say: prompts, a conversation, requests, ranks."""
    from dsv4_core.text.fixed_texts import library_texts

    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (folder / "prompts.jsonl").write_text('"once"\n[5, 6]\n' + json.dumps(turns) + "\n")
    (folder / "prompts.txt").write_text("once upon\na time\n")
    (folder / "conversation.json").write_text(json.dumps([*turns, {"role": "assistant", "content": "yes"}]))
    texts = library_texts("official")
    constants = {
        "TOOLS_TEMPLATE": "Use <{dsml_token}tool_calls> in {thinking_end_token}:\n{tool_schemas}\n{{}}",
        "response_format_template": "Reply by {schema}",
        "REASONING_EFFORT_PROMPTS": dict(texts.efforts),
        "DEFAULT_REASONING_EFFORT": "low",
    }
    encoder = folder / "encoded/encoding/encoding_dsv4.py"
    encoder.parent.mkdir(parents=True)
    (folder / "speaking/encoding").mkdir()
    text = "import os\n" + "".join(f"{name}: object = {value!r}\n" for name, value in constants.items())
    encoder.write_text(text)
    (folder / "speaking/encoding/encoding_dsv4.py").write_text(text)
    tool = {
        "name": "look",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    }
    chat = {
        "model": "speaking", "messages": turns, "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"],
        "stream": False, "logprobs": True, "top_logprobs": 2,
        "logit_bias": {"5": 1.0}, "thinking": {"type": "disabled"},
    }  # fmt: skip
    messages = {
        "model": "speaking", "messages": turns[1:], "system": "be brief", "max_tokens": 1, "top_k": 3, "stop_sequences": ["x"],
        "thinking": {"type": "disabled"},
    }  # fmt: skip
    tools = chat | {
        "tools": [{"type": "function", "function": tool}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
    }
    responses = {
        "model": "speaking",
        "input": [{"role": "user", "content": "hi"}],
        "instructions": "be brief",
        "max_output_tokens": 1,
    }
    completions = {
        "model": "speaking",
        "prompt": ["once", [5, 6]],
        "max_tokens": 1,
        "logprobs": 1,
        "stop": "x",
        "echo": False,
        "logit_bias": {"5": -1},
    }
    for name, body in (
        ("chat", chat),
        ("tools", tools),
        ("messages", messages),
        ("responses", responses),
        ("completions", completions),
    ):
        (folder / f"{name}.body").write_text(json.dumps(body))
    (folder / "tokenize.body").write_text(json.dumps({"prompt": "once"}))
    (folder / "store.json").write_text(json.dumps(direct.sound_store()))
    (folder / "secret").write_text("0123456789abcdef0123456789abcdef\n")


def _results(folder: Path) -> None:
    """Right results of the exported cases."""
    from dsv4_conformance.exchange import export
    from dsv4_conformance.files import tensorfile
    from dsv4_conformance.verdict.calls import execute

    from dsv4_core.contract import registry

    backend = registry.create("reference")
    for entry in json.loads((folder / "bundle/manifest.json").read_text())["cases"]:
        call = export.Exported(folder / "bundle", entry).call()
        with np.errstate(all="ignore"):
            outcome = execute(call, backend, [tuple(o["shape"]) for o in entry["outputs"]])
        tensorfile.write(
            folder / "results" / entry["results"], dict(zip(export.output_names(call), outcome.results, strict=True))
        )


def _case(folder: Path) -> None:
    from dsv4_conformance.exchange import export, replay

    entry = json.loads((folder / "bundle/manifest.json").read_text())["cases"][0]
    replay.save(folder / f"one{replay.SUFFIX}", export.Exported(folder / "bundle", entry).call(), "native", "a note")


READ = ("inspect", "micro", "--no-audit", "--json")
LOOK = ("inspect", "micro", "--no-audit")
AUDIT = ("inspect", "micro")
SAY = ("generate", "micro", "--tokens", "5,6,7", "-n", "2", "-b", "reference", "--chunk", "2")
JUDGE = ("conformance", "judge", "bundle", "results", "--op", "rms_norm")
MODEL = ("config.json", "micro")


def surfaces(folder: Path) -> list[Surface]:
    """All of them; ``folder`` was prepared."""
    shards = sorted(p.name for p in (folder / "copy").glob("*.safetensors"))
    rank = min(p.name for p in (folder / "ranks/rank-0-of-2").glob("*.safetensors"))
    case = json.loads((folder / "bundle/manifest.json").read_text())["cases"]
    result = next(c["results"] for c in case if c["op"] == "rms_norm")
    say, chat = (
        ("generate", "speaking", "-p", "hi 12", "-n", "1", "-b", "reference"),
        ("generate", "speaking", "--chat", "hi", "-n", "1", "-b", "reference"),
    )
    lines = ("generate", "speaking", "-n", "1", "-b", "reference", "--prompts")
    trace = ("conformance", "localise", "--trace", "trace", "-b", "reference", "--cases", "found")
    resume = ("convert", "micro", "resumed", "--to", "bf16")
    return [
        Surface("shard header", f"micro/{min(p.name for p in (folder / 'micro').glob('*.safetensors'))}", mutate.safetensors, (READ, READ, READ, AUDIT, SAY), slow=3, named=("micro",)),
        Surface("index.json", "micro/model.safetensors.index.json", mutate.json_file, (READ, READ, READ, LOOK, SAY), slow=3, named=("micro",)),
        Surface("config.json", "micro/config.json", mutate.json_file, (READ, READ, READ, LOOK, SAY), named=MODEL),
        Surface("tokenizer.json", "speaking/tokenizer.json", mutate.json_file, (*6 * (("@tokenizer", "speaking"),), say, chat), slow=2, named=("tokenizer",)),
        Surface("tokenizer_config.json", "speaking/tokenizer_config.json", mutate.json_file, (chat,), slow=50),
        Surface("generation_config.json", "speaking/generation_config.json", mutate.json_file, (chat,), slow=50, named=("temperature", "top_p")),
        Surface("prompts.jsonl", "prompts.jsonl", mutate.json_lines, (*9 * (("@prompts", "prompts.jsonl"),), (*lines, "prompts.jsonl")), named=("prompt",)),
        Surface("prompts.txt", "prompts.txt", mutate.raw, (*9 * (("@prompts", "prompts.txt"),), (*lines, "prompts.txt")), named=("prompt", "encode")),
        Surface("conversation", "conversation.json", mutate.json_file, (("@load", "conversation.json"),)),
        Surface("encoder", "encoded/encoding/encoding_dsv4.py", mutate.python, (("@texts", "encoded"),), named=("encod",)),
        Surface("hub reference", "hub/hub/models--a--b/refs/main", mutate.raw, (("inspect", "a/b", "--no-audit", "--json"),), named=("a/b", "refs")),
        Surface("secret file", "secret", mutate.raw, (("@secret", "secret"),)),
        Surface("ranks store", "store.json", mutate.store, (("@store", "store.json"), ("@signed", "store.json")), named=("rank",)),
        *(Surface(f"body of {kind}", f"{kind}.body", mutate.json_file, (("@body", kind, f"{kind}.body"),), slow={"tools": 4, "messages": 3, "responses": 30, "completions": 3}.get(kind, 1), named=("",))
          for kind in ("chat", "tools", "messages", "responses", "completions", "tokenize")),
        Surface("token .npy", "tokens.npy", mutate.npy,
                (*4 * (("logits", "model", "--tokens", "tokens.npy", "--prefill", "2", "-b", "reference", "--out", "out.npz"),),
                 ("conformance", "localise", "model", "--tokens", "tokens.npy", "--layers", "0", "--decode", "0", "-b", "reference")), named=("token",)),
        Surface("dsv4.toml", "dsv4.toml", mutate.words, (("explain", "--model", "tiny", "--layer", "0"),), named=("backend",)),
        Surface("xfails", "xfails.toml", mutate.words,
                (("conformance", "run", "--case", "rms_norm/tokens=1", "-b", "reference", "-q", "--xfails", "xfails.toml"),), slow=3, named=("xfail", "--case")),
        Surface("hardware file", "machine.json", mutate.json_file, (("plan", "--model", "micro", "--hardware", "machine.json", "--context", "256", "--json"),), named=("machine", "devices")),
        Surface("judge manifest", "bundle/manifest.json", mutate.json_file, (JUDGE,), named=("bundle",)),
        Surface("judge results", f"results/{result}", mutate.safetensors, (JUDGE,), slow=4, named=(result, "rms_norm")),
        Surface("judge inputs", f"bundle/inputs/{result}", mutate.safetensors, (JUDGE,), slow=3, named=("bundle", "rms_norm")),
        Surface("trace.json", "trace/trace.json", mutate.json_file, (trace,), slow=16, named=("trace",)),
        Surface("trace tensors", "trace/trace.safetensors", mutate.safetensors, (trace,), same=True, slow=3, named=("trace",)),
        Surface("saved case", "one.case.safetensors", mutate.safetensors,
                (("conformance", "run", "--case", "one.case.safetensors", "-b", "reference", "-q"),), slow=16, named=("one.case",)),
        Surface("rank copy manifest", "ranks/rank-0-of-2/convert.json", mutate.json_file, (("inspect", "ranks/rank-0-of-2", "--no-audit", "--json"),), named=("rank-0", "convert.json")),
        Surface("rank copy shard", f"ranks/rank-0-of-2/{rank}", mutate.raw, (("inspect", "ranks/rank-0-of-2", "--no-audit", "--json"),), same=True, slow=3, named=("rank-0", "safetensors")),
        Surface("copy shard", f"copy/{shards[0]}", mutate.raw, (("generate", "copy", *SAY[2:]),), same=True, slow=3, named=("copy",)),
        Surface("resume manifest", "resumed.partial/convert.json", mutate.json_file, (resume,), fresh=("resumed.partial", "resumed"), result="resumed", slow=6, named=("resumed",)),
        Surface("report.json", "report/report.json", mutate.json_file, (("conformance", "matrix", "report"), ("conformance", "matrix", "--brief", "report")), named=("report",)),
    ]  # fmt: skip


LINES: tuple[tuple[list[str], list[str]], ...] = (
    (["generate", "model", "--tokens", "5,6", "-n", "2", "-b", "reference"],
     ["--temperature", "--top-p", "--seed", "--stop", "--chunk", "--tp", "--ep", "--weight-cache", "-O", "--numerics", "--device", "--prompt", "--chat",
      "--max-tokens", "--tokens", "--thinking", "--speculative", "--system", "--backend"]),
    (["inspect", "model", "--no-audit"], ["--json", "--no-audit", "--help"]),
    (["init", "made", "--preset", "tiny", "--layers", "1", "--experts", "4", "--seed", "3"],
     ["--ratios", "--layers", "--experts", "--max-position", "--shard-size", "--expert-dtype", "--seed"]),
    (["logits", "model", "--tokens", "tokens.npy", "--prefill", "2", "--out", "out.npz", "-b", "reference"], ["--chunk", "--mtp", "--prefill", "--tokens", "--out"]),
    (["plan", "--model", "tiny", "--context", "256"], ["--hardware", "--tp", "--ep", "--price", "--batch", "--context", "--json", "--model"]),
    (["explain", "--model", "tiny", "--layer", "1", "-b", "reference"], ["--layer", "--model", "-O", "--backend"]),
    (["convert", "model", "converted", "--to", "bf16"], ["--tp", "--ep", "--experts", "--allow-lossy", "--verify", "--to"]),
    (["conformance", "run", "--case", "rms_norm/tokens=1", "-b", "reference", "-q"], ["--tier", "--op", "--case", "--require", "--xfails", "--list", "--jobs"]),
    (["conformance", "matrix", "report"], ["--brief", "--out", "--into"]),
    (["conformance", "export", "made", "--op", "rms_norm"], ["--tier", "--op", "--numerics", "--out"]),
    (["conformance", "judge", "bundle", "results", "--op", "rms_norm"], ["--op", "--tier", "--report", "-O"]),
    (["conformance", "localise", "--trace", "trace", "-b", "reference", "--cases", "found", "--layers", "9"], ["--layers", "--tokens", "--decode", "--cases", "--dump"]),
    (["completion", "bash"], ["--help"]),
    (["inspect", "a/b", "--no-audit"], ["--json"]),
    (["backends"], ["--help", "-h"]),
)  # fmt: skip
