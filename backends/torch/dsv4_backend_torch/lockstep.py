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
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv4_backend_torch import memory
from dsv4_backend_torch.playback import Recording, Tape, tape_of

ELEMENTS = 1 << 18
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
    return values.item(0)


def _trips(start: np.ndarray, stop: np.ndarray, step: np.ndarray) -> int:
    """How often a loop turns, the same for all programs."""
    starts, stops, steps = (x.astype(np.int64) for x in (start, stop, step))
    return int(_one(np.maximum(-((starts - stops) // steps), 0)))


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a kernel's parameters, which have no defaults."""
    return tuple(inspect.signature(function).parameters)


def install(it: Any) -> None:
    """Make the interpreter module ``it`` run programs in lockstep."""
    tl, handle, builder = it.tl, it.TensorHandle, it.InterpreterBuilder
    one_by_one = it._interpreter
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

    def fetch(ptrs: Any, mask: Any, other: Any) -> Any:
        element = ptrs.get_element_ty()
        kind = it._get_np_dtype(element)
        return handle(memory.load(ptrs.data, mask.data, other.data, kind, one_by_one.load), element)

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *policy: Any) -> Any:
        del self, policy
        if other is None:
            element = ptrs.get_element_ty()
            other = handle(np.zeros_like(ptrs.data, dtype=it._get_np_dtype(element)), element)
        widest[0] = max(widest[0], ptrs.data[0].size)
        return fetch(*same_programs(ptrs, mask, other))

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, policy: Any) -> Any:
        del policy
        ptrs, value, mask = same_programs(ptrs, value, mask)
        widest[0] = max(widest[0], ptrs.data[0].size)
        if self.taking_back:
            undo.append((ptrs, fetch(ptrs, mask, value), mask))
        put(ptrs, value, mask)

    def put(ptrs: Any, value: Any, mask: Any) -> None:
        memory.store(ptrs.data, value.data, mask.data, one_by_one.store)

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

    reductions = {
        tl.standard._sum_combine: np.sum,
        tl.standard._elementwise_max: np.fmax.reduce,  # as nanmax, without its warning where all are NaN
        tl.standard._elementwise_min: np.fmin.reduce,
    }

    def create_reduce(_: Any, arg: Any, function: Callable[..., Any], axis: int | None, keep: bool) -> Any:
        over: Any = tuple(builtins.range(1, arg.data.ndim)) if axis is None else axis + 1
        out = function(arg.data, axis=over, keepdims=keep)
        return handle(out.astype(arg.data.dtype, copy=False), arg.dtype.scalar)

    def create_scan(_: Any, arg: Any, axis: int, reverse: bool) -> Any:
        data = np.flip(arg.data, axis + 1) if reverse else arg.data
        total = np.cumsum(data, axis=axis + 1, dtype=data.dtype)
        return handle(np.flip(total, axis + 1) if reverse else total, arg.dtype.scalar)

    builder.create_reduce, builder.create_scan = create_reduce, create_scan

    def tensor_of(result: Any, dtype: Any) -> Any:
        shape = list(result.data.shape[1:])
        return tl.core.tensor(result, tl.block_type(dtype.scalar, shape) if shape else dtype.scalar)

    def reduce(self: Any, inputs: Any) -> Any:
        function = reductions.get(self.combine_fn)
        if function is None:
            raise NotImplementedError(
                f"reduction with {self.combine_fn.__name__}: programs in lockstep know sum, max and min; add it to lockstep.py"
            )
        result = it.interpreter_builder.create_reduce(inputs[0].handle, function, self.axis, self.keep_dims)
        return tensor_of(result, inputs[0].dtype)

    def scan(self: Any, inputs: Any) -> Any:
        if self.combine_fn != tl.standard._sum_combine:
            raise NotImplementedError(
                f"scan with {self.combine_fn.__name__}: programs in lockstep know sums; add it to lockstep.py"
            )
        result = it.interpreter_builder.create_scan(inputs[0].handle, self.axis, self.reverse)
        return [tensor_of(result, inputs[0].dtype)]

    it.ReduceOps.apply_impl, it.ScanOps.apply_impl = reduce, scan

    def agreed(choose: Callable[..., Any], *handles: Any) -> Any:
        """What all programs choose, by their data; noted, since a kernel's ways depend on it."""
        outcome = choose(*(h.data for h in handles))
        recording = it.interpreter_builder.recording
        if recording is not None:
            recording.choose(choose, list(handles), outcome)
        return outcome

    builder.create_turn = lambda _, start, step, n: handle(
        (start.data + n * step.data).astype(start.data.dtype), start.dtype
    )

    def loop(*bounds: Any) -> Any:
        """``range`` of a kernel's loop. Only its length must be the same for all programs."""
        if not any(isinstance(b, tl.tensor) for b in bounds):
            return builtins.range(*bounds)
        b = it.interpreter_builder
        first, last, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
        start, stop, stride = (x.handle if isinstance(x, tl.tensor) else b.get_int64(x) for x in (first, last, step))
        trips = agreed(_trips, start, stop, stride)
        if not isinstance(first, tl.tensor) and not isinstance(step, tl.tensor):
            return builtins.range(first, first + trips * step, step)
        kind = start.dtype if isinstance(first, tl.tensor) else stride.dtype
        return (tl.tensor(b.create_turn(start, stride, n), kind) for n in builtins.range(trips))

    it.range = loop  # the interpreter gives its own names to the kernels that it rewrites

    def transposed(self: Any) -> Any:
        *front, rows, columns = builtins.range(len(self.type.shape))
        shape = [*self.type.shape[:-2], self.type.shape[-1], self.type.shape[-2]]
        turned = it.interpreter_builder.create_trans(self.handle, [*front, columns, rows])
        return tl.core.tensor(turned, tl.core.block_type(self.dtype, shape))

    tensor = tl.core.tensor
    tensor.__index__ = lambda self: int(agreed(_one, self.handle))
    tensor.__bool__ = lambda self: self.type.is_block() or bool(agreed(_one, self.handle))
    tensor.T = property(transposed)

    def take_back() -> None:
        for ptrs, old, mask in reversed(undo):
            put(ptrs, old, mask)
        undo.clear()

    def run(function: Callable[..., Any], tape: Tape, args: dict[str, Any], ids: np.ndarray) -> None:
        """Run the programs ``ids`` [3, programs] together, or kind by kind."""
        b = it.interpreter_builder
        handles = [arg.handle for arg in args.values() if isinstance(arg, tl.tensor)]
        b.grid_idx = ids
        undo.clear()
        try:
            if tape.start is not None:
                if tape.play(b, [h.data for h in handles]):
                    return
                take_back()
            b.taking_back = ids.shape[1] > 1
            b.recording = None if tape.unknown else Recording(tape, handles)
            function(**args)
            if b.recording is not None:
                b.recording.finish()
        except PartedWays as parted:
            b.recording = None
            take_back()
            for kind in np.unique(parted.kinds):
                run(function, tape, args, ids[:, parted.kinds == kind])
        finally:
            b.recording = None

    def launch(self: Any, *given: Any, **named: Any) -> None:
        b = it.interpreter_builder
        names = parameters(self.fn)
        found = dict(zip(names, given, strict=False)) | named
        args = {n: found[n] if n in self.constexprs else it._implicit_cvt(found[n]) for n in names}
        grid = self.grid(args) if callable(self.grid) else self.grid
        b.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
        ids = np.stack(np.unravel_index(np.arange(np.prod(b.grid_dim)), b.grid_dim)).astype(np.int32)
        tape, done = tape_of(self.fn, args), 0
        many = FIRST if tape.start is None else max(1, ELEMENTS // tape.widest)
        try:
            with np.errstate(all="ignore"):  # a GPU does not warn about infinities either
                while done < ids.shape[1]:
                    widest[0] = tape.widest
                    run(self.fn, tape, args, ids[:, done : done + many])
                    tape.widest = widest[0]
                    done, many = done + many, max(1, ELEMENTS // widest[0])
        except Exception as error:
            raise it.InterpreterError(repr(error)) from error

    it.GridExecutor.__call__ = launch
