"""A failing case as an ``.npz`` file: operands, what was returned and what was wanted, for a look
with NumPy alone.

``operand.NAME`` (a quantised weight as ``.data`` and ``.scale``, a list with ``[i]``), ``got.I``,
``want.I`` in float64 where it is rounded, with ``budget.I``; ``scalars``: JSON. BF16 is written as
float32, which holds it exactly.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dsv4_core.contract.dtypes import Experts, Host, ScaledArray
from dsv4_core.files.writing import whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dsv4_conformance.verdict.calls import Call
    from dsv4_conformance.verdict.judge import Verdict


def write(directory: Path, case: str, call: Call, verdict: Verdict) -> Path:
    """Write one case; gives the file, ``OP/CASE`` with ``__`` for the slash."""
    tensors = {name: tensor for n, o in call.named().items() for name, tensor in _parts(f"operand.{n}", o)}
    for i, result in enumerate(verdict.got):
        tensors[f"got.{i}"] = _plain(result)
    for i, want in enumerate(verdict.want):
        tensors[f"want.{i}"] = _plain(want.value)
        if want.budget is not None:
            tensors[f"budget.{i}"] = want.budget
    tensors["scalars"] = np.array(
        json.dumps({k: str(v) if not isinstance(v, (int, float)) else v for k, v in call.scalars.items()})
    )
    path = directory / f"{case.replace('/', '__')}.npz"
    with whole(path) as file:
        np.savez(file, **cast("Any", tensors))
    return path


def _parts(name: str, operand: Any) -> Iterator[tuple[str, Host]]:
    if isinstance(operand, Experts):
        for e in range(operand.shape[0]):
            yield from _parts(f"{name}[{e}]", operand[e])
    elif isinstance(operand, (list, tuple)):
        for i, part in enumerate(operand):
            yield from _parts(f"{name}[{i}]", part)
    elif isinstance(operand, ScaledArray):
        yield f"{name}.data", _plain(operand.data)
        yield f"{name}.scale", _plain(operand.scale)
    elif operand is not None:
        yield name, _plain(operand)


def _plain(array: Host) -> Host:
    return array.astype(np.float32) if array.dtype.kind == "V" else np.asarray(array)
