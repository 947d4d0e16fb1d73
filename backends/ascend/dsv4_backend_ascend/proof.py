"""How far each way of running a contract has been proven, per generation: ``data/proof.json``,
collected from the reports of the runs themselves by ``tools/collect.py``.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from dsv4_backend_ascend.capability import table
from dsv4_core.contract.ops import OPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dsv4_backend_ascend.capability import Call, Generation

RUNGS = {
    "L0": "schema: the call matches the schema of the real torch-npu wheel",
    "L1": "shape: the wheel's own shape function agrees",
    "L2": "device: a whole model ran on fake npu tensors with the real wheel",
    "L3": "numerics: the conformance suite passes on simulated CANN",
}
LEGEND = f"proof: {'; '.join(f'{rung} {says}' for rung, says in RUNGS.items())}; on hardware: not run"
KERNELS = "compiled to HIVM without a chip, interpreted by the suite; on hardware: not run"
"""How far the Triton kernels of our own are proven."""


@functools.cache
def recorded() -> dict[str, Any]:
    """``cann``: generation -> call of the capability table -> rungs; ``composed``: generation ->
    rungs; ``versions``.
    """
    return dict(
        json.loads(resources.files("dsv4_backend_ascend").joinpath("data/proof.json").read_text(encoding="utf-8"))
    )


def rungs(generation: Generation, calls: Iterable[Call] = ()) -> list[str]:
    """Rungs that every one of these calls has reached; with no calls those of plain PyTorch ops."""
    names = [call.name for call in calls]
    if not names:
        return list(recorded()["composed"][generation])
    reached = [recorded()["cann"][generation].get(name, []) for name in names]
    return [rung for rung in RUNGS if all(rung in found for found in reached)]


def summary(generation: Generation) -> list[tuple[str, str]]:
    """Per tier the ops that reached the same rungs, and those rungs: lines of `dsv4 doctor`."""
    claimed = table().claimed(generation)
    groups: dict[tuple[str, str], list[str]] = {}
    for call in claimed:
        groups.setdefault((call.tier, " ".join(rungs(generation, [call])) or "no rung"), []).append(call.name)
    lines = [(tier, f"{reached}: {', '.join(names)}") for (tier, reached), names in groups.items()]
    served = {op for call in claimed for op in call.serves}
    composed = [op for op in OPS if op not in served]
    return [*lines, ("composed", f"{' '.join(rungs(generation)) or 'no rung'}: {', '.join(composed)}")]


def of_run(generation: Generation, standing: str, ran: Mapping[str, bool]) -> dict[str, str]:
    """Rungs of every op on a chip, for the report of a run: L0 to L2 as recorded, L3 or L6 if this
    run is the proof.

    ``ran``: of each call of the capability table whether all passed that used it.
    """
    claimed = table().claimed(generation)
    found: dict[str, str] = {}
    for op in OPS:
        calls = [call for call in claimed if op in call.serves]
        for call in calls:
            found[f"{op}: {call.op} ({call.name})"] = _said(rungs(generation, [call]), standing, ran.get(call.name))
        absent = [a for a in table().absent if op in a.contracts and generation in a.generations]
        weights = [dtype for absence in absent for dtypes in absence.operands.values() for dtype in dtypes]
        if not calls or absent:
            kind = f"composed, {', '.join(weights)}" if calls and weights else "composed"
            found[f"{op}: {kind}"] = _said(rungs(generation), standing, bool(ran) or None)
    return found


def _said(recorded_rungs: list[str], standing: str, passed: bool | None) -> str:
    lower = [rung for rung in recorded_rungs if rung != "L3"]
    if standing != "found":
        reached = [*lower, "L3"] if standing == "simulated" and passed else lower
        return f"{' '.join(reached) or 'no rung'}, on hardware: not run"
    outcome = {True: "passed in this run", False: "failed in this run", None: "not reached in this run"}[passed]
    reached = [*recorded_rungs, "L6"] if passed else recorded_rungs
    return f"{' '.join(reached) or 'no rung'}, on hardware: {outcome}"
