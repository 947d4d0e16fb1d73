"""What a model needs and can reach: memory, operations and bytes from the real graph on shapes, set
against a machine's figures.

Every figure of the model comes from running the graph on the planner backend; this module has no
formula of an op. It adds what the graph does not know: which rank holds what, what ranks send each
other, and how fast a device may be at best.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.checkpoint.shards import BITS
from dsv4_core.contract.dtypes import FP8_BLOCK, dtype_name, numpy_dtype
from dsv4_core.files import forms
from dsv4_core.files.reading import json_file, json_text
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.engine import CHUNK
from dsv4_core.graph.model import Parallel
from dsv4_core.planning.counting import Count, Entry, Planner, nbytes, total
from dsv4_core.planning.shapes import LayeredModel, ShapeSource, run_step

if TYPE_CHECKING:
    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Format
    from dsv4_core.contract.spec import Array, Numerics

MOST_DEVICES = 4096  # beyond any split that the published models have
USABLE = (
    0.92  # of a device's memory: the rest goes to the driver's context, communication buffers and the allocator's slack
)
REWINDABLE = 8  # tokens that a served sequence's cache can rewind, as Cache has it by default
ALONE = Place()
CLOSINGS = (
    (96, 2),
    (31, 3),
    (1, 127),
)  # of 128 positions p: how many close no window, a ratio-4 one, both; and p mod 128 of one of each


@dataclass(frozen=True)
class Hardware:
    """Equal devices; each has ``memory`` bytes, ``bandwidth`` and ``link`` (each way) in bytes/s,
    ``peak`` operations/s by precision.
    """

    name: str
    devices: int
    memory: float
    bandwidth: float
    link: float
    peak: dict[str, float]
    source: str

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """Read ``h100x8``, a name of the data file and a number of devices, or a JSON file with one
        such entry and ``devices``.

        Raises ``ValueError`` for an unknown name or a file without one of the figures.
        """
        advice = "an entry has memory_gb, bandwidth_gbs, link_gbs, tflops, devices and source"
        data = resources.files("dsv4_core").joinpath("data/hardware.json").read_bytes()
        known = json_text(data, dict[str, forms.Hardware], "data/hardware.json", advice)
        if Path(text).exists():
            entry = json_file(Path(text), forms.Hardware, advice)
            name, devices = Path(text).stem, entry.devices
        else:
            name, _, count = text.rpartition("x")
            if name not in known or not (count.isascii() and count.isdecimal()):
                raise ValueError(
                    f"hardware {text!r}: write a file, or one of {', '.join(known)} with a number of devices, e.g. h100x8"
                )
            entry, devices = known[name], int(count[:9])
        if not 1 <= devices <= MOST_DEVICES:
            raise ValueError(f"hardware {text!r}: {devices} devices; a plan takes 1 to {MOST_DEVICES}")
        for precision in ("bfloat16", "vector"):  # what every other precision falls back to
            if precision not in entry.tflops:
                raise ValueError(f"hardware {text!r}: tflops has no {precision!r}, which every model needs; {advice}")
        peak = {precision: 1e12 * value for precision, value in entry.tflops.items()}
        return cls(
            name, devices, 1e9 * entry.memory_gb, 1e9 * entry.bandwidth_gbs, 1e9 * entry.link_gbs, peak, entry.source
        )

    def speed(self, precision: str) -> float:
        """Peak of a precision; where the device lacks it, of the next wider one that it has."""
        wider = {"fp4": "fp8", "fp8 x fp4": "fp8", "fp8": "bfloat16", "float32": "vector", "float64": "vector"}
        while precision not in self.peak and precision in wider:
            precision = wider[precision]
        return self.peak[precision]


class RankSource(ShapeSource):
    """The weights of the first rank of its group, but for the routed experts: those are all here,
    and the planner shares them out.
    """

    def __init__(self, config: ModelConfig, place: Place, expert_format: Format = "e2m1") -> None:
        super().__init__(config, expert_format)
        self.place = place
        self.specs = {
            name: spec if ".experts." in name else spec._replace(shape=place.part(spec, config))
            for name, spec in self.specs.items()
        }

    def stored(self) -> dict[str, float]:
        """Bytes of one rank's weights by kind, its share of the routed experts among them."""
        shares: defaultdict[str, float] = defaultdict(float)
        for spec in self.specs.values():
            block, experts, _ = spec.name.partition(".ffn.experts.")
            alike, holders = (self.config.experts_of(block), self.place.ranks) if experts else (1, 1)
            shares[spec.kind] += alike * math.prod(spec.shape) * BITS[spec.dtype] / 8 / holders
        return shares


class Graph:
    """The graph of one rank on the planner, ready to count steps of it. ``like``: fused ops as that
    backend has them; None: all whole.
    """

    def __init__(
        self,
        config: ModelConfig,
        place: Place = ALONE,
        *,
        numerics: Numerics = "native",
        like: type[Backend] | Backend | None = None,
        expert_format: Format = "e2m1",
    ) -> None:
        place.check(config)
        self.config, self.place = config, place
        self.source = RankSource(config, place, expert_format)
        self.planner = Planner(
            numerics=numerics, like=like, topk=config.num_experts_per_tok, sharing=place.tp, groups=place.ep
        )
        self.model = LayeredModel(self.source, self.planner, parallel=self._parallel())
        self._counted: dict[tuple[int, int, int], tuple[Count, Counter[str]]] = {}

    def _parallel(self) -> Parallel:
        """Reduction points that count what a rank sends, as ``exchange`` sends it, and give arrays
        of the right shapes.
        """
        p, c, be = self.place, self.config, self.planner

        def sent(what: str, count: float) -> None:
            note = Count()
            note.sent[what] = count
            be.notes.append(Entry(what, be.layer, note))

        def reduce(array: Array) -> Array:  # a ring, in the wide dtype: reduce-scatter, then all-gather
            sent("sums", 2 * (p.tp - 1) / p.tp * math.prod(array.shape) * numpy_dtype(be.wide_dtype).itemsize)
            return be.array(array.shape, be.activation_dtype)

        def gather(array: Array, channels: int) -> Array:
            sent("gathers", (p.tp - 1) * nbytes(array))
            return be.array((array.shape[0], channels), dtype_name(array))

        def experts(x: Array, *args: Any, out_dtype: str, **scalars: Any) -> Array:
            tokens, dim = x.shape
            copies = tokens * c.num_experts_per_tok / p.tp * (p.ep - 1) / p.ep  # to other groups, under even routing
            sent("dispatch", copies * (dim + dim // FP8_BLOCK + 4))  # FP8, its scales and the routing weight
            sent("combine", copies * 2 * dim)  # BF16
            return be.moe(x, *args, out_dtype=out_dtype, **scalars)

        several, cuts = p.tp > 1, p.cuts_output(c)
        return Parallel(
            holds_shared=p.holds_shared(c),
            reduce_embedding=reduce if several else None,
            gather_low_rank=(lambda o: gather(o, c.o_groups * c.o_lora_rank)) if several and not cuts else None,
            reduce_attention=reduce if several and cuts else None,
            experts=(lambda _count, _padded: experts) if p.ep > 1 else None,
            reduce_moe=reduce if several else None,
            gather_logits=(lambda logits: gather(logits, c.vocab_size)) if several else None,
        )

    def step(self, batch: int, seq: int, start: int, *, capacity: int | None = None) -> list[Entry]:
        """Count one step of ``batch`` sequences (of this rank's group) that hold ``start`` tokens;
        ``planner.peak`` is its memory.
        """
        cache = Cache(self.planner, self.config, batch, capacity or start + seq, rewindable=REWINDABLE)
        self.planner.reset()
        run_step(self.model, batch=batch, seq=seq, start=start, cache=cache)
        return self.planner.notes

    def counted(self, batch: int, seq: int, start: int) -> tuple[Count, Counter[str]]:
        """Give a step's count and the memory of its peak by kind, counted once."""
        key = batch, seq, start
        if key not in self._counted:
            self._counted[key] = total(self.step(batch, seq, start)), self.planner.peak
        return self._counted[key]

    def decode(self, batch: int, context: int) -> Count:
        """Count one decode step at ``context`` tokens: the mean over the 128 positions before (32
        close a window of 4, one of 128).
        """
        mean, base = Count(), max(0, context - 128) // 128 * 128
        for times, position in CLOSINGS:
            mean.add(self.counted(batch, 1, base + position)[0], times / 128)
        return mean

    def prefill(self, start: int, chunk: int) -> Count:
        """Count one prefill step of ``chunk`` tokens of one sequence that holds ``start``."""
        return self.counted(1, chunk, start)[0]

    def cache_bytes(self, context: int) -> int:
        """Bytes of one sequence's cache of that capacity."""
        return Cache(self.planner, self.config, 1, context, rewindable=REWINDABLE).nbytes


@dataclass(frozen=True)
class Ceiling:
    """The best that a machine could do: seconds of a step by each limit, and tokens/s of the whole
    machine under the largest.
    """

    seconds: dict[str, float]
    tokens: int

    @property
    def limit(self) -> str:
        """The binding limit."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences over the binding limit's time."""
        return self.tokens / self.seconds[self.limit]

    @classmethod
    def of(cls, count: Count, hardware: Hardware, tokens: int) -> Ceiling:
        """Set one rank's step against its device: limits overlap perfectly, each at its peak."""
        matrix = sum(n / hardware.speed(p) for p, n in count.work.items() if p != "vector")
        seconds = {
            "memory bandwidth": count.moved / hardware.bandwidth,
            "compute": matrix,
            "vector compute": count.work["vector"] / hardware.speed("vector"),
            "interconnect": sum(count.sent.values()) / hardware.link,
        }
        return cls(seconds, tokens)


@dataclass
class Plan:
    """A model on a machine at a context. ``batch``: sequences decoded together on the whole
    machine.
    """

    config: ModelConfig
    context: int
    hardware: Hardware
    place: Place
    batch: int = 1
    expert_format: Format = "e2m1"
    chunk: int = CHUNK
    graph: Graph = field(init=False)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` where the ranks are not the machine's devices, or the split does not
        fit the model.
        """
        if self.place.ranks != self.hardware.devices:
            have = f"{self.hardware.name} has {self.hardware.devices} devices here"
            raise ValueError(
                f"--tp {self.place.tp} x --ep {self.place.ep} = {self.place.ranks} ranks; {have}; choose two whose product is that"
            )
        if not 0 < self.context <= self.config.max_position_embeddings:
            raise ValueError(
                f"--context {self.context}: the model has positions up to {self.config.max_position_embeddings}"
            )
        self.graph = Graph(self.config, self.place, expert_format=self.expert_format)

    @property
    def batch_per_group(self) -> int:
        """Sequences of one tensor-parallel group, the fullest one."""
        return -(-self.batch // self.place.ep)

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes of a rank: weights by kind, its group's caches, and the most that a prefill or
        decode step has alive beside them.
        """
        sizes = dict(self.graph.source.stored())
        sizes["cache"] = float(self.batch_per_group * self.graph.cache_bytes(self.context))
        alive = []
        for batch, seq in ((1, min(self.chunk, self.context)), (self.batch_per_group, 1)):
            _, peak = self.graph.counted(batch, seq, self.context - seq)
            alive.append(sum(n for kind, n in peak.items() if kind != "cache"))
        sizes["activations"] = float(max(alive))
        return sizes

    @property
    def room(self) -> float:
        """Bytes that a rank has for caches beside weights and activations."""
        return USABLE * self.hardware.memory - sum(n for kind, n in self.memory.items() if kind != "cache")

    @property
    def sequences(self) -> int:
        """How many sequences of this context fit the whole machine."""
        return max(0, int(self.room // self.graph.cache_bytes(self.context))) * self.place.ep

    @property
    def verdict(self) -> tuple[bool, str]:
        """Whether it fits, and why or why not."""
        have, need = USABLE * self.hardware.memory, sum(self.memory.values())
        figures = f"a rank needs {need / 1e9:.1f} GB of {have / 1e9:.1f} usable ({USABLE:.0%} of {self.hardware.memory / 1e9:.0f})"
        if need <= have:
            return True, f"fits: {figures}; {self.sequences} sequences of {self.context} tokens would"
        weights = need - self.memory["cache"] - self.memory["activations"]
        if weights > have:
            devices = math.ceil(weights * self.place.ranks / have)
            return (
                False,
                f"does not fit: weights alone are {weights / 1e9:.1f} GB a rank; {figures}; about {devices} devices would hold them",
            )
        return (
            False,
            f"does not fit: {figures}; {self.sequences} sequences of {self.context} tokens do, {self.batch} were asked for",
        )

    @cached_property
    def decode(self) -> Count:
        """One rank's decode step."""
        return self.graph.decode(self.batch_per_group, self.context)

    @cached_property
    def prefill(self) -> Count:
        """One rank's prefill of a whole context, one sequence per group: chunks counted at powers
        of two, straight lines between.
        """
        whole, previous, chunk = Count(), None, min(self.chunk, self.context)
        last = (self.context - 1) // chunk * chunk
        starts = sorted({0, last, *(s for s in (chunk << i for i in range(21)) if s < last)})
        for start in starts:
            count = self.graph.prefill(start, chunk)
            if previous is not None:
                before, begun = previous
                chunks = (start - begun) // chunk
                whole.add(
                    before, (chunks + 1) / 2
                )  # the trapezium from the chunk after ``begun`` to this one, and half a chunk less at each end
                whole.add(count, (chunks - 1) / 2)
            previous = (count, start)
        assert previous is not None
        whole.add(previous[0], (self.context - last) / chunk)
        return whole

    def ceiling(self, phase: str) -> Ceiling:
        """Tokens/s of the machine in ``prefill`` (one sequence in each group) or ``decode``, at
        best.
        """
        if phase == "prefill":
            return Ceiling.of(self.prefill, self.hardware, self.context * self.place.ep)
        return Ceiling.of(self.decode, self.hardware, self.batch)


def per_token(count: Count, tokens: int) -> dict[str, Any]:
    """Give a count per token of one rank."""
    one = Count()
    one.add(count, 1 / tokens)
    return {
        "operations": dict(one.work),
        "equivalent_fp8": one.equivalent,
        "read": dict(one.read),
        "written": dict(one.written),
        "sent": dict(one.sent),
    }
