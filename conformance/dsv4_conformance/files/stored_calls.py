"""Calls of ops as tensors and JSON, and back: what exported cases, traces and saved findings are
made of.

A call is described by ``{"op", "scalars", "operands"}``. An operand is null, or has a ``kind``:

- ``array``: ``tensor`` names it;
- ``scaled``: a quantised weight, ``data`` (codes as bytes; FP4 two a byte, the even column in the
  low nibble) and
``scale`` (E8M0 bytes), ``format``;
- ``experts``: ``count`` of them, of which only those in ``used`` are stored, stacked in this order:
  ``data``, and
``scale`` where ``format`` is not null;
- ``list``: ``parts``, each an operand.

A scalar ``layout`` is an object (``kind``, ``dim``, ``rope_dim``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.verdict.calls import LOADED, Call
from dsv4_core.contract.dtypes import Experts, Host, RowLayout, ScaledArray

if TYPE_CHECKING:
    from collections.abc import Callable

Form = dict[str, Any] | None
Read = "Callable[[str], Host]"


def used_experts(call: Call) -> list[int]:
    """Experts that a call touches, at least one (its shape stands for the others')."""
    operands = call.named()
    if call.op == "expert_linear":
        used = np.flatnonzero(np.diff(operands["offsets"]))
    else:
        local = operands["indices"].reshape(-1).astype(np.int64) - call.scalars["first_expert"]
        used = np.unique(local[(local >= 0) & (local < operands["w1"].shape[0])])
    return [int(e) for e in used] or [0]


@dataclass
class Packer:
    """Collects tensors; a weight that several calls share is stored once."""

    tensors: dict[str, Host] = field(default_factory=dict)
    _shared: dict[tuple[int, tuple[int, ...]], tuple[Any, Form]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors so far."""
        return sum(t.nbytes for t in self.tensors.values())

    def call(self, prefix: str, call: Call, *, share: bool) -> dict[str, Any]:
        """Add a call's operands under ``prefix``; give its description. ``share``: weights go under
        ``weights.`` instead, once.
        """
        operands: dict[str, Form] = {}
        for name, value in call.named().items():
            used = tuple(used_experts(call)) if isinstance(value, Experts) else ()
            if share and (name in LOADED or isinstance(value, (ScaledArray, Experts))) and value is not None:
                key = (id(value), used)
                if key not in self._shared:
                    self._shared[key] = (value, self._operand(f"weights.{len(self._shared)}", value, used))
                operands[name] = self._shared[key][1]
            else:
                operands[name] = self._operand(f"{prefix}{name}", value, used)
        scalars = {k: asdict(v) if isinstance(v, RowLayout) else v for k, v in call.scalars.items()}
        return {"op": call.op, "scalars": scalars, "operands": operands}

    def _operand(self, name: str, value: Any, used: tuple[int, ...] = ()) -> Form:
        if value is None:
            return None
        if isinstance(value, Experts):
            experts = [value[e] for e in used]
            stored = {"kind": "experts", "count": value.shape[0], "used": list(used), "format": None, "scale": None}
            if isinstance(experts[0], ScaledArray):
                stored |= {
                    "format": experts[0].format,
                    "scale": self._tensor(f"{name}.scale", np.stack([e.scale for e in experts])),
                }
                experts = [e.data for e in experts]
            return stored | {"data": self._tensor(f"{name}.data", np.stack(experts))}
        if isinstance(value, ScaledArray):
            data, scale = self._tensor(f"{name}.data", value.data), self._tensor(f"{name}.scale", value.scale)
            return {"kind": "scaled", "data": data, "scale": scale, "format": value.format}
        if isinstance(value, (list, tuple)):
            return {"kind": "list", "parts": [self._operand(f"{name}.{i}", part) for i, part in enumerate(value)]}
        return {"kind": "array", "tensor": self._tensor(name, value)}

    def _tensor(self, name: str, value: Host) -> str:
        self.tensors[name] = (
            value.view(np.uint8) if value.dtype == np.int8 else np.asarray(value)
        )  # I8 is packed FP4 here
        return name


def unpack(description: dict[str, Any], read: Callable[[str], Host], seed: int = 0) -> Call:
    """The call that a description and its tensors stand for."""

    def codes(form: dict[str, Any]) -> Host:
        data = read(form["data"])
        return data.view(np.int8) if form["format"] == "int8" else data

    def operand(form: Form) -> Any:
        if form is None:
            return None
        if form["kind"] == "list":
            return [operand(part) for part in form["parts"]]
        if form["kind"] == "scaled":
            return ScaledArray(codes(form), read(form["scale"]), form["format"])
        if form["kind"] == "experts":
            data = codes(form)
            scale = read(form["scale"]) if form["format"] else None
            stored = [
                data[i] if scale is None else ScaledArray(data[i], scale[i], form["format"]) for i in range(len(data))
            ]
            place = {e: i for i, e in enumerate(form["used"])}
            return Experts([stored[place.get(e, 0)] for e in range(form["count"])])
        return read(form["tensor"])

    scalars = {k: RowLayout(**v) if isinstance(v, dict) else v for k, v in description["scalars"].items()}
    return Call(description["op"], [operand(form) for form in description["operands"].values()], scalars, seed=seed)
