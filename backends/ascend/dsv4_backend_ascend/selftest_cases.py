"""Cases of the self-test: operands in host memory, the same on every machine, at the published head
sizes.

Sizes and data are chosen for what has gone wrong on NPUs: rows and key blocks at high addresses,
long contexts, sinks of both signs, experts without rows, ties, clamped activations, tokens of
uneven size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_core.contract.dtypes import BFLOAT16, Experts, Host, RowLayout, ScaledArray, quantise_int8, quantise_weight

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Format

HEADS, DIM, INDEX_HEADS, INDEX_DIM = 64, 512, 64, 128
CONTEXT = 1 << 18  # indexer keys of a context of a million tokens
_SPREAD = 65536 * (4 / 12) ** 0.5  # standard deviation of the sum of four uniform 16-bit integers


class Draws:
    """Random operands from the raw bits of PCG64, which NumPy keeps the same for ever (its
    distributions it does not).
    """

    def __init__(self, *seed: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence(seed))

    def _raw(self, count: int) -> Host:
        return self.bits.random_raw(count)

    def normal(self, *shape: int) -> Host:
        """Float32, nearly normal: sums of four uniform integers."""
        count = int(np.prod(shape))
        total = self._raw(count).view(np.uint16).reshape(count, 4).sum(1, dtype=np.int64)
        return ((total - 2 * 65535) / _SPREAD).astype(np.float32).reshape(shape)

    def act(self, *shape: int, scale: float = 1.0) -> Host:
        """BF16 activations."""
        return (self.normal(*shape) * np.float32(scale)).astype(BFLOAT16)

    def uniform(self, *shape: int) -> Host:
        """Float32 between 0 and 1."""
        return ((self._raw(int(np.prod(shape))) >> np.uint64(40)) * 2.0**-24).astype(np.float32).reshape(shape)

    def ids(self, high: int, *shape: int) -> Host:
        """int32 below ``high``."""
        return (self._raw(int(np.prod(shape))) % np.uint64(high)).astype(np.int32).reshape(shape)

    def order(self, rows: int, count: int) -> Host:
        """Rows of a random permutation of ``count`` numbers each, int32."""
        return np.argsort(self._raw(rows * count).reshape(rows, count), axis=1, kind="stable").astype(np.int32)

    def weight(self, out: int, cols: int, fmt: Format) -> ScaledArray:
        """A quantised weight."""
        wide = self.normal(out, cols)
        return quantise_int8(wide) if fmt == "int8" else quantise_weight(wide, fmt)

    def experts(self, count: int, out: int, cols: int, fmt: Format) -> Experts:
        """Quantised weights of experts."""
        return Experts([self.weight(out, cols, fmt) for _ in range(count)])


@dataclass(frozen=True)
class Call:
    """Operands of one call. ``low``: of a call with the same results from low addresses, what the
    composed tier is given; ``part``: those results among the first call's, along the first axis.
    """

    arrays: tuple[Any, ...]
    scalars: dict[str, Any] = field(default_factory=dict)
    low: tuple[Any, ...] | None = None
    part: slice = field(default_factory=lambda: slice(None))

    @property
    def yardstick(self) -> tuple[Any, ...]:
        """What the composed tier and the recorded expectation are computed from."""
        return self.arrays if self.low is None else self.low


@dataclass(frozen=True)
class Case:
    """One call of a contract, made when it is reached. ``gigabytes``: of device memory, where that
    is more than one.
    """

    contract: str
    name: str
    build: Callable[[Draws], Call]
    exact: bool = False
    gigabytes: int = 0

    @property
    def id(self) -> str:
        """Contract and case."""
        return f"{self.contract}/{self.name}"

    def call(self, seed: int = 0) -> Call:
        """Make the operands."""
        return self.build(Draws(seed, zlib.crc32(self.id.encode())))


def _norm(d: Draws, tokens: int, scale: float, weighted: bool) -> Call:
    return Call((d.act(tokens, DIM, scale=scale), d.act(DIM) if weighted else None), {"eps": 1e-6})


def _rope(d: Draws, inverse: bool) -> Call:
    positions = np.array([0, 1, 77, 65536, 1 << 20], np.int32)
    freqs = (10000.0 ** (-np.arange(32) / 32)).astype(np.float32)
    return Call((d.act(5, HEADS, DIM), positions, freqs), {"inverse": inverse})


def _many_tokens(d: Draws, tokens: int) -> Call:
    """Rotated channels alone: npu_rotary_mul's page has a bound of 1000 on batch times heads, and
    no word on tokens.
    """
    freqs = (10000.0 ** (-np.arange(32) / 32)).astype(np.float32)
    return Call((d.act(tokens, HEADS, 64), np.arange(tokens, dtype=np.int32), freqs), {"inverse": False})


def _gate(d: Draws, experts: int, topk: int) -> Call:
    arrays = (d.act(9, 256), d.act(experts, 256, scale=0.1), d.normal(experts) * np.float32(0.1))
    return Call(arrays, {"topk": topk, "route_scale": 1.5})


def _gate_hash(d: Draws) -> Call:
    table = d.order(50, 256)[:, :6].astype(np.int64)
    arrays = (d.act(9, 256), d.act(256, 256, scale=0.1), np.ascontiguousarray(table), d.ids(50, 9))
    return Call(arrays, {"route_scale": 1.5})


def _uneven(d: Draws, tokens: int, cols: int) -> Host:
    """One token far larger than the others and one far smaller: a scale taken over several tokens
    shows.
    """
    x = d.act(tokens, cols)
    x[3] *= 64
    x[5] *= 2.0**-10
    return x


def _linear(d: Draws, fmt: Format, cols: int) -> Call:
    return Call((_uneven(d, 17, cols), d.weight(192, cols, fmt)), {"out_dtype": "bfloat16"})


def _small(d: Draws, fmt: Format) -> Call:
    """Blocks so far below the quantisation's least magnitude that its scale leaves them few
    codes.
    """
    return Call((d.act(17, 512, scale=2.0**-30), d.weight(192, 512, fmt)), {"out_dtype": "bfloat16"})


def _grouped(d: Draws, fmt: Format | None) -> Call:
    rows = 8 * 128
    return Call((d.act(9, 8, DIM), d.weight(rows, DIM, fmt) if fmt else d.act(rows, DIM)))


def _experts(d: Draws, fmt: Format | None) -> Call:
    """Five experts, the second without rows; the last rows belong to other ranks."""
    offsets = np.array([0, 4, 4, 9, 10, 11], np.int32)
    weight = d.experts(5, 64, 256, fmt) if fmt else Experts([d.act(64, 256) for _ in range(5)])
    return Call((_uneven(d, 13, 256), weight, offsets))


def _swiglu(d: Draws, scale: float) -> Call:
    return Call((d.act(19, 128, scale=scale), d.act(19, 128, scale=scale), d.uniform(19)), {"limit": 10.0})


def _dispatch(d: Draws, first: int, count: int) -> Call:
    picks = np.ascontiguousarray(d.order(23, 8)[:, :2])
    return Call((d.act(23, 64), d.uniform(23, 2), picks), {"first_expert": first, "n_experts": count})


def _combine(d: Draws) -> Call:
    ends = np.array([0, 20, 40], np.int32)
    arrays = (d.act(46, 64), d.order(1, 46)[0], ends, d.act(23, 64))
    return Call(arrays, {"topk": 2, "out_dtype": "bfloat16"})


def _attention(d: Draws, heads: int, picks: int, rows: int) -> Call:
    """Sinks of both signs, holes between picks, a token that picks nothing."""
    chosen = d.ids(rows, 6, picks)
    chosen[1, ::3] = -1
    chosen[2] = -1
    sinks = np.linspace(-6, 12, heads, dtype=np.float32)
    return Call((d.act(6, heads, DIM), d.act(rows, DIM), sinks, chosen), {"softmax_scale": DIM**-0.5})


def _high_rows(d: Draws, rows: int) -> Call:
    """Only the last rows hold anything, and only they are picked."""
    held = 16
    kv = np.zeros((rows, DIM), BFLOAT16)
    kv[-held:] = tail = d.act(held, DIM)
    q, near, sinks = d.act(3, HEADS, DIM), d.ids(held, 3, 24), np.linspace(-6, 3, HEADS, dtype=np.float32)
    far = (near + np.int32(rows - held)).astype(np.int32)
    return Call((q, kv, sinks, far), {"softmax_scale": DIM**-0.5}, low=(q, tail, sinks, near))


def _index(d: Draws, tokens: int, rows: int, topk: int, least: int) -> Call:
    visible = np.linspace(least, rows, tokens, dtype=np.int32)[None]
    q, weights = d.act(1, tokens, INDEX_HEADS, INDEX_DIM), d.normal(1, tokens, INDEX_HEADS)
    arrays = (q, weights, d.act(1, rows, INDEX_DIM), visible, np.zeros((1, tokens), np.int32))
    return Call(arrays, {"scale": 0.01, "topk": topk})


def _high_keys(d: Draws, sequences: int, rows: int) -> Call:
    """Of many sequences the last one has keys; those of the others are zero, and hidden."""
    keys = np.zeros((sequences, rows, INDEX_DIM), BFLOAT16)
    keys[-1] = last = d.act(rows, INDEX_DIM)
    q, weights = d.act(sequences, 1, INDEX_HEADS, INDEX_DIM), d.normal(sequences, 1, INDEX_HEADS)
    visible = np.zeros((sequences, 1), np.int32)
    visible[-1] = rows
    offset = np.zeros((sequences, 1), np.int32)
    low = (q[-1:], weights[-1:], last[None], visible[-1:], offset[-1:])
    return Call((q, weights, keys, visible, offset), {"scale": 0.01, "topk": 512}, low=low, part=slice(-1, None))


def _keys_apart(d: Draws, run: int) -> Call:
    """Two sequences' keys in runs of neighbours that lie in a random order, the last one cut
    short; what lies between them is of no one.
    """
    rows, held = 3 * run - 5, 8
    blocks = d.order(1, held)[0, :6].reshape(2, 3, 1)
    index = (blocks * run + np.arange(run, dtype=np.int32)).reshape(2, -1)[:, :rows].astype(np.int32)
    q, weights = d.act(2, 3, INDEX_HEADS, INDEX_DIM), d.normal(2, 3, INDEX_HEADS)
    visible = np.array([[rows, run + 1, 0], [2 * run, rows - 1, 7]], np.int32)
    offset = np.array([[0, 0, 0], [rows, rows, rows]], np.int32)
    arrays = (q, weights, d.act(held * run, INDEX_DIM), np.ascontiguousarray(index.reshape(-1)), visible, offset)
    return Call(arrays, {"layout": RowLayout("plain", INDEX_DIM, run=run), "scale": 0.01, "topk": 32})


def _hc_pre(d: Draws, dim: int) -> Call:
    """Mixes of one size, whatever the number of channels that they are summed over."""
    scale = np.array([0.9, 1.1, 0.7], np.float32)
    arrays = (d.act(9, 4, dim), d.normal(24, 4 * dim) * np.float32((256 / dim) ** 0.5), scale, d.normal(24))
    return Call(arrays, {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20})


def _qdq(d: Draws, fmt: Format, dim: int, block: int, channels: int) -> Call:
    return Call((_uneven(d, 17, dim),), {"format": fmt, "block": block, "channels": channels})


def _norm_rope(d: Draws) -> Call:
    positions = np.array([0, 77, 1 << 20], np.int32)
    freqs = (10000.0 ** (-np.arange(32) / 32)).astype(np.float32)
    return Call((d.act(3, HEADS, DIM, scale=3.0), d.act(DIM), positions, freqs), {"eps": 1e-6})


def _hc_pre_norm(d: Draws, dim: int) -> Call:
    made = _hc_pre(d, dim)
    return Call((*made.arrays, d.act(dim)), made.scalars)


def _written(d: Draws) -> Call:
    """The cache of the composed tier is another array: both write in place."""
    arrays = (d.act(40, DIM), d.act(5, DIM), np.array([39, -1, 0, 7, 8], np.int32))
    return Call(arrays, {"layout": RowLayout("plain", DIM)}, low=arrays)


def _windows(d: Draws, ratio: int, width: int, dim: int) -> Call:
    """Tokens from the cache and from this step in each window; one is not there, and one slot is
    none.
    """
    span = ratio * (width // dim)
    slots = d.order(1, 2 * span)[0]
    slots[1] = -1
    windows = np.stack([np.arange(span) + 2 * span - ratio, np.arange(span)]).astype(np.int32)
    windows[1, 2] = -1
    arrays = (d.normal(ratio + span, 2 * width), d.normal(2 * span, 2 * width), slots, d.normal(ratio, width), windows)
    return Call(arrays, {"dim": dim})


CASES: tuple[Case, ...] = (
    Case("rms_norm", "tokens=33", lambda d: _norm(d, 33, 1.0, weighted=True)),
    Case("rms_norm", "tiny_values", lambda d: _norm(d, 5, 1e-3, weighted=True)),
    Case("rms_norm", "no_weight", lambda d: _norm(d, 7, 1.0, weighted=False)),
    Case("apply_rope", "position=2^20", lambda d: _rope(d, inverse=False)),
    Case("apply_rope", "position=2^20,inverse", lambda d: _rope(d, inverse=True)),
    Case("apply_rope", "tokens=1100", lambda d: _many_tokens(d, 1100)),
    Case("linear", "e4m3,uneven_tokens", lambda d: _linear(d, "e4m3", 512)),
    Case("linear", "e2m1,uneven_tokens", lambda d: _linear(d, "e2m1", 512)),
    Case("linear", "int8,uneven_tokens", lambda d: _linear(d, "int8", 512)),
    Case("linear", "e4m3,in=7168", lambda d: _linear(d, "e4m3", 7168)),
    Case("linear", "e4m3,below_the_least_magnitude", lambda d: _small(d, "e4m3")),
    Case("grouped_linear", "bfloat16,groups=8", lambda d: _grouped(d, None)),
    Case("grouped_linear", "e4m3,groups=8", lambda d: _grouped(d, "e4m3")),
    Case("expert_linear", "e2m1,empty_expert,other_ranks_rows", lambda d: _experts(d, "e2m1")),
    Case("expert_linear", "e4m3,empty_expert,other_ranks_rows", lambda d: _experts(d, "e4m3")),
    Case("expert_linear", "int8,empty_expert,other_ranks_rows", lambda d: _experts(d, "int8")),
    Case("expert_linear", "bfloat16,empty_expert,other_ranks_rows", lambda d: _experts(d, None)),
    Case("gate", "flash,experts=256", lambda d: _gate(d, 256, 6)),
    Case("gate", "pro,experts=384", lambda d: _gate(d, 384, 6)),
    Case("gate_hash", "experts=256", _gate_hash),
    Case("swiglu", "limit_reached", lambda d: _swiglu(d, 12.0)),
    Case("swiglu", "small", lambda d: _swiglu(d, 1.0)),
    Case("dispatch", "ties_keep_their_order", lambda d: _dispatch(d, 0, 8), exact=True),
    Case("dispatch", "one_rank_of_several", lambda d: _dispatch(d, 2, 3), exact=True),
    Case("combine", "other_ranks_rows", _combine),
    Case("sparse_attn", "flash,sinks,holes,no_row", lambda d: _attention(d, HEADS, 128 + 512, 9000)),
    Case("sparse_attn", "pro,sinks,holes,no_row", lambda d: _attention(d, 2 * HEADS, 128 + 1024, 9000)),
    Case("sparse_attn", "row=2^17", lambda d: _high_rows(d, 1 << 17)),
    Case("sparse_attn", "row=2^21,bytes_past_2^31", lambda d: _high_rows(d, (1 << 21) + 4096), gigabytes=6),
    Case("sparse_attn", "row=2^22,elements_past_2^31", lambda d: _high_rows(d, (1 << 22) + 4096), gigabytes=10),
    Case("index_topk", "visible=0..1000", lambda d: _index(d, 7, 1000, 512, 0)),
    Case("index_topk", "pro,visible=3000..4000", lambda d: _index(d, 3, 4000, 1024, 3000)),
    Case("index_topk", "context=2^20", lambda d: _index(d, 1, CONTEXT, 512, CONTEXT)),
    Case("index_topk", "key_block=384", lambda d: _high_keys(d, 3, 1 << 14)),
    Case("index_topk", "key_block=81920,bytes_past_2^31", lambda d: _high_keys(d, 40, CONTEXT), gigabytes=6),
    Case("cached_index_topk", "blocks_of_16_apart", lambda d: _keys_apart(d, 16)),
    Case("cached_index_topk", "blocks_of_128_apart", lambda d: _keys_apart(d, 128)),
    Case("hc_pre", "streams=4", lambda d: _hc_pre(d, 256)),
    Case("hc_pre", "streams=4,channels=4096", lambda d: _hc_pre(d, 4096)),
    Case(
        "hc_post",
        "comb_not_symmetric",
        lambda d: Call((d.act(9, 256), d.act(9, 4, 256), d.normal(9, 4), d.uniform(9, 4, 4))),
    ),
    Case("hc_pre_norm", "streams=4,channels=4096", lambda d: _hc_pre_norm(d, 4096)),
    Case("act_qdq", "e4m3,uneven_tokens", lambda d: _qdq(d, "e4m3", 1024, 128, 1024), exact=True),
    Case("act_qdq", "e4m3,rows", lambda d: _qdq(d, "e4m3", DIM, 64, 448), exact=True),
    Case("act_qdq", "e2m1,uneven_tokens", lambda d: _qdq(d, "e2m1", 128, 32, 128), exact=True),
    Case("hadamard", "rows=70", lambda d: Call((d.act(70, INDEX_DIM),))),
    Case("rms_norm_rope", "position=2^20", _norm_rope),
    Case("cache_write", "holes", _written, exact=True),
    Case("cached_compress", "ratio=4,windows_overlap", lambda d: _windows(d, 4, 2 * DIM, DIM)),
    Case("cached_compress", "ratio=128", lambda d: _windows(d, 128, DIM, DIM)),
)
"""Every case, in the order of a run."""
