"""How far each way of running a contract has been proven, per generation: ``data/proof.json``, collected from the reports
of the runs themselves by ``tools/collect.py``.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dsv4_backend_ascend.capability import Call, Generation

RUNGS = {
    "L0": "schema: the call matches the schema of the real torch-npu wheel",
    "L1": "shape: the wheel's own shape function agrees",
    "L2": "device: a whole model ran on fake npu tensors with the real wheel",
    "L3": "numerics: the conformance suite passes on simulated CANN",
}
LEGEND = f"proof: {'; '.join(f'{rung} {says}' for rung, says in RUNGS.items())}; on hardware: not run"


@functools.cache
def recorded() -> dict[str, Any]:
    """``cann``: generation -> call of the capability table -> rungs; ``composed``: generation -> rungs; ``versions``."""
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
