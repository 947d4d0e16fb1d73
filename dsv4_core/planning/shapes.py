"""The graph on shapes alone: every op from its declaration, no data. Explaining a backend and
planning rest on this.

``ShapeBackend`` carries out any contract generically: operands are held to the declared axes and
dtypes, results have the declared ones. ``ShapeSource`` gives a model's weights as shapes from its
configuration, without a file. ``trace_calls`` runs the real graph on both and records who was
called with what.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from dsv4_core.checkpoint.layout import QUANTISED, tensor_specs
from dsv4_core.contract.backend import Backend
from dsv4_core.contract.dtypes import Experts, Format, Host, ScaledArray, dtype_name, numpy_dtype
from dsv4_core.contract.ops import OPS
from dsv4_core.contract.spec import Array, Numerics, Operand, OpSpec
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.dspark import block_step
from dsv4_core.graph.model import Block, Model
from dsv4_core.graph.step import Fed, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import CodeType

    from dsv4_core.checkpoint.config import ModelConfig

STORED = {"BF16": "bfloat16", "F32": "float32", "F8_E4M3": "uint8", "F8_E8M0": "uint8", "I8": "uint8", "I64": "int64"}
"""dtype names of tensors as the checkpoint's loader gives them."""


class ShapeError(ValueError):
    """An operand that contradicts its contract: names the op, the operand, the axis, and both
    sizes.
    """


class Storage:
    """Memory that arrays share: its bytes and purpose. ``freed`` is called when the last array over
    it is gone.
    """

    __slots__ = ("freed", "kind", "nbytes")

    def __init__(self, kind: str, nbytes: int, freed: Callable[[Storage], None] | None = None) -> None:
        self.kind, self.nbytes, self.freed = kind, nbytes, freed

    def __del__(self) -> None:
        if self.freed:
            self.freed(self)


class ShapeArray:
    """An array without data: shape, dtype name, and the storage that views share."""

    __slots__ = ("dtype", "shape", "storage")

    def __init__(
        self, shape: Iterable[int], dtype: str, kind: str = "activation", storage: Storage | None = None
    ) -> None:
        self.shape, self.dtype = tuple(int(n) for n in shape), dtype
        self.storage = storage or Storage(kind, self.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def reshape(self, shape: tuple[int, ...], /) -> ShapeArray:
        """View with another shape of as many elements; raise ``ShapeError`` otherwise."""
        if math.prod(shape) != math.prod(self.shape):
            have, want = math.prod(self.shape), math.prod(shape)
            raise ShapeError(f"reshape: {list(self.shape)} has {have} elements, {list(shape)} {want}")
        return ShapeArray(shape, self.dtype, storage=self.storage)

    def __getitem__(self, key: Any, /) -> ShapeArray:
        """View by integers and slices; raise ``ShapeError`` for an integer outside its axis."""
        keys = key if isinstance(key, tuple) else (key,)
        shape: list[int] = []
        for axis, k in enumerate(keys):
            n = self.shape[axis]
            if isinstance(k, slice):
                shape.append(len(range(*k.indices(n))))
            elif not -n <= k < n:
                raise ShapeError(f"index {k} is outside axis {axis} of {list(self.shape)}")
        return ShapeArray((*shape, *self.shape[len(keys) :]), self.dtype, storage=self.storage)

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Axis(NamedTuple):
    """A word of a contract's axes and the names that it needs; ``code`` None: a name alone (as
    ``in``).
    """

    word: str
    names: frozenset[str]
    code: CodeType | None

    def size(self, sizes: Mapping[str, Any]) -> int:
        """Give the size that the names' sizes make."""
        return int(sizes[self.word] if self.code is None else eval(self.code, {}, sizes))  # noqa: S307  the contracts' own words


class Axes(NamedTuple):
    """The axes of an operand or result; ``optional``: it may be None."""

    entries: tuple[Axis, ...]
    optional: bool


@functools.cache
def parse_axes(text: str) -> Axes:
    """Parse the axes of a contract, e.g. ``"tokens hc*dim ?"``."""
    words = text.split()
    optional = bool(words) and words[-1] == "?"
    entries = []
    for word in words[: len(words) - optional]:
        if word.isidentifier():
            entries.append(Axis(word, frozenset((word,)), None))
            continue
        tree = ast.parse(word, mode="eval")
        names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        entries.append(Axis(word, names, compile(tree, "axes", "eval")))
    return Axes(tuple(entries), optional)


def operand(value: Any) -> Any:
    """Give the ``Operand`` of an array, a tuple of them for several, and any scalar as it is."""
    if isinstance(value, list | tuple):
        return tuple(operand(v) for v in value)
    return Operand(dtype_name(value), tuple(value.shape)) if hasattr(value, "shape") else value


def bind_axes(spec: OpSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Hold operands to their declared axes; give all sizes by name, scalars among them. Raise
    ``ShapeError``.
    """
    sizes: dict[str, Any] = {name: values[name] for name in spec.scalars}
    said_by = dict.fromkeys(sizes, "the scalar")
    waiting: list[tuple[str, int, Axis, int]] = []
    for name, text in spec.axes.items():
        value, axes = values[name], parse_axes(text)
        if value is None:
            if not axes.optional:
                raise ShapeError(f"{spec.name}: operand {name} is None; its axes are [{text}]")
            continue
        if len(value.shape) != len(axes.entries):
            raise ShapeError(f"{spec.name}: operand {name} has shape {list(value.shape)}; its axes are [{text}]")
        for i, (axis, size) in enumerate(zip(axes.entries, value.shape, strict=True)):
            if axis.code is None and axis.word not in sizes:
                sizes[axis.word], said_by[axis.word] = size, name
            else:
                waiting.append((name, i, axis, size))
    for name, i, axis, size in waiting:
        unknown = axis.names - sizes.keys()
        where = f"{spec.name}: operand {name}, axis {i} ({axis.word}) is {size}"
        if len(unknown) == 1 and not solve(axis.word, sizes, next(iter(unknown)), size):
            raise ShapeError(f"{where}, which no {next(iter(unknown))} makes")
        if not axis.names - sizes.keys() and (stated := axis.size(sizes)) != size:
            said = ", ".join(f"{n} = {sizes[n]} by {said_by.get(n, name)}" for n in sorted(axis.names) if n in said_by)
            raise ShapeError(f"{where} and must be {stated} ({said or 'fixed'})")
    return sizes


def solve(word: str, sizes: dict[str, Any], unknown: str, size: int) -> bool:
    """Bind the one unknown of a product (``batch*rows``) or sum (``experts+1``); False where no
    whole number fits.
    """
    if "+" in word:
        sizes[unknown] = size - int(word.partition("+")[2])
        return bool(sizes[unknown] >= 0)
    known = math.prod(sizes[f] for f in word.split("*") if f != unknown)
    sizes[unknown] = size // known if known else 0
    return bool(known * sizes[unknown] == size)


class ShapeBackend(Backend):
    """Every op on shapes.

    ``like``: run as that backend: the fused ops that it implements are taken whole, the others fall
    to their defaults.
    """

    name = "shapes"

    def __init__(self, *, numerics: Numerics = "native", like: type[Backend] | Backend | None = None) -> None:
        super().__init__(numerics=numerics)
        self.like = like
        self.packs_rows = like is None or like.packs_rows
        self.layer: int | None = None  # whose ops are running; set by LayeredModel
        self.notes: list[Any] = []  # what a subclass keeps of every op: named tuples with a field ``layer``

    @property
    def alive(self) -> Hashable:
        """What a subclass's notes depend on beside operands: of a backend that counts memory, what
        is alive.
        """
        return None

    def round_up(self, n: int) -> int:
        """Give ``n``: what a step needs, not what a backend makes of it."""
        return n

    def run(self, spec: OpSpec, values: dict[str, Any]) -> Any:
        """Carry out one op: check its operands, make its results."""
        self.check_dtypes(spec, values)
        sizes = {} if spec.name == "concat" else bind_axes(spec, values)
        return self.results(spec, values, sizes)

    def results(self, spec: OpSpec, values: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        """Make arrays of the declared result shapes and dtypes: one, a tuple, or None."""
        if spec.name == "concat":
            return self.joined(values["parts"], values["axis"])
        if spec.mutates:  # in place: nothing new
            given = tuple(values[name] for name in spec.mutates)
            return given if len(given) > 1 else given[0]
        made = []
        for i, text in enumerate(spec.returns):
            if text:
                shape = [axis.size(sizes) for axis in parse_axes(text).entries]
                kind = spec.dtypes.get(f"return.{i}", spec.dtypes.get("return", ""))
                made.append(self.array(shape, self.result_dtype(kind, values)))
        return tuple(made) if len(spec.returns) > 1 else made[0] if made else None

    def array(self, shape: Sequence[int], dtype: str) -> ShapeArray:
        """Make a result."""
        return ShapeArray(shape, dtype)

    def result_dtype(self, kind: str, values: Mapping[str, Any]) -> str:
        """Give the dtype name of a result that is declared as ``kind``."""
        if kind == "row":  # unpacked rows are activations; plain ones stay what the cache stores
            return dtype_name(values["cache"]) if values["layout"].kind == "plain" else self.activation_dtype
        if kind == "out_dtype":
            return str(values["out_dtype"])
        return {"act": self.activation_dtype, "wide": self.wide_dtype}.get(kind, kind)

    def check_dtypes(self, spec: OpSpec, values: Mapping[str, Any]) -> None:
        """Hold operands to the declared dtypes; ``weight``, ``cache`` and ``any`` leave the choice
        to the data.
        """
        for name, kind in spec.dtypes.items():
            if kind not in {"weight", "cache", "any"} and (value := values.get(name)) is not None:
                want = self.result_dtype(kind, values)
                if dtype_name(value) != want:
                    found = f"operand {name} has dtype {dtype_name(value)}"
                    raise ShapeError(f"{spec.name}: {found}; the contract says {kind}, here {want}")

    def joined(self, parts: Sequence[Any], axis: int) -> ShapeArray:
        """``concat``: all axes but one agree, and so do the dtypes."""
        first = parts[0]
        for i, part in enumerate(parts):
            kept, wanted = ([n for a, n in enumerate(p.shape) if a != axis] for p in (part, first))
            if kept != wanted or part.dtype != first.dtype:
                raise ShapeError(
                    f"concat: part {i} is {part!r}, part 0 {first!r}; they may differ in axis {axis} alone"
                )
        if len(parts) == 1:
            return ShapeArray(first.shape, first.dtype, storage=first.storage)
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.array(shape, first.dtype)

    def from_numpy(self, array: Host) -> ShapeArray:
        """Keep shape and dtype."""
        return array if isinstance(array, ShapeArray) else ShapeArray(array.shape, dtype_name(array), "address")

    def to_numpy(self, array: Array) -> Host:
        """Refuse: there is no data."""
        raise ShapeError(f"to_numpy: {array!r} has no data; a graph run on shapes may not read an array on the host")

    def zeros(self, shape: tuple[int, ...], dtype: str) -> ShapeArray:
        """Allocate: the cache is all that the graph allocates."""
        return ShapeArray(shape, dtype, "cache")


def _shape_op(spec: OpSpec) -> Callable[..., Any]:
    default = getattr(Backend, spec.name)

    def run(self: ShapeBackend, *args: Any, **scalars: Any) -> Any:
        if spec.fused and self.like is not None and not self.like.implements(spec.name):
            return default(self, *args, **scalars)
        values = dict(zip(spec.arrays, args, strict=False))
        values.update(scalars)
        if len(values) != len(spec.arrays) + len(spec.scalars):
            raise TypeError(f"{spec.name}{spec.signature}: called with {', '.join(values)}")
        return self.run(spec, values)

    run.__name__, run.__doc__ = spec.name, spec.doc
    vars(run)["__signature__"] = spec.signature  # what inspect.signature looks for
    return run


for _spec in OPS.values():
    setattr(ShapeBackend, _spec.name, _shape_op(_spec))


class _Repeated(Sequence[Any]):
    """``count`` equal items."""

    def __init__(self, item: Any, count: int) -> None:
        self.item, self.length = item, count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.item


class ShapeSource:
    """A model's weights as shapes, from its configuration alone; ``WeightSource`` as a checkpoint
    is one.
    """

    def __init__(self, config: ModelConfig, expert_format: Format = "e2m1") -> None:
        self.config = config
        self.specs = tensor_specs(config, expert_format, experts=1)  # the others are like the first

    def array(self, name: str) -> Any:
        """Give a tensor by its full name."""
        spec = self.specs[name]
        return ShapeArray(spec.shape, STORED[spec.dtype], spec.kind)

    def weight(self, name: str) -> Any:
        """Give ``name.weight``, joined with its scale if it has one."""
        fmt = QUANTISED.get(self.specs[f"{name}.weight"].dtype)
        data = self.array(f"{name}.weight")
        if fmt == "e2m1" and self.specs[f"{name}.scale"].dtype == "F32":
            fmt = "int8"
        return data if fmt is None else ScaledArray(data, self.array(f"{name}.scale"), fmt)

    def experts(self, prefix: str, projection: str) -> Experts:
        """Give one projection of every routed expert."""
        count = self.config.experts_of(prefix.removesuffix(".ffn"))
        return Experts(_Repeated(self.weight(f"{prefix}.experts.0.{projection}"), count))


class Call(NamedTuple):
    """One op as the graph called it: operands as ``Operand`` or None, scalars by value; ``layer``
    None outside.
    """

    op: str
    operands: dict[str, Any]
    layer: int | None


class LayeredModel(Model):
    """The graph, which tells its backend which layer is running.

    Layers of equal shapes do equal work in one step, so one of them is run and its notes are
    repeated for the others.
    """

    backend: ShapeBackend

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kinds: dict[int, Hashable] = {}
        self._step: Fed | None = None
        self._seen: dict[Hashable, list[Any]] = {}

    def block(self, block: Block, h: Array, step: Fed) -> Array:
        """Run one layer with ``backend.layer`` set to its index, or repeat the notes of one that is
        just like it.
        """
        be = self.backend
        if step is not self._step:
            self._step, self._seen = step, {}
        if block.index not in self._kinds:
            self._kinds[block.index] = shapes_in(block)
        kind = self._kinds[block.index], shapes_in(step.cache.layers[block.index]), shapes_in(h), be.alive
        if kind in self._seen:
            be.notes += [note._replace(layer=block.index) for note in self._seen[kind]]
            return h  # what comes out has the shape of what went in
        be.layer, before = block.index, len(be.notes)
        try:
            out = super().block(block, h, step)
        finally:
            be.layer = None
        if shapes_in(out) == shapes_in(h):
            self._seen[kind] = be.notes[before:]
        return out


def shapes_in(value: Any) -> Hashable:
    """Give the shapes, dtypes and kinds of all arrays in a weight, a layer or its cache, and all
    numbers beside them.

    A layer's own number is left out: it says where the layer stands, not what it does.
    """
    if isinstance(value, ShapeArray):
        return value.shape, value.dtype, value.storage.kind
    if isinstance(value, Experts):
        return value.shape, value.dtype, shapes_in(value[0])
    if dataclasses.is_dataclass(value):
        return tuple(shapes_in(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "index")
    if isinstance(value, list | tuple):
        return tuple(map(shapes_in, value))
    return cast("Hashable", value)


class Recorder(ShapeBackend):
    """Notes every call."""

    def __init__(self, *, numerics: Numerics = "native", like: type[Backend] | Backend | None = None) -> None:
        super().__init__(numerics=numerics, like=like)
        self.notes: list[Call] = []

    def run(self, spec: OpSpec, values: dict[str, Any]) -> Any:
        """Note it, then carry it out."""
        self.notes.append(Call(spec.name, {name: operand(value) for name, value in values.items()}, self.layer))
        return super().run(spec, values)


def trace_calls(
    config: ModelConfig,
    backend: type[Backend] | Backend,
    *,
    numerics: Numerics | None = None,
    batch: int = 1,
    seq: int = 1,
    start: int = 0,
    mtp: bool = False,
    expert_format: Format = "e2m1",
) -> list[Call]:
    """Record the calls that ``backend`` (or its class) would get in one step, in its numerics where
    none are named.

    The step is ``seq`` tokens of each of ``batch`` sequences that hold ``start`` tokens; ``mtp``:
    what drafts, too. Logits and sampling are of each sequence's last token. Raises ``ShapeError``
    where operands contradict their contract.
    """
    recorder = Recorder(numerics=numerics or backend.numerics, like=backend)
    run_step(LayeredModel(ShapeSource(config, expert_format), recorder), batch=batch, seq=seq, start=start, mtp=mtp)
    return recorder.notes


def run_step(model: Model, *, batch: int, seq: int, start: int, mtp: bool = False, cache: Cache | None = None) -> None:
    """Run one step of the graph on shapes, to the sampled ids; makes a cache that just holds it
    where none is given.

    ``mtp``: what drafts, too: the MTP block, or DSpark's context rows and one block of drafts.
    """
    be = model.backend
    cache = cache or Cache(be, model.config, batch, start + seq)
    cache.lengths[:] = cache.furthest[:] = start
    step = Step(cache, np.zeros((batch, seq), np.int32))
    taps: list[Array] = []
    h = model.forward(step, taps if mtp else None)
    if mtp and model.mtp_block:
        model.mtp(h, step.ids, step)
    if mtp and model.dspark:
        model.dspark.remember(taps, step)
        block = np.zeros((batch, model.config.dspark_block_size), np.int64)
        g, _ = model.dspark.block(block_step(cache, block, np.arange(batch), np.full(batch, start + seq)))
        model.dspark.after(be.from_numpy(np.zeros(batch, np.int32)), g[:batch])
    last = be.concat([h[(b + 1) * seq - 1 : (b + 1) * seq] for b in range(batch)], axis=0)
    be.sample(model.logits(last), be.from_numpy(np.zeros(batch, np.float32)), temperature=0.0, top_p=1.0)
