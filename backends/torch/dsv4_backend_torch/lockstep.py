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
from dsv4_backend_torch.playback import Recording, Tape, on_arrays, small, spread, tape_of

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


def same_programs(*arrays: Any) -> list[Any]:
    """Arrays, or None, with an entry for each program where one has."""
    many = max(len(a) for a in arrays if a is not None)
    return [a if a is None or len(a) == many else spread(a, (many, *a.shape[1:])) for a in arrays]


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

    def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = same_programs(a, b)
        both = np.empty((*a.shape, 2), a.dtype)  # a third of np.stack's time
        both[..., 0], both[..., 1] = a, b
        return both

    def shaped(data: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        return data.reshape((data.shape[0], *shape))

    @on_arrays(lambda self, axis: lambda: self.grid_idx[axis])
    def program_id(self: Any, axis: int) -> Any:
        return handle(self.grid_idx[axis], tl.int32)

    def loading(_: Any, ptrs: Any, *rest: Any) -> Callable[..., np.ndarray]:
        del rest
        kind = it._get_np_dtype(ptrs.get_element_ty())

        def load(at: np.ndarray, mask: np.ndarray | None = None, other: np.ndarray | None = None) -> np.ndarray:
            widest[0] = max(widest[0], at[0].size)
            return memory.load(*same_programs(at, mask, other), kind, one_by_one.load)  # type: ignore[no-any-return]

        return load

    @on_arrays(loading)
    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *policy: Any) -> Any:
        del policy
        given = (h.data for h in (ptrs, mask, other) if h is not None)
        return handle(loading(self, ptrs)(*given), ptrs.get_element_ty())

    @on_arrays(loading)
    def load(self: Any, ptrs: Any, *policy: Any) -> Any:
        del policy
        return handle(loading(self, ptrs)(ptrs.data), ptrs.get_element_ty())

    def storing(self: Any, *_: Any) -> Callable[..., None]:
        def store(at: np.ndarray, value: np.ndarray, mask: np.ndarray | None = None) -> None:
            at, value, mask = same_programs(at, value, mask)
            widest[0] = max(widest[0], at[0].size)
            if self.taking_back:
                undo.append((at, memory.load(at, mask, value, value.dtype, one_by_one.load), mask))
            memory.store(at, value, mask, one_by_one.store)

        return store

    @on_arrays(storing)
    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *policy: Any) -> None:
        del policy
        storing(self)(ptrs.data, value.data, mask.data)

    @on_arrays(storing)
    def store(self: Any, ptrs: Any, value: Any, *policy: Any) -> None:
        del policy
        storing(self)(ptrs.data, value.data)

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
        data, at = same_programs(src.data, indices.data)
        return handle(np.take_along_axis(data, at, axis + 1), src.dtype.scalar)

    def no_atomics(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("atomics: programs in lockstep take back what they stored, which others have seen")

    def cat(_: Any, lhs: Any, rhs: Any) -> Any:
        return handle(np.concatenate(same_programs(lhs.data, rhs.data), axis=1), lhs.dtype.scalar)

    def reshaping(_: Any, __: Any, shape: Sequence[int], *___: Any) -> Callable[..., np.ndarray]:
        return lambda a: a.reshape((len(a), *shape))

    def turning(_: Any, __: Any, order: Sequence[int]) -> Callable[..., np.ndarray]:
        axes = 0, *(axis + 1 for axis in order)
        return lambda a: a.transpose(axes)

    def deepening(_: Any, __: Any, axis: int) -> Callable[..., np.ndarray]:
        index = (slice(None),) * (axis + 1) + (None,)
        return lambda a: a[index]

    def viewing(_: Any, __: Any, kind: Any) -> Callable[..., np.ndarray]:
        dtype = it._get_np_dtype(kind)
        return lambda a: a.view(dtype)

    def of_one_kind(maker: Callable[..., Any]) -> Callable[..., Any]:
        """An operation by its form on arrays, whose result has its operand's type."""

        @on_arrays(maker)
        def run(self: Any, first: Any, *rest: Any) -> Any:
            data = [h.data for h in (first, *rest) if isinstance(h, handle)]
            return handle(maker(self, first, *rest)(*data), first.dtype.scalar)

        return run

    @on_arrays(viewing)
    def bitcast(self: Any, src: Any, kind: Any) -> Any:
        return handle(viewing(self, src, kind)(src.data), kind.scalar)

    for name, function in {
        "create_get_program_id": program_id,
        "create_load": load,
        "create_masked_load": masked_load,
        "create_store": store,
        "create_masked_store": masked_store,
        "create_histogram": histogram,
        "create_gather": gather,
        "create_atomic_rmw": no_atomics,
        "create_atomic_cas": no_atomics,
        "create_make_range": lambda _, __, start, stop: handle(np.arange(start, stop, dtype=np.int32)[None], tl.int32),
        "create_reshape": of_one_kind(reshaping),
        "create_trans": of_one_kind(turning),
        "create_expand_dims": of_one_kind(deepening),
        "create_bitcast": bitcast,
        "create_broadcast": lambda _, arg, shape: handle(spread(arg.data, (len(arg.data), *shape)), arg.dtype.scalar),
        "create_splat": lambda _, kind, arg: handle(
            spread(shaped(arg.data, [1] * len(kind.shape)), (len(arg.data), *kind.shape)), arg.dtype.scalar
        ),
        "create_unsplat": lambda _, arg: handle(shaped(arg.data, ()), arg.dtype.scalar),
        "create_cat": cat,
        "create_join": of_one_kind(lambda *_: joined),
    }.items():
        setattr(builder, name, function)

    reductions = {
        tl.standard._sum_combine: np.add.reduce,
        tl.standard._elementwise_max: np.fmax.reduce,  # as nanmax, without its warning where all are NaN
        tl.standard._elementwise_min: np.fmin.reduce,
    }

    def reducing(
        _: Any, arg: Any, function: Callable[..., Any], axis: int | None, keep: bool
    ) -> Callable[..., np.ndarray] | None:
        if small(it, arg.dtype.scalar):
            return None  # bits, which are widened first
        over: Any = tuple(builtins.range(1, arg.data.ndim)) if axis is None else axis + 1
        kind = arg.data.dtype
        return lambda a: function(a, axis=over, keepdims=keep).astype(kind, copy=False)

    create_reduce = of_one_kind(reducing)

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
        for at, old, mask in reversed(undo):
            memory.store(at, old, mask, one_by_one.store)
        undo.clear()

    def run(function: Callable[..., Any], tape: Tape, args: dict[str, Any], ids: np.ndarray) -> None:
        """Run the programs ``ids`` [3, programs] together, or kind by kind."""
        b = it.interpreter_builder
        handles = [arg.handle for arg in args.values() if isinstance(arg, tl.tensor)]
        b.grid_idx = [axis[:1] if (axis == axis[0]).all() else axis for axis in ids]
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

    pointers: dict[Any, Any] = {}

    def operand(value: Any) -> Any:
        """What a kernel is given, as its value: the interpreter's own finds a type's name and the
        type of that name each time.
        """
        if type(value) is int and -(1 << 31) <= value < 1 << 31:
            return tl.core.tensor(handle(np.array([value], np.int32), tl.int32), tl.int32)
        dtype = getattr(value, "dtype", None)
        if dtype is None or not hasattr(value, "data_ptr"):
            return it._implicit_cvt(value)
        if dtype not in pointers:
            pointers[dtype] = it._implicit_cvt(value).dtype
        return tl.core.tensor(handle(np.array([value.data_ptr()], np.uint64), pointers[dtype]), pointers[dtype])

    begin, known = it.GridExecutor.__init__, dict[Any, dict[str, Any]]()

    def executor(self: Any, function: Any, names: Sequence[str], grid: Any, *rest: Any) -> None:
        """A kernel and its grid. Which parameters are constants is asked once."""
        if function not in known:
            begin(self, function, names, grid, *rest)
            known[function] = dict(vars(self))
        vars(self).update(known[function], grid=grid)

    def launch(self: Any, *given: Any, **named: Any) -> None:
        b = it.interpreter_builder
        names = parameters(self.fn)
        found = dict(zip(names, given, strict=False)) | named
        args = {n: found[n] if n in self.constexprs else operand(found[n]) for n in names}
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

    it.GridExecutor.__init__, it.GridExecutor.__call__ = executor, launch
