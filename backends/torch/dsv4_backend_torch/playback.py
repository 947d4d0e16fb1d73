"""What an interpreted kernel does, written down once and carried out again without its source.

A launch of the interpreter spends most of its time in Triton's own front end, which types and
promotes every value anew. The operations that come out, calls of the builder, are the same whenever
a kernel is launched with the same constants and types, and takes the same ways. A ``Tape`` keeps
them as NumPy functions over numbered values, from one ``choice`` (a loop's length, a branch) to the
next. A launch that chooses a way not taken before is interpreted, and adds it.

What follows from constants alone is computed once, and so is what was computed before: unrolled
loops repeat their addresses. A value that did not come out of an operation written down has an
unknown origin: such a kernel is interpreted each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONSTANT_BYTES = 1 << 15
"""A constant up to this size is kept; a larger one is made again."""
MOST_STEPS = 1 << 18
"""Of all tapes together; then they are written anew."""

VOLATILE = ("create_get_program_id", "create_get_num_programs")
STORES = ("create_store", "create_masked_store")
MEMORY = ("create_load", "create_masked_load", *STORES)
INNER = ("binary_op", "unary_op", "ternary_op", "cast_impl")
"""Methods that the builder's own operations go through: what tells the NumPy function of one."""
VALUES = ("get_null_value", "get_all_ones_value", "get_bf16")


@dataclass(eq=False)
class Step:
    """``out = function(*inputs)`` over numbered values; ``dead``: those that nobody reads after."""

    function: Callable[..., Any]
    inputs: tuple[int, ...]
    out: int
    store: bool = False
    dead: tuple[int, ...] = ()


@dataclass(eq=False)
class Stretch:
    """Steps up to a choice, or to the end."""

    steps: list[Step] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """The number of each value as operations gave them, constants among them."""
    choice: tuple[Callable[..., Hashable], tuple[int, ...]] | None = None
    after: dict[Hashable, Stretch] = field(default_factory=dict)


class Tape:
    """A kernel's ways so far for one set of constants and types."""

    def __init__(self, arguments: int) -> None:
        self.start: Stretch | None = None
        self.values: list[np.ndarray | None] = [None] * arguments
        """Constants by number; None for what a launch gives or computes."""
        self.widest = 1
        """Elements per program of the largest block that was loaded or stored."""
        self.steps = 0
        self.unknown = False
        """An operand's origin is not known: the kernel is interpreted each time."""

    def play(self, builder: Any, arguments: list[np.ndarray]) -> bool:
        """Carry the tape out on arguments; False at a choice that was never met. Only what is
        stored before a choice may have to be taken back.
        """
        values: list[Any] = list(self.values)
        values[: len(arguments)] = arguments
        read, stretch = values.__getitem__, self.start
        while stretch is not None:
            builder.taking_back = stretch.choice is not None
            for step in stretch.steps:
                values[step.out] = step.function(*map(read, step.inputs))
                for number in step.dead:
                    values[number] = None
            if stretch.choice is None:
                return True
            choose, inputs = stretch.choice
            stretch = stretch.after.get(choose(*map(read, inputs)))
        return False


_tapes: dict[Hashable, Tape] = {}


def tape_of(function: Callable[..., Any], args: dict[str, Any]) -> Tape:
    """The tape of a kernel for these constants and for these types of what else it is given."""
    given = [(a.dtype.name, a.handle.data.dtype.char) if hasattr(a, "handle") else (type(a), a) for a in args.values()]
    key = function, *given
    if key not in _tapes:
        if sum(tape.steps for tape in _tapes.values()) > MOST_STEPS:
            _tapes.clear()
        _tapes[key] = Tape(sum(hasattr(a, "handle") for a in args.values()))
    return _tapes[key]


def forget() -> None:
    """Write every tape anew: operations were replaced."""
    _tapes.clear()


class Recording:
    """One launch on its way onto a tape. Values carry their number and this recording."""

    def __init__(self, tape: Tape, handles: list[Any]) -> None:
        self.tape = tape
        self.inside = False
        self.hint: Any = None
        self.units: dict[int, tuple[int, tuple[int, ...]]] = {}
        """By a broadcast's number: what was broadcast, and its shape."""
        self.known: dict[Hashable, tuple[int, ...]] = {}
        """The results' numbers by an operation, its operands' numbers and what else it is given."""
        self.trunk: list[Stretch] = []
        """Stretches that are on the tape already."""
        self.fresh: list[Stretch] = []
        self.link: tuple[Stretch, Hashable] | None = None
        """Where the first fresh stretch hangs."""
        self.place = 0
        self.begin(tape.start)
        for number, handle in enumerate(handles):
            self.number(handle, number)

    def begin(self, known: Stretch | None) -> None:
        """Go on along a stretch of the tape, or on a fresh one."""
        self.place = 0
        if known is not None:
            self.trunk.append(known)
        else:
            self.fresh.append(Stretch())

    def number(self, handle: Any, number: int) -> None:
        handle.tape, handle.number = self, number

    def new(self, constant: np.ndarray | None) -> int:
        """The number of the next value."""
        if not self.fresh:
            self.place += 1
            return self.trunk[-1].order[self.place - 1]
        self.tape.values.append(constant)
        self.fresh[-1].order.append(len(self.tape.values) - 1)
        return len(self.tape.values) - 1

    def numbers(self, handles: list[Any]) -> tuple[int, ...]:
        """Of operands; an unknown one ends the tape."""
        if any(getattr(h, "tape", None) is not self for h in handles):
            self.tape.unknown = True
            return ()
        return tuple(h.number for h in handles)

    def constant(self, numbers: tuple[int, ...]) -> bool:
        return all(self.tape.values[n] is not None for n in numbers)

    def choose(self, function: Callable[..., Hashable], handles: list[Any], outcome: Hashable) -> None:
        """Write a choice down: ``function`` of the operands' data gave ``outcome``."""
        inputs = self.numbers(handles)
        if self.tape.unknown or self.constant(inputs):
            return
        here = self.fresh[-1] if self.fresh else self.trunk[-1]
        here.choice = function, inputs
        known = here.after.get(outcome)
        if known is None:
            fresh = Stretch()
            if self.fresh:
                here.after[outcome] = fresh
            else:
                self.link = here, outcome
            self.fresh.append(fresh)
        else:
            self.begin(known)

    def note(self, name: str, function: Callable[..., Any], handles: list[Any], out: Any, how: Hashable = None) -> None:
        """Write an operation down: ``function`` of the operands' data gives the result's. ``how``:
        what else it is given.
        """
        inputs = self.numbers(handles)
        if not self.tape.unknown:
            self.write(name, function, inputs, out, how)

    def write(self, name: str, function: Callable[..., Any], inputs: tuple[int, ...], out: Any, how: Hashable) -> None:
        results = out if isinstance(out, tuple) else (out,)
        key = name, inputs, how
        numbers = self.known.get(key) if name not in MEMORY else None
        if numbers is None:
            parts = [function] if len(results) == 1 else [_part(function, i) for i in range(len(results))]
            numbers = tuple(self.made(name, f, inputs, r) for f, r in zip(parts, results, strict=True))
            self.known[key] = numbers
        for result, number in zip(results, numbers, strict=True):
            if result is not None:
                self.number(result, number)

    def made(self, name: str, function: Callable[..., Any], inputs: tuple[int, ...], result: Any) -> int:
        """The number of an operation's new result, a constant or a step's."""
        fixed = name not in MEMORY + VOLATILE and self.constant(inputs)
        small = result is not None and result.data.nbytes <= CONSTANT_BYTES
        number = self.new(result.data if fixed and small else None)
        if self.fresh and not (fixed and small):
            self.fresh[-1].steps.append(Step(function, inputs, number, store=name in STORES))
        return number

    def broadcast(self, one: Any, out: Any) -> None:
        """Write a broadcast down, and what it is of: NumPy's own operations need none."""
        shape = out.data.shape[1:]
        self.note("create_broadcast", lambda a: spread(a, (len(a), *shape)), [one], out, shape)
        if not self.tape.unknown:
            self.units[out.number] = self.units.get(one.number, (one.number, one.data.shape[1:]))

    def elementwise(self, name: str, function: Callable[..., Any], handles: list[Any], out: Any, how: Hashable) -> None:
        """Write an operation down that NumPy broadcasts for itself."""
        numbers = self.numbers(handles)
        if self.tape.unknown:
            return
        units = [self.units.get(n, (n, h.data.shape[1:])) for n, h in zip(numbers, handles, strict=True)]
        fits = np.broadcast_shapes(*(shape for _, shape in units)) == out.data.shape[1:]
        self.write(name, function, tuple(n for n, _ in units) if fits else numbers, out, how)

    def finish(self) -> None:
        """Hang what is fresh onto the tape; say where values die."""
        if self.tape.unknown or not self.fresh:
            return
        given = {s.out for stretch in self.fresh for s in stretch.steps}
        live: set[int] = set()
        for stretch in reversed(self.fresh):
            if stretch.choice:
                live.update(stretch.choice[1])
            elif stretch is self.fresh[-1]:
                stretch.steps = list(reversed(list(_needed(stretch.steps))))
            for step in reversed(stretch.steps):
                ends = {n for n in (*step.inputs, step.out) if n in given and n not in live}
                step.dead = tuple(ends)
                live.update(step.inputs)
        for stretch in self.trunk:  # what is read on the new way may no longer die before
            for step in stretch.steps:
                step.dead = tuple(n for n in step.dead if n not in live)
        self.tape.steps += sum(len(stretch.steps) for stretch in self.fresh)
        if self.link:
            self.link[0].after[self.link[1]] = self.fresh[0]
        else:
            self.tape.start = self.fresh[0]


def spread(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``np.broadcast_to`` of as many axes, in a tenth of the time where it can be; to be read."""
    if not array.flags.c_contiguous or any(n not in (1, m) for n, m in zip(array.shape, shape, strict=True)):
        return np.broadcast_to(array, shape)
    strides = [0 if n == 1 else s for n, s in zip(array.shape, array.strides, strict=True)]
    return np.ndarray(shape, array.dtype, array, 0, strides)


def on_arrays(maker: Callable[..., Any]) -> Callable[..., Any]:
    """For an operation of the builder: ``maker``, given what it is given, makes the function of its
    operands' arrays that does the same, or None.
    """

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        function.on_arrays = maker  # type: ignore[attr-defined]
        return function

    return marked


def _part(function: Callable[..., Any], i: int) -> Callable[..., Any]:
    return lambda *arrays: function(*arrays)[i]


def _needed(steps: list[Step]) -> Iterator[Step]:
    """The last stretch's steps, last first, without those whose result nobody reads."""
    live: set[int] = set()
    for step in reversed(steps):
        if step.store or step.out in live:
            live.update(step.inputs)
            yield step


def watch(it: Any) -> None:
    """Make the builder of the interpreter module ``it`` write down what it does while
    ``recording`` is set; again after operations were replaced.
    """
    builder = it.InterpreterBuilder
    builder.recording = None
    for name in dir(builder):
        function = getattr(builder, name)
        if hasattr(function, "watched") or name.endswith("_ty"):
            continue
        if name in INNER:
            setattr(builder, name, _hinting(function))
        elif name.startswith(("create_", "get_int", "get_uint", "get_fp")) or name in VALUES:
            setattr(builder, name, _noting(it, name, function))


def _hinting(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, *args: Any) -> Any:
        out = function(self, *args)
        if self.recording is not None:
            self.recording.hint = args, out
        return out

    run.watched = True  # type: ignore[attr-defined]
    return run


def _noting(it: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    handle, maker = it.TensorHandle, getattr(function, "on_arrays", None)

    def run(self: Any, *args: Any, **named: Any) -> Any:
        now = self.recording
        if now is None or now.inside:
            return function(self, *args, **named)
        now.inside, now.hint = True, None
        try:
            out = function(self, *args, **named)
        finally:
            now.inside = False
        if any(isinstance(a, handle) for a in named.values()):
            now.tape.unknown = True  # no operation names an operand today
        operands = [a for a in args if isinstance(a, handle)]
        how = *(None if isinstance(a, handle) else str(a) for a in args), *named.items()
        if name == "create_splat":
            one = handle(operands[0].data.reshape(-1, *[1] * (out.data.ndim - 1)), out.dtype)
            now.note(name, _ones(out.data.ndim - 1), operands, one, out.data.ndim)
            now.broadcast(one, out)
        elif name == "create_broadcast":
            now.broadcast(operands[0], out)
        else:
            simple = _simple(it, name, operands, out, now.hint)
            if simple is not None and operands:
                now.elementwise(name, simple, operands, out, how)
            else:
                plain = maker(self, *args, **named) if maker else None
                now.note(name, plain or _again(it, self, function, args, named), operands, out, how)
        return out

    run.watched = True  # type: ignore[attr-defined]
    return run


def _ones(axes: int) -> Callable[..., np.ndarray]:
    shape = (-1, *[1] * axes)
    return lambda a: a.reshape(shape)


def _simple(it: Any, name: str, operands: list[Any], out: Any, hint: Any) -> Callable[..., Any] | None:
    """The NumPy function of an operation that works element by element on plain numbers."""
    if name == "create_addptr":
        width = np.uint64(max(1, operands[0].get_element_ty().primitive_bitwidth // 8))
        return lambda pointer, offset: pointer + width * offset.astype(np.uint64)
    if hint is None or hint[1] is not out:
        return None
    inner = hint[0]
    given = [a for a in inner if isinstance(a, it.TensorHandle)]
    if len(given) != len(operands) or any(a is not b for a, b in zip(given, operands, strict=True)):
        return None
    kind = out.data.dtype
    if len(inner) == 2 and len(given) == 1 and isinstance(inner[1], it.tl.dtype):  # a cast of numbers NumPy has
        if small(it, operands[0].dtype.scalar) or small(it, out.dtype.scalar):
            return None
        return (lambda a: a) if operands[0].data.dtype == kind else (lambda a: a.astype(kind))
    operation = inner[-1]
    moves = operation in (np.where, np.bitwise_and, np.bitwise_or, np.bitwise_xor)
    if not moves and any(small(it, h.dtype.scalar) for h in operands):
        return None
    if not moves and all(h.data.dtype == np.bool_ for h in operands):
        return None  # one bit, which wraps
    with np.errstate(all="ignore"):
        sample = operation(*(h.data.reshape(-1)[:1] for h in operands))
    return operation if sample.dtype == kind else None


def small(it: Any, dtype: Any) -> bool:
    """Whether the interpreter holds a floating-point type as bits."""
    return not dtype.is_ptr() and dtype in (
        it.tl.bfloat16, it.tl.float8e4nv, it.tl.float8e5, it.tl.float8e4b15, it.tl.float8e4b8, it.tl.float8e5b16,
    )  # fmt: skip


def _again(
    it: Any, builder: Any, function: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
) -> Callable[..., Any]:
    """The builder's own operation, on other data of the same types."""
    handle = it.TensorHandle
    places = [(i, a.dtype) for i, a in enumerate(args) if isinstance(a, handle)]
    fixed = [None if isinstance(a, handle) else a for a in args]

    def run(*arrays: np.ndarray) -> Any:
        given = list(fixed)
        for (i, dtype), array in zip(places, arrays, strict=True):
            given[i] = handle(array, dtype)
        out = function(builder, *given, **named)
        return tuple(o.data for o in out) if isinstance(out, tuple) else None if out is None else out.data

    return run
