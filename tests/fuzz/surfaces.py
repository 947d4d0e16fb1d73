"""What is fuzzed: for every surface a sound state, the file of it that is damaged, and the command that meets it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import mutate
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from rewriting import small

Damage = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Surface:
    """``file`` of the state is damaged by ``damage``; then ``commands`` (in turn, one an input) are run.

    ``fresh``: folders of the state that a command writes, to be remade for every input. ``same``: where the command
    accepts, what it prints must be what the sound state gives: nothing that was damaged may change a result.
    """

    name: str
    file: str
    damage: Damage
    commands: tuple[tuple[str, ...], ...]
    fresh: tuple[str, ...] = ()
    same: bool = False
    slow: int = 1
    """Of how many inputs one is tried: where a command takes seconds."""
    named: tuple[str, ...] = field(default=())
    """What a message may name instead of the file."""


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
    """Make the sound states, once."""
    from dsv4_core.checkpoint.weights import embedded

    small(folder / "model")
    small(folder / "other", seed=5)
    speaking = folder / "speaking"
    speaking.mkdir()
    for file in embedded().iterdir():
        if file.is_file():
            (speaking / file.name).hardlink_to(file) if file.suffix == ".safetensors" and _same_disk(
                file, speaking
            ) else shutil.copy(file, speaking)
    np.save(folder / "tokens.npy", np.arange(8, dtype=np.int64).reshape(2, 4))
    (folder / "dsv4.toml").write_text('[run]\nbackend = "reference"\n')
    (folder / "xfails.toml").write_text('[[xfail]]\ncase = "rms_norm/*"\nreason = "why"\nexpires = 2099-06-30\n')
    entry = {
        "memory_gb": 80,
        "bandwidth_gbs": 3350,
        "link_gbs": 450,
        "tflops": {"bfloat16": 989, "fp8": 1979, "vector": 67},
        "devices": 4,
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
            "6",
            "--decode",
            "1",
            "--layers",
            "0",
            "-b",
            "reference",
        ),
        ("conformance", "run", "--op", "rms_norm", "--tier", "smoke", "-b", "reference", "-q", "--report", "report"),
        ("convert", "model", "ranks", "--tp", "2"),
        ("convert", "model", "copy", "--to", "bf16"),
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


def _same_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


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


SHARD = "model/model-00001-of-00002.safetensors"
LOOK = ("inspect", "model", "--no-audit")
AUDIT = ("inspect", "model")
SAY = ("generate", "model", "--tokens", "5,6,7", "-n", "2", "-b", "reference", "--chunk", "2")
JUDGE = ("conformance", "judge", "bundle", "results", "--op", "rms_norm")
MODEL = ("config.json", "model")


def surfaces(folder: Path) -> list[Surface]:
    """All of them; ``folder`` was prepared."""
    shards = sorted(p.name for p in (folder / "model").glob("*.safetensors"))
    rank = min(p.name for p in (folder / "ranks/rank-0-of-2").glob("*.safetensors"))
    case = json.loads((folder / "bundle/manifest.json").read_text())["cases"]
    result = next(c["results"] for c in case if c["op"] == "rms_norm")
    trace = ("conformance", "localise", "--trace", "trace", "-b", "reference", "--cases", "found")
    resume = ("convert", "model", "resumed", "--to", "bf16")
    return [
        Surface("shard header", f"model/{shards[0]}", mutate.safetensors, (LOOK, LOOK, AUDIT, SAY), named=("model",)),
        Surface("index.json", "model/model.safetensors.index.json", mutate.json_file, (LOOK, LOOK, SAY), named=("model",)),
        Surface("config.json", "model/config.json", mutate.json_file, (LOOK, SAY), named=MODEL),
        Surface("tokenizer.json", "speaking/tokenizer.json", mutate.json_file, (("generate", "speaking", "--chat", "hi", "-n", "1", "-b", "reference"),)),
        Surface("token .npy", "tokens.npy", mutate.npy,
                (("logits", "model", "--tokens", "tokens.npy", "--prefill", "2", "-b", "reference", "--out", "out.npz"),
                 ("conformance", "localise", "model", "--tokens", "tokens.npy", "--layers", "9", "-b", "reference")), named=("token",)),
        Surface("dsv4.toml", "dsv4.toml", mutate.words, (("explain", "--model", "tiny", "--layer", "0"),), named=("backend",)),
        Surface("xfails", "xfails.toml", mutate.words,
                (("conformance", "run", "--case", "rms_norm/tokens=1", "-b", "reference", "-q", "--xfails", "xfails.toml"),), slow=10, named=("xfail", "--case")),
        Surface("hardware file", "machine.json", mutate.json_file, (("plan", "--model", "model", "--hardware", "machine.json", "--context", "256"),), named=("machine", "devices")),
        Surface("judge manifest", "bundle/manifest.json", mutate.json_file, (JUDGE,), named=("bundle",)),
        Surface("judge results", f"results/{result}", mutate.safetensors, (JUDGE,), named=(result, "rms_norm")),
        Surface("judge inputs", f"bundle/inputs/{result}", mutate.safetensors, (JUDGE,), named=("bundle", "rms_norm")),
        Surface("trace.json", "trace/trace.json", mutate.json_file, (trace,), named=("trace",)),
        Surface("trace tensors", "trace/trace.safetensors", mutate.safetensors, (trace,), same=True, named=("trace",)),
        Surface("saved case", "one.case.safetensors", mutate.safetensors,
                (("conformance", "run", "--case", "one.case.safetensors", "-b", "reference", "-q"),), slow=10, named=("one.case",)),
        Surface("rank copy manifest", "ranks/rank-0-of-2/convert.json", mutate.json_file, (("inspect", "ranks/rank-0-of-2", "--no-audit"),), named=("rank-0", "convert.json")),
        Surface("rank copy shard", f"ranks/rank-0-of-2/{rank}", mutate.raw, (("inspect", "ranks/rank-0-of-2", "--no-audit"),), same=True, named=("rank-0", "safetensors")),
        Surface("copy's shard", f"copy/{shards[0]}", mutate.raw, (("generate", "copy", *SAY[2:]),), same=True, named=("copy",)),
        Surface("resume manifest", "resumed.partial/convert.json", mutate.json_file, (resume,), fresh=("resumed.partial", "resumed"), same=True, named=("resumed",)),
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
    (["backends"], ["--help", "-h"]),
)  # fmt: skip
