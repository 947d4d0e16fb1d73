"""Faults that take two things at once: data and a size, data and a memory layout; and what becomes
of NaN and infinity.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import BFLOAT16, Host, ScaledArray

DECODE = 8  # rows up to which a kernel of its own runs


def finite(x: Host) -> Host:
    """NaN and infinity replaced, as a maximum of a number and NaN does it on some devices."""
    return np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e3, neginf=-1e3).astype(x.dtype)


@mutant("sparse_attn", seen="an online softmax whose sums are not rescaled when a later tile has a larger score")
def later_maximum_ignored(
    be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, *, softmax_scale: float
) -> Any:
    y = right(q, kv, sink, idxs, softmax_scale=softmax_scale)
    if idxs.shape[1] < 2 or not q.size:
        return y
    rows, valid = kv[np.maximum(idxs, 0)].astype(np.float64), (idxs >= 0)[:, None]
    scores = np.where(valid, np.einsum("thd,tjd->thj", q.astype(np.float64), rows) * softmax_scale, -np.inf)
    half = idxs.shape[1] // 2
    moved = scores[..., half:].max(-1) > scores[..., :half].max(-1) + 8
    y[moved] = right(
        q, kv, sink, np.concatenate([idxs[:, :half], np.full_like(idxs[:, half:], -1)], 1), softmax_scale=softmax_scale
    )[moved]
    return y


@mutant(
    "linear",
    seen="a decode kernel that quantises a row in halves with one scale, the first half's: outliers in the second saturate",
)
def outliers_saturate_in_decode(be: Any, right: Op, x: Host, weight: Any, **kw: Any) -> Any:
    if len(x) > DECODE or not isinstance(weight, ScaledArray) or not x.size:
        return right(x, weight, **kw)
    half = x.shape[1] // 2
    top = np.abs(x[:, :half].astype(np.float64)).max(1, keepdims=True)
    return right(np.clip(x.astype(np.float64), -16 * top, 16 * top).astype(x.dtype), weight, **kw)


@mutant("gate", seen="a decode kernel with a top-k of its own, whose ties go to the higher id", numeric=False)
def ties_in_batches_of_two(be: Any, right: Op, x: Host, weight: Host, bias: Host, **kw: Any) -> Any:
    if not 1 < len(x) <= 16:
        return right(x, weight, bias, **kw)
    weights, indices = right(x, np.ascontiguousarray(weight[::-1]), np.ascontiguousarray(bias[::-1]), **kw)
    return weights, (len(weight) - 1 - indices).astype(np.int32)


@mutant("gate", "gate_hash", seen="softplus written as log(1 + exp(z)): nothing is left of it below -17")
def naive_softplus(be: Any, right: Op, x: Host, weight: Host, *rest: Any, route_scale: float, **kw: Any) -> Any:
    weights, indices = right(x, weight, *rest, route_scale=route_scale, **kw)
    z = (x.astype(np.float32) @ weight.astype(np.float32).T).astype(np.float32)
    low = np.take_along_axis(z, indices.astype(np.int64), 1) < -17 if indices.size else np.zeros(weights.shape, bool)
    weights[low] = 0
    return weights, indices


@mutant("act_quant", seen="a maximum over lanes that misses the last one once a block takes more than sixteen rows")
def last_lane_missed(be: Any, right: Op, x: Host, *, block: int) -> Any:
    if len(x) <= 16:
        return right(x, block=block)
    shown = x.copy()
    shown.reshape(len(x), -1, block)[..., -1] = 0
    codes, scale = right(shown, block=block)
    return np.where(shown == x, codes, 0x7E).astype(np.uint8), scale


@mutant("swiglu", seen="the clamp left out of the kernel for a few rows")
def clamp_missing_in_a_batch_of_two(be: Any, right: Op, gate: Host, up: Host, weights: Any, *, limit: float) -> Any:
    return right(gate, up, weights, limit=1e30 if 1 < len(gate) <= DECODE else limit)


@mutant("rms_norm", seen="eps left out of the variant with many rows")
def eps_missing_in_prefill(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    return right(x, weight, eps=eps if len(x) < 64 else eps * 1e-6)


@mutant("hc_post", seen="a variant for few tokens that mixes in BF16: streams that cancel show it")
def streams_mixed_in_bf16(be: Any, right: Op, y: Host, h: Host, post: Host, comb: Host) -> Any:
    if not 1 < len(y) <= DECODE or be.numerics != "native":
        return right(y, h, post, comb)
    total = (post[:, :, None] * y.astype(np.float32)[:, None]).astype(BFLOAT16)
    for j in range(h.shape[1]):
        total = (total.astype(np.float32) + (comb[:, j, :, None] * h[:, j, None].astype(np.float32))).astype(BFLOAT16)
    return total


@mutant("combine", seen="zeros that only the first block of rows is cleared to")
def not_cleared_past_a_block(be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, **kw: Any) -> Any:
    y = right(rows, order, offsets, shared, **kw)
    if offsets[-1] == 0 and shared is None:
        y[32:] = 1
    return y


@mutant(
    "cache_write", seen="padding compacted away within a warp of 32 rows, and the warps then overlap", numeric=False
)
def padding_compacted_by_warp(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    if len(index) > 32 and (index[:32] < 0).any():
        rows = rows.copy()
        rows[32] = rows[31]
    return right(cache, rows, index, **kw)


@mutant("dispatch", seen="a counter of rows an expert in a byte", numeric=False)
def counter_in_a_byte(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    rows, weights, order, offsets = right(*operands, **kw)
    counts = np.diff(offsets)
    return (
        rows,
        weights,
        order,
        np.concatenate([[0], np.cumsum(np.where(counts > 255, counts & 0xFF, counts))]).astype(np.int32),
    )


@mutant("linear", seen="the stride of a view ignored by the variant for full tiles")
def stride_ignored_in_full_tiles(be: Any, right: Op, x: Host, weight: Any, **kw: Any) -> Any:
    wrong = len(x) >= 64 and not x.flags.c_contiguous
    return right(np.roll(x, 1, axis=1) if wrong else x, weight, **kw)


@mutant("logits", seen="a wide sum kept in BF16 between two halves of a row that has no sign changes")
def positive_sums_in_halves(be: Any, right: Op, x: Host, weight: Host) -> Any:
    half = x.shape[1] // 2
    first, second = x.copy(), x.copy()
    first[:, half:], second[:, :half] = 0, 0
    y = right(first, weight)
    return (
        y.astype(BFLOAT16).astype(y.dtype) + right(second, weight)
        if be.numerics == "native" and len(x) >= 16
        else right(x, weight)
    )


@mutant(
    "cached_index_topk",
    "index_topk",
    seen="scores rounded to BF16 before the choice, on a device whose top-k takes no float32",
    numeric=False,
)
def scores_chosen_in_bf16(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    plain = be.index_scores
    be.index_scores = lambda *a, **k: plain(*a, **k).astype(BFLOAT16).astype(be.wide_dtype)
    try:
        return right(*operands, **kw)
    finally:
        del be.index_scores


def _quiet(op: str, operand: int, name: str, seen: str) -> None:
    def fault(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
        given = list(operands)
        given[operand] = finite(given[operand])
        return right(*given, **kw)

    mutant(op, seen=seen, name=name, numeric=False)(fault)


MAXIMUM = "a maximum or a clamp that returns the other operand where one is NaN: what diverges goes on silently"
_quiet(
    "linear",
    0,
    "nan_lost_in_linear",
    "a quantisation that turns NaN into the least code times the scale; seen in a kernel for this model",
)
_quiet("hc_post", 1, "nan_lost_in_streams", MAXIMUM)
_quiet("rms_norm", 0, "nan_lost_in_norm", MAXIMUM)
_quiet("compress", 0, "nan_lost_in_compressor", MAXIMUM)
_quiet(
    "index_scores",
    0,
    "nan_lost_in_indexer",
    "max(NaN, 0) is 0 on most devices: the ReLU between two products swallows it",
)
_quiet("gate", 0, "nan_lost_in_router", MAXIMUM)
_quiet("combine", 0, "nan_lost_in_combine", MAXIMUM)


@mutant(
    "sparse_attn",
    seen="rows of all tokens of a block in one product, others' masked by a weight of 0: 0 times NaN is NaN",
)
def nan_reaches_the_block(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, **kw: Any) -> Any:
    y = right(q, kv, sink, idxs, **kw)
    listed = np.unique(idxs[idxs >= 0])
    y[..., np.isnan(kv[listed].astype(np.float64)).any(0)] = np.nan
    return y


@mutant("cached_sparse_attn", seen="-1 clamped to row 0 and masked by a weight of 0")
def nan_of_row_0(
    be: Any,
    right: Op,
    q: Host,
    kv: Host,
    ring: Host,
    ring_index: Host,
    rows: Any,
    row_index: Any,
    sink: Host,
    idxs: Host,
    **kw: Any,
) -> Any:
    y = right(q, kv, ring, ring_index, rows, row_index, sink, idxs, **kw)
    if len(ring_index) == 0 and len(kv) and np.isnan(kv[0].astype(np.float64)).any():
        y[(idxs < 0).any(1)] = np.nan
    return y


@mutant(
    "expert_linear", seen="a tile that holds the rows of two experts multiplies both: a NaN of one reaches the other's"
)
def nan_of_the_neighbour(be: Any, right: Op, x: Host, weight: Any, offsets: Host) -> Any:
    y = right(x, weight, offsets)
    bad = np.flatnonzero(np.isnan(x.astype(np.float64)).any(1))
    y[np.minimum(bad + 1, len(y) - 1)] = np.nan
    return y
