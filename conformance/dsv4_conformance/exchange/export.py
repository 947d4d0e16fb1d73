"""``dsv4 conformance export`` and ``judge``: op cases as files, for programs without Python, and
the verdict on what they wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dsv4_conformance import check as catalogue
from dsv4_conformance.cases.checks import OpCase
from dsv4_conformance.cases.checks import checks as op_cases
from dsv4_conformance.check import Finding
from dsv4_conformance.exchange import replay
from dsv4_conformance.exchange.export_readme import README
from dsv4_conformance.files import tensorfile
from dsv4_conformance.files.forms import ExportedCase, Manifest, hold_call, plain
from dsv4_conformance.files.stored_calls import Packer, unpack
from dsv4_conformance.laws.small_model import OracleBackend
from dsv4_conformance.verdict.budget import Expected, expect
from dsv4_conformance.verdict.calls import Call, result_dtype
from dsv4_conformance.verdict.judge import Verdict
from dsv4_core.checkpoint.shards import Shard, ShardError
from dsv4_core.contract import registry
from dsv4_core.contract.spec import OPS
from dsv4_core.files import writing as files
from dsv4_core.files.reading import FileError, checked, fitting, inside, json_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_core.contract.spec import Numerics, Tier

MANIFEST = "manifest.json"
LARGEST = 1 << 28  # bytes of inputs; the case whose cache passes 2^31 bytes is left to `run`


@dataclass(frozen=True)
class Exported:
    """One case of an exported directory."""

    directory: Path
    entry: dict[str, Any]

    @property
    def id(self) -> str:
        """As in the suite."""
        return str(self.entry["id"])

    def call(self) -> Call:
        """The case's call."""
        return unpack(self.entry["call"], Shard(self.directory / self.entry["inputs"]).array, self.entry["seed"])

    def expected(self) -> list[Expected]:
        """What was exported as right."""
        shard = Shard(self.directory / self.entry["expected"])

        def one(output: dict[str, Any]) -> Expected:
            name = output["name"]
            kept = {
                kind: shard.array(f"{kind}.{name}") for kind in ("budget", "spread") if output["judged"] == "rounded"
            }
            return Expected(shard.array(f"want.{name}"), output["dtype"], kept.get("budget"), kept.get("spread"))

        return [one(output) for output in self.entry["outputs"]]


def output_names(call: Call) -> list[str]:
    """``y``, or ``y0``, ``y1`` ...; what may be written in place by the operand's name."""
    count = len(call.spec.returns)
    return list(call.spec.mutates) or (["y"] if count == 1 else [f"y{i}" for i in range(count)])


def export(
    directory: Path, tier: Tier, numerics: Numerics, ops: Sequence[str], narrower: dict[str, tuple[str, ...]]
) -> Iterator[str]:
    """Write cases; give the id of each. Cases whose point is the memory layout (views), and huge
    ones, are named as left out.
    """
    backend, oracle = OracleBackend(numerics=numerics), registry.oracle(numerics, narrower)
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []
    for check in op_cases(numerics):
        if catalogue.TIERS.index(check.tier) > catalogue.TIERS.index(tier) or (ops and check.op not in ops):
            continue
        case = cast("OpCase", check)
        call = None if case.case.views or case.case.data == "sparse" else case.call(numerics)
        packer = Packer()
        if call is None or ((description := packer.call("", call, share=False)) and packer.nbytes > LARGEST):
            left_out.append(check.id)
            continue
        expected = expect(call, oracle, backend)
        outputs, tensors = [], {}
        for i, (name, want) in enumerate(zip(output_names(call), expected, strict=True)):
            judged, dtype = call.spec.judged[i], result_dtype(call, i, backend)
            outputs.append({"name": name, "dtype": dtype, "shape": list(want.value.shape), "judged": judged})
            tensors[f"want.{name}"] = want.value
            if want.budget is not None and want.spread is not None:
                tensors |= {f"budget.{name}": want.budget, f"spread.{name}": want.spread}
        file = f"{check.id}.safetensors"
        tensorfile.write(directory / "inputs" / file, packer.tensors)
        tensorfile.write(directory / "expected" / file, tensors)
        places = {"inputs": f"inputs/{file}", "expected": f"expected/{file}", "results": file}
        entries.append(
            {
                "id": check.id,
                "op": check.op,
                "level": check.level,
                "seed": call.seed,
                **places,
                "outputs": outputs,
                "call": description,
            }
        )
        yield check.id
    contracts = {
        op: {"signature": f"{op}{OPS[op].signature}", "axes": dict(OPS[op].axes), "text": OPS[op].doc}
        for op in {e["op"] for e in entries}
    }
    manifest = {
        "numerics": numerics,
        "tier": tier,
        "narrower": narrower,
        **catalogue.environment(),
        "left_out": left_out,
    }
    files.write(directory / "README.md", README)
    files.write(  # last: a directory without it was not finished
        directory / MANIFEST, json.dumps({**manifest, "contracts": contracts, "cases": entries}, indent=1) + "\n"
    )


ADVICE = "export it again: dsv4 conformance export DIRECTORY"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read an exported directory's manifest and hold it to its form; raise ``FileError``."""
    try:
        manifest = json_file(directory / MANIFEST, Manifest, ADVICE)
    except FileNotFoundError:
        raise FileError(f"{directory}: holds no {MANIFEST}, so it is no export that was finished; {ADVICE}") from None
    for op, formats in manifest.narrower.items():
        if op not in OPS or set(formats) - set(OPS[op].narrower):
            raise FileError(f"{directory / MANIFEST}: narrower {op} {formats} is no contract's; {ADVICE}")
    for i, entry in enumerate(manifest.cases):
        name = f"{directory / MANIFEST}: cases[{i}]"
        case = checked(entry, ExportedCase, name, ADVICE)
        hold_call(entry["call"], name, ADVICE)
        for file in (case.inputs, case.expected):
            inside(directory, file, name)
        if case.op != entry["call"]["op"]:
            raise FileError(f"{name}: op {case.op} with a call of {entry['call']['op']}; {ADVICE}")
    return dict(plain(manifest))


def judge(directory: Path, results: Path, ops: Sequence[str] = (), cases: Sequence[str] = ()) -> Iterator[Finding]:
    """A finding for every exported case, or for those of ``ops`` and the ``cases`` named."""
    manifest = read_manifest(directory)
    narrower = {op: tuple(what) for op, what in manifest["narrower"].items()}
    backend, oracle = OracleBackend(numerics=manifest["numerics"]), registry.oracle(manifest["numerics"], narrower)
    for entry in manifest["cases"]:
        if (ops or cases) and entry["op"] not in ops and entry["id"] not in cases:
            continue
        verdict = _verdict(Exported(directory, entry), results, oracle, backend)
        status: catalogue.Status = "passed" if verdict.ok else "failed"
        message, dtypes = "; ".join(verdict.problems), entry["outputs"][0]["dtype"]
        yield Finding(
            entry["id"],
            entry["op"],
            "op",
            entry["level"],
            status,
            message,
            dtypes,
            verdict.used,
            verdict.metrics,
            verdict.worst,
            entry["seed"],
        )


def _verdict(case: Exported, results: Path, oracle: registry.Oracle, backend: OracleBackend) -> Verdict:
    file = inside(results, case.entry["results"], f"{case.directory / MANIFEST}: {case.id}")
    names = [output["name"] for output in case.entry["outputs"]]
    try:
        shard = Shard(file)
    except FileNotFoundError:
        return Verdict([f"no result: {file} does not exist; write {', '.join(names)} there"], float("inf"))
    except (ShardError, FileError) as error:
        return Verdict([f"{file}: {error}"], float("inf"))
    if missing := [name for name in names if name not in shard.entries]:
        return Verdict(
            [f"{file}: no tensor {missing[0]!r}; it has {', '.join(sorted(shard.entries)) or 'none'}"], float("inf")
        )
    if unknown := [
        f"{name} ({shard.entries[name].dtype})"
        for name in names
        if shard.entries[name].dtype not in tensorfile.READABLE
    ]:
        return Verdict(
            [f"{file}: {unknown[0]}: a dtype that no output has; README.md says which is wanted"], float("inf")
        )
    got = [shard.array(name) for name in names]
    with np.errstate(all="ignore"), fitting(f"{case.directory / MANIFEST}: {case.id} and its files", ADVICE):
        return replay.judge_results(case.call(), got, case.expected(), oracle, backend)
