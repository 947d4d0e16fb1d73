"""The planner backend: the real graph on shapes, counting by the rules that stand beside the
contracts.

Operations by precision, bytes read and written by kind (the layout's kinds of weights; ``cache``;
``activation``; ``address``: indices and tables), and the memory that is alive. A fused op that is
taken whole does its default's work and reads the weights and cache rows that its default reads, but
none of its intermediates exist. The class is not registered: it runs the graph and gives no tokens.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from dsv4_core.checkpoint.layout import Kind
from dsv4_core.contract.backend import Backend
from dsv4_core.contract.dtypes import Experts, ScaledArray, dtype_name
from dsv4_core.planning.shapes import ShapeArray, ShapeBackend, Storage, bind_axes

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence
    from types import CodeType

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Numerics, OpSpec

WEIGHTS = frozenset(get_args(Kind))
EQUIVALENT_FP8 = {"fp4": 0.5, "fp8": 1, "fp8 x fp4": 1, "bfloat16": 2, "float32": 4, "float64": 8}
"""What a matrix operation counts in operations of FP8: by the wider side's bits. Vector work is not
counted in it.
"""


def _tally() -> defaultdict[str, float]:
    return defaultdict(float)


@dataclass
class Count:
    """What was done: operations by precision, bytes read and written by kind, bytes sent to other
    ranks by purpose.
    """

    work: defaultdict[str, float] = field(default_factory=_tally)
    read: defaultdict[str, float] = field(default_factory=_tally)
    written: defaultdict[str, float] = field(default_factory=_tally)
    sent: defaultdict[str, float] = field(default_factory=_tally)

    def add(self, other: Count, times: float = 1) -> None:
        """Add another count, scaled."""
        for name in ("work", "read", "written", "sent"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += value * times

    @property
    def equivalent(self) -> float:
        """Matrix operations, as many FP8 ones would weigh."""
        return sum(EQUIVALENT_FP8.get(precision, 0) * n for precision, n in self.work.items())

    @property
    def weights(self) -> float:
        """Bytes of weights read."""
        return sum(n for kind, n in self.read.items() if kind in WEIGHTS)

    @property
    def moved(self) -> float:
        """Bytes read and written in all."""
        return sum(self.read.values()) + sum(self.written.values())


class Entry(NamedTuple):
    """One op's count and the layer that it ran in (None: outside the blocks)."""

    op: str
    layer: int | None
    done: Count


def total(entries: Iterable[Entry]) -> Count:
    """Add up."""
    count = Count()
    for entry in entries:
        count.add(entry.done)
    return count


@functools.cache
def _rule(text: str) -> CodeType:
    return compile(re.sub(r"\bin\b", "in_", text), "counting rule", "eval")  # ``in`` is an axis and a keyword


class Planner(ShapeBackend):
    """Counts. ``like``: fused ops as that backend has them (None: all of them whole).

    ``topk``: experts of a token, all different. ``sharing``: ranks that hold the same tokens and
    share out their expert rows; ``groups``: how many such groups spread the experts over each
    other's ranks. Both 1: one device does it all.
    """

    name = "plan"

    def __init__(
        self,
        *,
        numerics: Numerics = "native",
        like: type[Backend] | Backend | None = None,
        topk: int = 1,
        sharing: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(numerics=numerics, like=like)
        self.topk, self.sharing, self.groups = topk, sharing, groups
        self.live: Counter[str] = Counter()
        self.reset()

    def reset(self) -> None:
        """Forget what was counted; what is alive stays alive."""
        self.notes: list[Entry] = []
        self.inside = 0
        self.peak = Counter(self.live)

    @property
    def alive(self) -> Hashable:
        """Bytes by kind, on which the peak depends."""
        return frozenset(self.live.items())

    def run(self, spec: OpSpec, values: dict[str, Any]) -> Any:
        """Carry out and count one op; a fused one through its default."""
        if not spec.fused:
            return super().run(spec, values)
        self.check_dtypes(spec, values)
        sizes = bind_axes(spec, values)
        outer, self.notes, self.inside = self.notes, [], self.inside + 1
        getattr(Backend, spec.name)(self, *(values[n] for n in spec.arrays), **{n: values[n] for n in spec.scalars})
        parts, self.notes, self.inside = total(self.notes), outer, self.inside - 1
        made = ShapeBackend.results(self, spec, values, sizes)
        count = Count(parts.work)
        for mine, theirs in ((count.read, parts.read), (count.written, parts.written)):
            mine.update({kind: n for kind, n in theirs.items() if kind not in {"activation", "address"}})
        for name in spec.arrays:
            if (kind := kind_of(values[name])) in {"activation", "address"}:
                count.read[kind] += nbytes(values[name])
        for result in made if isinstance(made, tuple) else (made,):
            count.written["activation"] += nbytes(result)
        self._note(spec, values, count)
        return made

    def results(self, spec: OpSpec, values: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
        """Make the results and count by the contract's rule."""
        made = super().results(spec, values, sizes)
        names = {**sizes, "distinct": self.distinct, "min": min}
        if "in" in names:
            names["in_"] = names["in"]
        count = Count()
        for what, rule in spec.work.items():
            count.work[self.precision(what, values)] += eval(_rule(rule), {}, names)  # noqa: S307  the contracts' own words
        for name in spec.arrays:
            part = eval(_rule(spec.reads[name]), {}, names) if name in spec.reads else 1  # noqa: S307
            for value in values[name] if isinstance(values[name], list | tuple) else (values[name],):
                if value is not None:
                    count.read[kind_of(value)] += nbytes(value) * part
        for name, rule in spec.writes.items():
            count.written[kind_of(values[name])] += nbytes(values[name]) * eval(_rule(rule), {}, names)  # noqa: S307
        for result in () if spec.mutates else made if isinstance(made, tuple) else (made,):
            count.written["activation"] += nbytes(result)
        self._note(spec, values, count)
        return made

    def _note(self, spec: OpSpec, values: Mapping[str, Any], count: Count) -> None:
        if self.sharing > 1 and not self.inside and any(isinstance(v, Experts) for v in values.values()):
            part = Count()
            part.add(count, 1 / self.sharing)  # its share of the rows; weights are shared out by ``distinct``
            for kind in WEIGHTS & count.read.keys():
                part.read[kind] = count.read[kind]
            count = part
        self.notes.append(Entry(spec.name, self.layer, count))

    def distinct(self, rows: int, experts: int) -> float:
        """How many of this rank's experts are expected to get any of ``rows`` token copies (of each
        group) under even routing.
        """
        k, everywhere = min(self.topk, rows) or 1, rows * self.groups
        return float(experts * (1 - (1 - k / experts) ** (everywhere / k)) / (self.sharing * self.groups))

    def precision(self, what: str, values: Mapping[str, Any]) -> str:
        """Give the precision of a counting rule's word: of the product of activations with an
        operand, ``act``, ``fp4`` or ``vector``.
        """
        native = self.numerics == "native"
        if what == "vector":
            return what
        if what == "fp4":
            return "fp4" if native else self.numerics
        dtype = self.activation_dtype if what == "act" else dtype_name(values[what])
        if dtype.startswith("float8"):
            return "fp8" if native else self.numerics
        if dtype.startswith("float4"):
            return "fp8 x fp4" if native else self.numerics
        return dtype if native else self.numerics

    def array(self, shape: Sequence[int], dtype: str) -> ShapeArray:
        """Make a result; outside a fused op it takes memory for as long as anything refers to
        it.
        """
        return self._alive(ShapeArray(shape, dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> ShapeArray:
        """Allocate cache."""
        return self._alive(ShapeArray(shape, dtype, "cache"))

    def from_numpy(self, array: Host) -> ShapeArray:
        """Take over indices or tables; weights pass through."""
        return array if isinstance(array, ShapeArray) else self._alive(super().from_numpy(array))

    def _alive(self, array: ShapeArray) -> ShapeArray:
        if not self.inside:
            live, storage = self.live, array.storage
            live[storage.kind] += storage.nbytes
            if live.total() > self.peak.total():
                self.peak = Counter(live)

            def freed(gone: Storage) -> None:
                live[gone.kind] -= gone.nbytes

            storage.freed = freed
        return array


def kind_of(value: Any) -> str:
    """Give what an operand is: the kind of its storage."""
    if isinstance(value, Experts):
        return kind_of(value[0])
    if isinstance(value, ScaledArray):
        return kind_of(value.data)
    return str(value.storage.kind) if isinstance(value, ShapeArray) else ""


def nbytes(value: Any) -> int:
    """Give the bytes of an operand, scales included."""
    if isinstance(value, Experts):
        return value.shape[0] * nbytes(value[0])
    return int(value.nbytes)
