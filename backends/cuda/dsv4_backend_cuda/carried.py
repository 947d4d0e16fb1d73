"""What a kernel makes beside its result for those who read it, so that they need no launch for it.

Arrays of the graph are never written again: what was made of one stays right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Codes = tuple[Tensor, Tensor]
"""E4M3 codes and scale bytes of rows."""
Grid = tuple[str, int, int]
"""Format, channels a scale and channels that are rounded, as ``act_qdq`` has them."""


class Carrying(Tensor):
    """An array and what was made of it; to torch an array like any other."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001  as torch's own Parameter has it
    codes: dict[bool, Codes]
    """FP8 codes of its rows, by whether they are in FP4 weights' order."""
    grids: dict[Grid, Tensor]
    """Its rows rounded."""
    order: tuple[Tensor, Tensor, Tensor] | None
    """Of an expert a copy: what ``moe.sort`` gives where all experts are here."""

    def reshape(self, *shape: Any) -> Tensor:
        """Rows of the same length stay the same rows."""
        new = super().reshape(*shape)
        if not self.grids or new.shape[-1] != self.shape[-1]:
            return new
        return carrying(new, grids={grid: rows.reshape(new.shape) for grid, rows in self.grids.items()})


def carrying(
    array: Tensor,
    *,
    codes: dict[bool, Codes] | None = None,
    grids: dict[Grid, Tensor] | None = None,
    order: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """``array``, carrying these."""
    made = array.as_subclass(Carrying)
    made.codes, made.grids, made.order = codes or {}, grids or {}, order
    return made


class Sum:
    """A product's pieces [pieces, ...] in float32 and the room for their sum, made when asked
    for.
    """

    def __init__(self, pieces: Tensor, room: Tensor, add: Callable[[Tensor, Tensor], None]) -> None:
        self.pieces, self.room, self.add = pieces, room, add
        self.waits = True

    def made(self) -> None:
        """Add the pieces up, unless that was done."""
        if self.waits:
            self.waits = False
            self.add(self.pieces, self.room)


class InPieces(Tensor):
    """A product that nobody has added up yet. Kernels that read ``parts`` add it up on the way; for
    torch and for every other kernel, which ask for its address, it is the sum.
    """

    awaited: Sum

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the sum before anything but a look at its form."""
        del types
        kwargs = kwargs or {}
        if func not in _FORM:
            _make((*args, *kwargs.values()))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  as Tensor.__torch_function__ does
            return func(*args, **kwargs)

    def reshape(self, *shape: Any) -> Tensor:
        """The same numbers, which may still wait."""
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            new = Tensor.reshape(self, *shape)
        return waiting(new, self.awaited) if self.awaited.waits else new


_FORM = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_meta")} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_contiguous, Tensor.element_size,
}  # fmt: skip


def _make(args: Sequence[Any]) -> None:
    for arg in args:
        if isinstance(arg, InPieces):
            arg.awaited.made()
        elif isinstance(arg, list | tuple):
            _make(arg)


def waiting(array: Tensor, of: Sum) -> Tensor:
    """``array``, over the room of a sum that waits."""
    made = array.as_subclass(InPieces)
    made.awaited = of
    return made


def parts(array: Tensor) -> Tensor:
    """For a kernel that adds up: the pieces [pieces, elements] of a sum that waits, else the array
    [1, elements].
    """
    if isinstance(array, InPieces) and array.awaited.waits:
        return array.awaited.pieces.reshape(array.awaited.pieces.shape[0], -1)
    return array.contiguous().reshape(1, -1)
