"""Rung L1: compare our schemas and shape functions with those of the real torch-npu wheel; write a
report.

Run in the environment of ``npu_venv.py``. For every way in which the backend calls an op, on every
generation, the wheel's shape function and ours see the same meta tensors; shapes, dtypes and
refusals have to agree. Calls that we refuse are tried too: what the wheel lets through is why
``constraints.py`` exists.

    python backends/ascend/tools/npu_venv.py --venv DIR run backends/ascend/tools/compare_shapes.py
    --report reports/ascend/l1/2.13.0.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch_npu  # noqa: F401
from torch.utils import _pytree as pytree
from torch_npu import version

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsv4_backend_ascend.capability import GENERATIONS, Generation, table
from dsv4_backend_ascend.schema import bind, incompatible, overload, schemas
from dsv4_backend_ascend.simulate import SHAPES
from dsv4_backend_ascend.simulate.samples import VIOLATIONS, Sample, samples


def meta(arguments: dict[str, Any]) -> dict[str, Any]:
    """Strip a call's tensors of their data; strides stay."""
    return dict(
        pytree.tree_map_only(
            torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), arguments
        )
    )


def describe(results: Any) -> list[str]:
    """Dtype and shape of each result."""
    flat = results if isinstance(results, (list, tuple)) else [results]
    return ["none" if t is None else f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in flat]


def wheel(op: str, arguments: dict[str, Any]) -> tuple[list[str], str]:
    """Ask the wheel's shape function about a call; give its results or its refusal."""
    try:
        return describe(getattr(torch.ops.npu, op).default(**meta(arguments))), ""
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return [], str(error).strip().splitlines()[0][:200]


def schema_drift() -> dict[str, str]:
    """Calls of the table that the wheel's op cannot take, with the reason."""
    drift = {}
    for call in table().calls:
        if call.tier == "cann":
            op = overload(call.op)
            problem = "is missing" if op is None else incompatible(str(op._schema), schemas()[call.op], call.passes)  # noqa: SLF001
            if problem:
                drift[call.name] = f"npu::{call.op} {problem}"
    return drift


def spelt_otherwise() -> list[str]:
    """Ops whose schema differs from the newest snapshot's, in what is passed or not."""
    ops = {call.op for call in table().calls if call.tier == "cann"}
    return sorted(op for op in ops if (found := overload(op)) is not None and str(found._schema) != schemas()[op])  # noqa: SLF001


def made(generation: Generation) -> list[Sample]:
    """Samples of calls that torch-npu takes, of the arguments that the wheel has."""
    tiers = {call.name: call.tier for call in table().calls}
    drift = schema_drift()
    return [s for s in samples(generation) if tiers[s.call] == "cann" and s.call not in drift]


def compare(sample: Sample) -> dict[str, Any]:
    """One call, both shape functions."""
    theirs, refusal = wheel(sample.op, sample.arguments)
    ours = describe(SHAPES[sample.op](bind(sample.op, (), meta(sample.arguments))))
    return {
        "call": sample.call,
        "op": sample.op,
        "agrees": ours == theirs,
        "ours": ours,
        "wheel": theirs or f"refused: {refusal}",
    }


def refused_by_us() -> list[dict[str, str]]:
    """Ask the wheel's shape functions about calls that we refuse: forbidden by documents, or not
    how the op is called here.
    """
    found = []
    for violation in VIOLATIONS:
        sample = next((s for g in GENERATIONS for s in made(g) if s.call == violation.call), None)
        if sample is None:
            continue
        _, refusal = wheel(sample.op, violation.change(sample.arguments))
        found.append(
            {"call": violation.call, "rule": violation.word, "wheel": f"refused: {refusal}" if refusal else "accepted"}
        )
    return found


def main() -> int:
    """Command line; fails where shapes disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    calls = {generation: [compare(sample) for sample in made(generation)] for generation in GENERATIONS}
    drift = schema_drift()
    disagreements = [entry for entries in calls.values() for entry in entries if not entry["agrees"]]
    refused = refused_by_us()
    report = {
        "rung": "L1",
        "says": "schemas and shape functions agree with the real wheel; nothing was computed and no NPU was present",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "torch-npu": version.__version__,
            "torch-npu commit": version.git_version,
            "python": sys.version.split()[0],
            "CANN": "absent: empty stand-ins",
        },
        "ops": sorted(table().ops),
        "schemas that differ where nothing is passed": [op for op in spelt_otherwise() if op not in str(drift)],
        "drift": {"schemas": drift, "shapes": disagreements},
        "calls": calls,
        "calls that we refuse": refused,
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    accepted = sum(entry["wheel"] == "accepted" for entry in refused)
    print(
        f"{len(drift)} calls that the wheel cannot take: {', '.join(drift) or 'none'}; "
        f"{sum(map(len, calls.values()))} calls, {len(disagreements)} differ in shape"
    )
    print(f"{len(refused)} calls that constraints.py refuses: the wheel accepts {accepted}")
    return 1 if disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
