"""The programs of a grid in lockstep: Triton's interpreter runs them one after another, at tens of
microseconds for every operation of each.

Here an operation is carried out once for many programs. A value has one axis in front of those that
the kernel's source sees: one entry per program, or a single one where all agree. Where programs
part ways (a loop's length, a branch), what they stored is taken back, and each kind starts again on
its own. Loads and stores of a program keep their order; between programs a GPU promises none
either.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ELEMENTS = 1 << 20
"""Values that an operation works on at once, about: as many programs run together as their largest
block allows.
"""
FIRST = 16
"""Programs of a launch that run together before its largest block is known."""


class PartedWays(BaseException):  # no Exception: the interpreter would wrap it
    """Programs of a batch want different control flow; ``kinds``: which program wants which, as
    integers.
    """

    def __init__(self, kinds: np.ndarray) -> None:
        super().__init__()
        self.kinds = kinds


def _one(values: np.ndarray) -> Any:
    """What all programs agree on; raise ``PartedWays`` if they do not."""
    kinds = np.unique(values.reshape(-1), return_inverse=True)[1] if (values != values.flat[0]).any() else values[:0]
    if kinds.any():
        raise PartedWays(kinds)
    return values.flat[0]


def install(it: Any) -> None:
    """Make the interpreter module ``it`` run programs in lockstep."""
    tl, handle, builder = it.tl, it.TensorHandle, it.InterpreterBuilder
    plain = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store")}
    undo: list[tuple[Any, Any, Any]] = []
    widest: list[int] = [1]  # elements per program of the largest block seen in this launch

    def shaped(data: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return data.reshape((data.shape[0], *shape))

    def broadcast(data: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return np.broadcast_to(data, (data.shape[0], *shape))

    def same_programs(*handles: Any) -> list[Any]:
        """Handles of equally many entries."""
        many = max(h.data.shape[0] for h in handles)
        return [
            h if h.data.shape[0] == many else handle(np.broadcast_to(h.data, (many, *h.data.shape[1:])), h.dtype)
            for h in handles
        ]

    def program_id(self: Any, axis: int) -> Any:
        ids = self.grid_idx[axis]
        return handle(ids[:1] if (ids == ids[0]).all() else ids, tl.int32)

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *policy: Any) -> Any:
        if other is None:
            element = ptrs.get_element_ty()
            other = handle(np.zeros_like(ptrs.data, dtype=it._get_np_dtype(element)), element)
        widest[0] = max(widest[0], ptrs.data[0].size)
        return plain["create_masked_load"](self, *same_programs(ptrs, mask, other), *policy)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, policy: Any) -> Any:
        ptrs, value, mask = same_programs(ptrs, value, mask)
        widest[0] = max(widest[0], ptrs.data[0].size)
        if self.together > 1:
            undo.append((ptrs, plain["create_masked_load"](self, ptrs, mask, value, None, False), mask))
        return plain["create_masked_store"](self, ptrs, value, mask, policy)

    def histogram(self: Any, data: Any, bins: int, mask: Any) -> Any:
        values = data.data.astype(np.int64)
        counted = (values >= 0) & (values < bins)
        if mask is not None:
            counted = counted & mask.data
        values = np.broadcast_to(values, counted.shape)
        many = len(values)
        flat = np.where(counted, values + bins * np.arange(many)[:, None], bins * many)
        return handle(
            np.bincount(flat.reshape(-1), minlength=bins * many + 1)[:-1].reshape(many, bins).astype(np.int32), tl.int32
        )

    def gather(self: Any, src: Any, indices: Any, axis: int) -> Any:
        src, indices = same_programs(src, indices)
        return handle(np.take_along_axis(src.data, indices.data, axis + 1), src.dtype.scalar)

    def no_atomics(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("atomics: programs in lockstep take back what they stored, which others have seen")

    def joined(lhs: Any, rhs: Any, join: Callable[..., np.ndarray], axis: int) -> Any:
        return handle(join([h.data for h in same_programs(lhs, rhs)], axis=axis), lhs.dtype.scalar)

    for name, function in {
        "create_get_program_id": program_id,
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_histogram": histogram,
        "create_gather": gather,
        "create_atomic_rmw": no_atomics,
        "create_atomic_cas": no_atomics,
        "create_make_range": lambda _, __, start, stop: handle(np.arange(start, stop, dtype=np.int32)[None], tl.int32),
        "create_reshape": lambda _, arg, shape, __: handle(shaped(arg.data, shape), arg.dtype.scalar),
        "create_trans": lambda _, arg, perm: handle(
            np.transpose(arg.data, (0, *(p + 1 for p in perm))), arg.dtype.scalar
        ),
        "create_expand_dims": lambda _, arg, axis: handle(np.expand_dims(arg.data, axis + 1), arg.dtype.scalar),
        "create_broadcast": lambda _, arg, shape: handle(broadcast(arg.data, shape), arg.dtype.scalar),
        "create_splat": lambda _, kind, arg: handle(
            broadcast(shaped(arg.data, [1] * len(kind.shape)), kind.shape), arg.dtype.scalar
        ),
        "create_unsplat": lambda _, arg: handle(shaped(arg.data, ()), arg.dtype.scalar),
        "create_cat": lambda _, lhs, rhs: joined(lhs, rhs, np.concatenate, 1),
        "create_join": lambda _, lhs, rhs: joined(lhs, rhs, np.stack, -1),
    }.items():
        setattr(builder, name, function)

    def reduced(data: np.ndarray, axis: int | None) -> Any:
        return tuple(builtins.range(1, data.ndim)) if axis is None else axis + 1

    def to_tensor(self: Any, values: Any, dtype: Any) -> Any:
        data = np.asarray(values).astype(it._get_np_dtype(dtype), copy=False)
        return tl.core.tensor(
            handle(data, dtype.scalar),
            tl.block_type(dtype.scalar, list(data.shape[1:])) if data.ndim > 1 else dtype.scalar,
        )

    reductions = {
        tl.standard._sum_combine: np.sum,
        tl.standard._elementwise_max: np.fmax.reduce,  # as nanmax, without its warning where all are NaN
        tl.standard._elementwise_min: np.fmin.reduce,
    }

    def reduce(self: Any, inputs: Any) -> Any:
        data = inputs[0].handle.data
        function = reductions.get(self.combine_fn)
        if function is None:
            raise NotImplementedError(
                f"reduction with {self.combine_fn.__name__}: programs in lockstep know sum, max and min; add it to lockstep.py"
            )
        return self.to_tensor(function(data, axis=reduced(data, self.axis), keepdims=self.keep_dims), inputs[0].dtype)

    def scan(self: Any, inputs: Any) -> Any:
        data, axis = inputs[0].handle.data, self.axis + 1
        if self.combine_fn != tl.standard._sum_combine:
            raise NotImplementedError(
                f"scan with {self.combine_fn.__name__}: programs in lockstep know sums; add it to lockstep.py"
            )
        data = np.flip(data, axis) if self.reverse else data
        total = np.cumsum(data, axis=axis)
        return [self.to_tensor(np.flip(total, axis) if self.reverse else total, inputs[0].dtype)]

    it.ReduceScanOpInterface.to_tensor = to_tensor
    it.ReduceOps.apply_impl, it.ScanOps.apply_impl = reduce, scan

    def loop(*bounds: Any) -> Any:
        """``range`` of a kernel's loop. Only its length must be the same for all programs."""
        if not any(isinstance(b, tl.tensor) for b in bounds):
            return builtins.range(*bounds)
        first, last, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
        starts, stops, steps = (
            b.handle.data.astype(np.int64) if isinstance(b, tl.tensor) else np.array([b]) for b in (first, last, step)
        )
        trips = int(_one(np.maximum(-((starts - stops) // steps), 0)))
        if len(starts) == len(steps) == 1:
            return builtins.range(int(starts[0]), int(starts[0]) + trips * int(steps[0]), int(steps[0]))
        kind = first.handle.dtype
        return (
            tl.tensor(handle((starts + n * steps).astype(it._get_np_dtype(kind)), kind), kind)
            for n in builtins.range(trips)
        )

    it.range = loop  # the interpreter gives its own names to the kernels that it rewrites

    def transposed(self: Any) -> Any:
        shape = [*self.type.shape[:-2], self.type.shape[-1], self.type.shape[-2]]
        return tl.core.tensor(
            handle(np.swapaxes(self.handle.data, -1, -2), self.handle.dtype), tl.core.block_type(self.dtype, shape)
        )

    tensor = tl.core.tensor
    tensor.__index__ = lambda self: int(_one(self.handle.data))
    tensor.__bool__ = lambda self: self.type.is_block() or bool(_one(self.handle.data))
    tensor.T = property(transposed)

    def run(function: Callable[..., Any], args: dict[str, Any], ids: np.ndarray) -> None:
        """Run the programs ``ids`` [3, programs] together, or kind by kind."""
        b = it.interpreter_builder
        b.grid_idx, b.together = ids, ids.shape[1]
        undo.clear()
        try:
            function(**args)
        except PartedWays as parted:
            for ptrs, old, mask in reversed(undo):
                plain["create_masked_store"](b, ptrs, old, mask, None)
            for kind in np.unique(parted.kinds):
                run(function, args, ids[:, parted.kinds == kind])

    def launch(self: Any, *given: Any, **named: Any) -> None:
        b = it.interpreter_builder
        names = inspect.signature(self.fn).parameters
        args = inspect.getcallargs(self.fn, *given, **{k: v for k, v in named.items() if k in names})
        args = {name: arg if name in self.constexprs else it._implicit_cvt(arg) for name, arg in args.items()}
        grid = self.grid(args) if callable(self.grid) else self.grid
        b.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
        ids = np.stack(np.unravel_index(np.arange(np.prod(b.grid_dim)), b.grid_dim)).astype(np.int32)
        done, many, widest[0] = 0, FIRST, 1
        try:
            while done < ids.shape[1]:
                run(self.fn, args, ids[:, done : done + many])
                done, many = done + many, max(1, ELEMENTS // widest[0])
        except Exception as error:
            raise it.InterpreterError(repr(error)) from error

    it.GridExecutor.__call__ = launch
