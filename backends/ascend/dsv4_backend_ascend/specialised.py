"""What a published model's decode step launches of the Triton kernels: each with the types and
constants that it is compiled for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dsv4_backend_ascend.cann.call import dry_run, watched
from dsv4_backend_ascend.capability import GENERATIONS, Generation
from dsv4_backend_ascend.launches import prepared
from dsv4_core.checkpoint.config import PRESETS

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
START = 5000  # tokens before the step


class Specialised(NamedTuple):
    """``kernel``: its module and name. ``types``: of the arguments in order, as Triton writes
    them.
    """

    kernel: str
    types: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]


def specialised(model: str, generation: Generation, tier: str) -> set[Specialised]:
    """Kernels of one decode step, counted on tensors without data."""
    found: set[Specialised] = set()

    def note(op: str, _dtype: str, operands: Any, _results: Any) -> None:
        if op.startswith("triton::"):
            arguments, constants = operands
            types = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else scalar_type(a) for a in arguments]
            found.add(Specialised(op.removeprefix("triton::"), tuple(types), tuple(constants.items())))

    with torch.no_grad(), dry_run(generation):
        _, run = prepared(PRESETS[model], generation, tier=tier, start=START, prefer="triton")
        with watched(note):
            run()
    return found


def scalar_type(value: float) -> str:
    """Of a number, as Triton writes it."""
    return "fp32" if isinstance(value, float) else "i32"


def every() -> dict[Specialised, list[str]]:
    """All of Flash and Pro on every chip and tier, each with where it is launched."""
    where: dict[Specialised, list[str]] = {}
    for model in ("flash", "pro"):
        for generation in GENERATIONS:
            for tier in ("cann", "vendor"):
                for one in specialised(model, generation, tier):
                    where.setdefault(one, []).append(f"{model} {generation} {tier}")
    return dict(sorted(where.items()))
