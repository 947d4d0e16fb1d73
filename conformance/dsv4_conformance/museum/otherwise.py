"""Honest variants by whole ops: the same result by another formula, another order of choice, or
another kind of array.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_core.contract.dtypes import E8M0_VALUES, FP8_BLOCK, Experts, Host, RowLayout, ScaledArray, decode

if TYPE_CHECKING:
    from dsv4_conformance.museum.fault import Fault, Op

LEAST = 2.0**-126
TILE_ROWS = 8


def split_k(parts: int) -> Fault:
    """Products shared among ``parts`` programs, channel by channel in turn, whose sums are added at
    the end.
    """

    def dot(be: Any, right: Op, a: Host, b: Host) -> Host:
        sums = [
            right(np.ascontiguousarray(a[..., i::parts]), np.ascontiguousarray(b[..., i::parts, :]))
            for i in range(parts)
        ]
        total = sums[0]
        for part in sums[1:]:
            total = total + part
        return np.asarray(total)

    return dot


def scales_after_products(be: Any, right: Op, x: Host, weight: Any) -> Host:
    """An FP8 weight's codes are multiplied as they are, and each block's product is scaled."""
    if not isinstance(weight, ScaledArray) or weight.format != "e4m3" or not x.shape[1]:
        return np.asarray(right(x, weight))
    codes, scale = decode(weight.data, "e4m3").astype(x.dtype), E8M0_VALUES[weight.scale].astype(x.dtype)
    y = np.zeros((len(x), weight.shape[0]), x.dtype)
    for i in range(scale.shape[1]):
        part = slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK)
        y += be.dot(x[:, part], codes[:, part].T) * np.repeat(scale[:, i], FP8_BLOCK)[: y.shape[1]]
    return y


def always_gathered(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host) -> Host:
    """Every token gathers its own rows, and repeats what its neighbours gather."""
    return np.asarray(be.attend_gathered(q, kv, sink, idxs))


def sink_as_a_column(be: Any, right: Op, scores: Host, count: Host, sink: Host) -> Host:
    """The sink is one more score, whose probability is dropped."""
    masked = np.where(count > 0, scores, -np.inf)
    last = np.broadcast_to(sink, (*masked.shape[:-1], 1))
    every = np.concatenate([masked, last], axis=-1)
    weight = np.exp(every - every.max(-1, keepdims=True))
    weight[..., :-1] *= count
    return np.asarray(weight[..., :-1] / be.total(weight, -1))


def powers_of_two(be: Any, right: Op, scores: Host, count: Host, sink: Host) -> Host:
    """Softmax by exp2: scores times log2(e) first, as GPUs do."""
    turned = scores.dtype.type(np.log2(np.e))
    s, last = np.where(count > 0, scores, -np.inf), sink
    top = np.maximum(s.max(-1, keepdims=True, initial=-np.inf), last)
    weight = np.exp2((s - top) * turned) * count
    return np.asarray(weight / (be.total(weight, -1) + np.exp2((last - top) * turned)))


def any_tie(be: Any, right: Op, scores: Host, topk: int) -> Host:
    """Of equal scores the highest row."""
    n = scores.shape[1]
    return n - 1 - np.asarray(right(np.ascontiguousarray(scores[:, ::-1]), topk))


def any_tie_of_experts(be: Any, right: Op, x: Host, weight: Host, bias: Host, *, topk: int, route_scale: float) -> Any:
    """Of equal scores the highest expert, worst of the chosen first."""
    scores = be.router_scores(x, weight)
    order = np.argsort(scores + be.widen(bias), axis=-1, kind="stable")
    indices = order[:, order.shape[1] - topk :].astype(np.int32)
    return be.route_weights(scores, indices, route_scale), indices


def in_order_of_rows(be: Any, right: Op, scores: Host, topk: int) -> Host:
    """Picks by row, not by score: nothing consumes the order. Rows that are not visible come last
    as it is.
    """
    picks = np.asarray(right(scores, topk))
    seen = np.take_along_axis(scores, picks, 1) > -np.inf
    return np.take_along_axis(picks, np.argsort(np.where(seen, picks, scores.shape[1] + picks), axis=1), 1)


def by_reciprocal(be: Any, right: Op, x: Host, weight: Host | None, *, eps: float) -> Host:
    """The weight first, then the reciprocal of the root."""
    wide = be.widen(x)
    inverse = wide.dtype.type(1) / np.sqrt(be.square_mean(wide) + wide.dtype.type(eps))
    return np.asarray(be.rounded((wide if weight is None else wide * be.widen(weight)) * inverse))


def complex_rope(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Host:
    """Pairs as complex numbers, turned by a table of float64 cosines and sines."""
    angle = (positions.astype(np.float32)[:, None] * freqs).astype(np.float64)
    turn = np.exp(1j * (-angle if inverse else angle)).astype(np.result_type(be.wide_type, np.complex64))[:, None]
    rotated = 2 * freqs.shape[0]
    pairs = be.widen(x[..., -rotated:])
    turned = (pairs[..., 0::2] + 1j * pairs[..., 1::2]) * turn
    out = x.copy()
    out[..., -rotated:] = be.rounded(np.stack([turned.real, turned.imag], axis=-1).reshape(pairs.shape))
    return out


def butterflies(be: Any, right: Op, x: Host) -> Host:
    """The rotation in log2(dim) stages of sums and differences."""
    y, dim, span = be.widen(x), x.shape[1], 1
    while span < dim:
        pairs = y.reshape(len(y), dim // (2 * span), 2, span)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(len(y), dim)
        span *= 2
    return np.asarray(be.rounded(y * be.wide_type.type(dim**-0.5)))


def swiglu_weight_first(be: Any, right: Op, gate: Host, up: Host, weights: Host | None, *, limit: float) -> Host:
    """The routing weight meets ``up`` before the sigmoid does, and the sigmoid is a factor."""
    g, u = np.minimum(be.widen(gate), limit), np.clip(be.widen(up), -limit, limit)
    u = u if weights is None else u * weights[:, None]
    with np.errstate(over="ignore"):
        return np.asarray(be.rounded(g * (1 / (1 + np.exp(-g))) * u))


def softplus_by_log1p(be: Any, right: Op, x: Host, weight: Host) -> Host:
    """``max(z, 0) + log1p(exp(-|z|))``."""
    z = be.times(be.widen(x), weight)
    return np.asarray(np.sqrt(np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z)))))


def one_product_post(be: Any, right: Op, y: Host, h: Host, post: Host, comb: Host) -> Host:
    """The layer's output is one more stream of a single product."""
    left = np.concatenate([be.widen(comb).transpose(0, 2, 1), be.widen(post)[:, :, None]], axis=2)
    return np.asarray(be.rounded(be.dot(left, np.concatenate([be.widen(h), be.widen(y)[:, None]], axis=1))))


def scattered_experts(
    be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, *, topk: int, out_dtype: str
) -> Any:
    """Copies are added where they belong as they come, in an order of chance, to the shared
    expert's output.
    """
    local, tokens = int(offsets[-1]), rows.shape[0] // topk
    total = np.zeros((tokens, rows.shape[1]), be.wide_dtype) if shared is None else be.widen(shared).copy()
    mixed = np.random.default_rng(local).permutation(local)
    np.add.at(total, order[:local][mixed] // topk, be.widen(rows[:local])[mixed])
    return be.round_to(total, out_dtype)


def other_memory(be: Any, right: Op, *operands: Any, **scalars: Any) -> Any:
    """Results lie transposed in memory, and cannot be written to."""
    y = np.asfortranarray(right(*operands, **scalars))
    y.flags.writeable = False
    return y


def in_a_pool(be: Any, right: Op, *operands: Any, **scalars: Any) -> Any:
    """Rows are shared among three threads."""
    x, rest = operands[0], operands[1:]
    parts = np.array_split(np.arange(len(x)), 3)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda part: right(x[part], *rest, **scalars), parts))
    return np.concatenate(done)


def tiles_of_rows(be: Any, right: Op, x: Host, weight: Experts, offsets: Host) -> Any:
    """Grouped products in tiles of 8 rows, each padded to a full one."""
    y = np.zeros((len(x), weight.shape[1]), be.wide_dtype)
    for e in np.flatnonzero(np.diff(offsets)):
        for begin in range(int(offsets[e]), int(offsets[e + 1]), TILE_ROWS):
            end = min(begin + TILE_ROWS, int(offsets[e + 1]))
            tile = np.zeros((TILE_ROWS, x.shape[1]), x.dtype)
            tile[: end - begin] = x[begin:end]
            y[begin:end] = be.linear(tile, weight[int(e)], out_dtype=be.wide_dtype)[: end - begin]
    return be.rounded(y)


def flushing_operands(be: Any, right: Op, x: Host) -> Host:
    """Numbers below float32's least normal one are zero on their way in."""
    wide = np.asarray(right(x))
    return np.where(np.abs(wide) < LEAST, wide.dtype.type(0), wide)


def flushing_results(be: Any, right: Op, x: Host, dtype: str) -> Host:
    """And on their way out."""
    y = np.asarray(right(x, dtype))
    return np.where(np.abs(y.astype(np.float64)) < LEAST, y.dtype.type(0), y) if y.dtype.kind in "fV" else y


def flushing_rows(be: Any, right: Op, stored: Host, layout: RowLayout) -> Host:
    """Rows of a cache are unpacked to numbers that are normal or zero."""
    rows = np.asarray(right(stored, layout))
    return (
        rows if layout.kind == "plain" else np.where(np.abs(rows.astype(np.float64)) < LEAST, rows.dtype.type(0), rows)
    )


def functional(be: Any, right: Op, cache: Host, rows: Host, index: Host, *, layout: RowLayout) -> Host:
    """A new array for every write; the one that was given is spoilt, so that nobody may still rely
    on it.
    """
    written = np.asarray(right(cache.copy(), rows, index, layout=layout))
    cache[...] = 0xFF if cache.dtype == np.uint8 else np.nan
    return written
