"""What saves launches between ops: what a kernel makes beside its result for those who read it, and
arrays that wait for their reader, whose kernel makes them on its way.

Arrays of the graph are never written again: what was made of one, or will be, stays right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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
    products: dict[tuple[bool, torch.dtype], list[Product]]
    """Products of it that are not launched yet, by whether its codes are multiplied and by the
    result's dtype.
    """

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
    made.codes, made.grids, made.order, made.products = codes or {}, grids or {}, order, {}
    return made


@dataclass(eq=False)
class Later:
    """An array's room, and ``make``, which launches what fills it: for the first who asks for it
    and does not make it himself. Each kind adds what its readers make it of.
    """

    room: Tensor
    make: Callable[[Any], None]
    waits = True

    def made(self) -> None:
        """Fill the room, unless that was done."""
        if self.waits:
            with torch.cuda.device_of(self.room):
                self.make(self)
            self.done()

    def done(self) -> None:
        """The room is filled: let go of what that took."""
        room = self.room
        vars(self).clear()
        self.room, self.waits = room, False


@dataclass(eq=False)
class Sum(Later):
    """A product's pieces [pieces, ...] in float32, which nobody has added up; None before ``begin``
    has launched it, with others of its input, and made the pieces or filled the room.
    """

    pieces: Tensor | None
    begin: Callable[[], None] | None = None

    def begun(self) -> None:
        """Launch it, unless that was done."""
        if self.begin and self.pieces is None:
            self.begin()


@dataclass(eq=False)
class Streams(Later):
    """Streams [tokens, hc, dim] after ``hc_post`` of these."""

    y: Tensor
    h: Tensor
    post: Tensor
    comb: Tensor


@dataclass(eq=False)
class Mixture(Later):
    """Sums [tokens, dim] of ``topk`` experts' rows each, where each copy's row stands, ``local``
    [1] rows of experts that are here, and the shared expert's rows.
    """

    rows: Tensor
    place: Tensor
    local: Tensor
    shared: Tensor | None
    topk: int


@dataclass(eq=False)
class Shared(Later):
    """A dense layer's rows [tokens, dim]: codes of its input, FP8 weights (gate and up, down) and
    SwiGLU's limit.
    """

    codes: Codes
    both: list[Codes]
    down: Codes
    limit: float


@dataclass(eq=False)
class Attended(Later):
    """Attention [tokens, heads, dim] in pieces of a token's list [tokens, pieces, heads, dim], each
    with its largest score and its sum of weights [tokens, pieces, heads, 2].
    """

    partial: Tensor
    sums: Tensor
    sink: Tensor


@dataclass(eq=False)
class Turned(Later):
    """Heads [tokens, heads, dim] after RoPE."""

    x: Tensor
    positions: Tensor
    freqs: Tensor
    inverse: bool


@dataclass(eq=False)
class Normed(Later):
    """Rows [tokens, heads, dim] after a norm and RoPE. ``grid``: room for them beside, ``plain`` of
    their channels on the FP8 grid; kept when they are made.
    """

    x: Tensor
    weight: Tensor | None
    positions: Tensor
    freqs: Tensor
    eps: float
    grid: Tensor | None
    plain: int

    def done(self) -> None:
        """The grid is there too."""
        grid, plain = self.grid, self.plain
        super().done()
        self.grid, self.plain = grid, plain


@dataclass(eq=False)
class Gridded(Later):
    """The grid of rows that wait."""

    of: Normed


@dataclass(eq=False)
class Rotated(Later):
    """The Hadamard rotation of rows that wait."""

    of: Normed


@dataclass(eq=False)
class Product:
    """A sum that waits, and its weights: one, or two side by side."""

    of: Sum
    weights: list[Any]


Kind = TypeVar("Kind", bound=Later)


class Waiting(Tensor):
    """An array that nobody has made yet. Kernels that know its kind (``awaited``) make it on the
    way; for torch and for every other kernel, which ask for its address, it is made.
    """

    later: Later

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the array before anything but a look at its form."""
        del types
        kwargs = kwargs or {}
        if func not in _FORM:
            settle((*args, *kwargs.values()))
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  as Tensor.__torch_function__ does
            return func(*args, **kwargs)

    def reshape(self, *shape: Any) -> Tensor:
        """The same numbers, which may still wait, or have a grid beside them."""
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
            new = Tensor.reshape(self, *shape)
        return waiting(new, self.later) if self.later.waits or isinstance(self.later, Normed) else new


_FORM = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_meta")} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_contiguous, Tensor.element_size,
}  # fmt: skip


def settle(result: Any) -> None:
    """Make what waits among arrays in lists and tuples."""
    if isinstance(result, Waiting):
        result.later.made()
    elif isinstance(result, list | tuple):
        for part in result:
            settle(part)


def waiting(array: Tensor, later: Later) -> Tensor:
    """``array``, over the room of what waits."""
    made = array.as_subclass(Waiting)
    made.later = later
    return made


def awaited(array: Tensor, kind: type[Kind], *, rows: bool = False) -> Kind | None:
    """What ``array`` waits for, if it is of that kind and shape, or (``rows``) of rows of that
    length.
    """
    if not isinstance(array, Waiting) or not isinstance(later := array.later, kind) or not later.waits:
        return None
    room, shape = later.room.shape, array.shape
    return later if (room[-1] == shape[-1] if rows else room == shape) else None


def parts(array: Tensor) -> Tensor:
    """For a kernel that adds up: the pieces [pieces, elements] of a sum that waits, else the array
    [1, elements].
    """
    if isinstance(array, Waiting) and isinstance(later := array.later, Sum) and later.waits:
        later.begun()
        if later.waits and later.pieces is not None:
            return later.pieces.reshape(later.pieces.shape[0], -1)
    return array.contiguous().reshape(1, -1)
