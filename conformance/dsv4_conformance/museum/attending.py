"""Faults of attention: sink, RoPE, compressor, indexer, window."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract.dtypes import Host


@mutant("sparse_attn", seen="attn_sink loaded but not used: the only new term of this softmax")
def sink_missing(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, **kw: Any) -> Any:
    y = right(q, kv, np.full_like(sink, -1e30), idxs, **kw)
    y[(idxs < 0).all(1)] = 0
    return y


@mutant("sparse_attn", seen="the sink treated as one more key, whose value is then the first row's")
def sink_in_the_numerator(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, **kw: Any) -> Any:
    y, without = right(q, kv, sink, idxs, **kw), right(q, kv, np.full_like(sink, -1e30), idxs, **kw)
    a, b = y.astype(np.float64), without.astype(np.float64)
    share = 1 - np.divide(
        (a * b).sum(-1, keepdims=True),
        (b * b).sum(-1, keepdims=True),
        out=np.ones((*a.shape[:2], 1)),
        where=(b != 0).any(-1, keepdims=True),
    )
    first = kv[np.maximum(idxs[:, 0], 0)].astype(np.float64)[:, None]
    return (a + share * first).astype(y.dtype)


@mutant("sparse_attn", seen="padding read as row 0 instead of skipped")
def minus_one_reads_a_row(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, **kw: Any) -> Any:
    return right(q, kv, sink, np.maximum(idxs, 0), **kw)


@mutant("sparse_attn", seen="exp without the maximum subtracted: fine until scores pass 88")
def softmax_overflows(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, *, softmax_scale: float) -> Any:
    y = right(q, kv, sink, idxs, softmax_scale=softmax_scale)
    scores = np.einsum("thd,tjd->thj", q.astype(np.float32), kv[np.maximum(idxs, 0)].astype(np.float32)) * softmax_scale
    y[(np.where((idxs >= 0)[:, None], scores, 0) > 88).any(-1)] = np.nan
    return y


@mutant("sparse_attn", seen="probabilities cast to BF16 for the second matrix product, and not declared")
def undeclared_bf16_probabilities(
    be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, *, softmax_scale: float
) -> Any:
    from dsv4_core.contract.dtypes import BFLOAT16

    rows, valid = kv[np.maximum(idxs, 0)].astype(np.float32), (idxs >= 0)[:, None]
    scores = np.where(valid, np.einsum("thd,tjd->thj", q.astype(np.float32) * np.float32(softmax_scale), rows), -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), sink[:, None])
    weight = np.exp(scores - top)
    total = weight.sum(-1, keepdims=True) + np.exp(sink[:, None] - top)
    y = np.einsum("thj,tjd->thd", weight.astype(BFLOAT16).astype(np.float32), rows) / total
    return y.astype(q.dtype)


@mutant("apply_rope", seen="most attention leaves values unrotated; here values are keys, and o must be rotated back")
def inverse_rope_missing(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    return x.copy() if inverse else right(x, positions, freqs, inverse=False)


@mutant("apply_rope", seen="rotated back by the next token's position: the cache's length has moved on by then")
def inverse_rope_at_the_wrong_position(
    be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool
) -> Any:
    return right(x, positions + np.int32(inverse), freqs, inverse=inverse)


@mutant("apply_rope", seen="half-split pairs (i, i + r/2) are what most libraries rotate")
def half_split_rope(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    half = len(freqs)
    shuffled, y = x.copy(), x.copy()
    shuffled[..., -2 * half :: 2], shuffled[..., -2 * half + 1 :: 2] = x[..., -2 * half : -half], x[..., -half:]
    turned = right(shuffled, positions, freqs, inverse=inverse)
    y[..., -2 * half : -half], y[..., -half:] = turned[..., -2 * half :: 2], turned[..., -2 * half + 1 :: 2]
    return y


def plain(freqs: Host, theta: float) -> Host:
    """Frequencies without YaRN."""
    return (theta ** (-np.arange(len(freqs)) / len(freqs))).astype(np.float32)


@mutant("apply_rope", seen="one table for the whole model; sliding layers have theirs, without YaRN")
def yarn_on_sliding_layers(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    sliding = np.array_equal(freqs, plain(freqs, PRESETS["flash"].rope_theta))
    ramp = np.linspace(1, 1 / 16, len(freqs), dtype=np.float32)
    return right(x, positions, freqs * ramp if sliding else freqs, inverse=inverse)


@mutant("apply_rope", seen="rope_scaling ignored: short contexts do not show it")
def yarn_missing_on_compressed_layers(
    be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool
) -> Any:
    sliding = np.array_equal(freqs, plain(freqs, PRESETS["flash"].rope_theta))
    return right(
        x, positions, freqs if sliding else plain(freqs, PRESETS["flash"].compress_rope_theta), inverse=inverse
    )


@mutant("apply_rope", seen="rope_theta used for every layer: compress_rope_theta is a second key")
def wrong_theta(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    return right(x, positions, plain(freqs, PRESETS["flash"].rope_theta), inverse=inverse)


@mutant("apply_rope", seen="an offset position * row bytes in 32 bits: wrong from half a million tokens on")
def int32_overflow_at_a_high_position(
    be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool
) -> Any:
    with np.errstate(over="ignore"):
        wrapped = (positions.astype(np.int32) * np.int32(4096)) // np.int32(4096)
    return right(x, wrapped.astype(np.int32), freqs, inverse=inverse)


@mutant("apply_rope", seen="angles in float64, or from a table of float16: neither is what the model was trained with")
def angles_not_float32(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    half = len(freqs)
    angle = positions.astype(np.float64)[:, None] * freqs.astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None] * (-1 if inverse else 1)
    y, a, b = x.copy(), x[..., -2 * half :: 2].astype(np.float64), x[..., -2 * half + 1 :: 2].astype(np.float64)
    y[..., -2 * half :: 2], y[..., -2 * half + 1 :: 2] = (
        (a * cos - b * sin).astype(x.dtype),
        (a * sin + b * cos).astype(x.dtype),
    )
    return y


@mutant(
    "rms_norm", seen="the query heads' norm has no weight, so that a loader that builds norms from weights skips it"
)
def unweighted_q_norm_missing(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    return x.copy() if weight is None else right(x, weight, eps=eps)


@mutant("rms_norm", seen="x / (sqrt(mean) + eps): the same until a row is small")
def eps_outside_the_root(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    wide = x.astype(np.float64)
    y = wide / (np.sqrt((wide * wide).mean(-1, keepdims=True)) + eps)
    return (y if weight is None else y * weight.astype(np.float64)).astype(x.dtype)


@mutant("rms_norm", seen="the norm's weight applied after rounding to BF16: two roundings")
def norm_rounded_twice(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    y = right(x, None, eps=eps)
    return y if weight is None else (y.astype(np.float32) * weight.astype(np.float32)).astype(x.dtype)


@mutant(
    "compress",
    seen="previous window and current one use different halves of the channels; both orders have the same shape",
)
def overlap_halves_swapped(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    width = ape.shape[1]
    if width == dim:
        return right(kv_score, ape, idxs, dim=dim)
    order = np.concatenate([np.arange(dim, width), np.arange(dim)])
    return right(
        np.ascontiguousarray(kv_score[:, np.concatenate([order, width + order])]),
        np.ascontiguousarray(ape[:, order]),
        idxs,
        dim=dim,
    )


@mutant("compress", seen="state of the window before is dropped where a chunk of the prompt ends")
def previous_window_forgotten_across_a_chunk(
    be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int
) -> Any:
    ratio, width = ape.shape
    forgotten = idxs.copy()
    if width > dim:
        forgotten[:1, :ratio] = -1
    return right(kv_score, ape, forgotten, dim=dim)


@mutant("compress", seen="the position within the window added to kv's scores one token late")
def ape_shifted(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    return right(kv_score, np.roll(ape, 1, axis=0), idxs, dim=dim)


@mutant("compress", seen="a mean over the window instead of the learned softmax")
def compressor_softmax_missing(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    flat = kv_score.copy()
    flat[:, flat.shape[1] // 2 :] = 0
    return right(flat, np.zeros_like(ape), idxs, dim=dim)


@mutant("index_scores", seen="the indexer's ReLU sits between two products and is easily fused away")
def indexer_relu_missing(be: Any, right: Op, q: Host, weights: Host, keys: Host, *, scale: float) -> Any:
    y = np.einsum(
        "bsh,bshd,bnd->bsn", weights.astype(np.float64) * scale, q.astype(np.float64), keys.astype(np.float64)
    )
    return y.astype(be.wide_dtype)


@mutant("index_scores", seen="a constant factor changes no pick: only the returned scores show it")
def indexer_scale_missing(be: Any, right: Op, q: Host, weights: Host, keys: Host, *, scale: float) -> Any:
    del scale
    return right(q, weights, keys, scale=1.0)


@mutant("index_scores", seen="head weights through a ReLU too: they may be negative")
def negative_head_weights_dropped(be: Any, right: Op, q: Host, weights: Host, keys: Host, *, scale: float) -> Any:
    return right(q, np.maximum(weights, 0), keys, scale=scale)


@mutant(
    "index_select",
    seen="a library's top-k promises nothing on ties, and gives other rows from run to run",
    numeric=False,
)
def unstable_ties(be: Any, right: Op, scores: Host, visible: Host, offset: Host, *, topk: int) -> Any:
    rows = scores.shape[-1]
    seen = np.arange(rows) < visible[..., None]
    picks = np.argsort(np.where(seen, scores, -np.inf), axis=-1, kind="stable")[..., ::-1][..., :topk]
    return np.where(picks < visible[..., None], picks + offset[..., None], -1).astype(np.int32)


@mutant("index_select", seen="top-k on magnitudes, as gradient compression code has it", numeric=False)
def picks_by_magnitude(be: Any, right: Op, scores: Host, visible: Host, offset: Host, *, topk: int) -> Any:
    return right(np.abs(scores), visible, offset, topk=topk)


@mutant("index_select", seen="position // ratio instead of (position + 1) // ratio", numeric=False)
def visible_one_row_late(be: Any, right: Op, scores: Host, visible: Host, offset: Host, *, topk: int) -> Any:
    return right(scores, np.maximum(visible - 1, 0), offset, topk=topk)


@mutant("index_select", seen="a row made visible before its window is past: looks into the future", numeric=False)
def visible_one_row_early(be: Any, right: Op, scores: Host, visible: Host, offset: Host, *, topk: int) -> Any:
    return right(scores, np.minimum(visible + 1, scores.shape[-1]), offset, topk=topk)


@mutant(
    "cached_sparse_attn",
    seen="the compressed branch masked off whenever more than one token is fed; shipped in a public port",
)
def compressed_branch_masked_in_prefill(
    be: Any, right: Op, q: Host, kv: Host, ring: Host, ring_index: Host, *rest: Any, **kw: Any
) -> Any:
    rows, row_index, sink, idxs = rest
    if len(q) > 1:
        idxs = np.where(idxs >= len(ring_index) + len(kv), -1, idxs).astype(np.int32)
    return right(q, kv, ring, ring_index, rows, row_index, sink, idxs, **kw)


@mutant("cached_sparse_attn", seen="p - W + 1 .. p has W rows; p - W .. p has one too many, p - W + 2 one too few")
def window_off_by_one(
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
    shorter = idxs.copy()
    np.put_along_axis(shorter, (idxs >= 0).argmax(1)[:, None], -1, axis=1)
    return right(q, kv, ring, ring_index, rows, row_index, sink, shorter, **kw)


@mutant("rms_norm_rope", seen="one loop over the plain channels for the norm and its sum, one over the turned ones")
def sum_of_the_plain_channels(
    be: Any, right: Op, x: Host, weight: Any, positions: Host, freqs: Host, *, eps: float
) -> Any:
    plain, wide = x[..., : -2 * len(freqs)], be.widen(x)
    if not plain.size:
        return right(x, weight, positions, freqs, eps=eps)
    squares = np.square(be.widen(plain)).sum(-1, keepdims=True) / x.shape[-1]
    normed = wide / np.sqrt(squares + wide.dtype.type(eps)) * (1 if weight is None else be.widen(weight))
    return be.apply_rope(be.rounded(normed), positions, freqs, inverse=False)


@mutant("rms_norm_rope", seen="rows are tokens times heads: the position of row r is that of token r // heads")
def position_of_the_row(be: Any, right: Op, x: Host, weight: Any, positions: Host, freqs: Host, *, eps: float) -> Any:
    tokens, heads, dim = x.shape
    taken = positions[np.arange(tokens * heads) % max(tokens, 1)]
    return right(x.reshape(tokens * heads, 1, dim), weight, taken, freqs, eps=eps).reshape(x.shape)


@mutant("kv_score", seen="two weights of a shape in one launch, in the other order")
def gate_before_kv(be: Any, right: Op, x: Host, wkv: Any, wgate: Any) -> Any:
    return right(x, wgate, wkv)


@mutant("cached_compress", seen="-1 of a slot taken for slot 0 by a clamp, and not masked after the gather")
def absent_slot_is_the_first(
    be: Any, right: Op, kv_score: Host, state: Host, index: Host, ape: Host, idxs: Host, *, dim: int
) -> Any:
    return right(kv_score, state, np.maximum(index, 0), ape, idxs, dim=dim)


@mutant("cached_compress", seen="this step's tokens counted from the window's end, not from where the state ends")
def step_counted_from_its_first_token(
    be: Any, right: Op, kv_score: Host, state: Host, index: Host, ape: Host, idxs: Host, *, dim: int
) -> Any:
    late = np.where(idxs >= len(index), np.maximum(idxs - 1, len(index)), idxs).astype(idxs.dtype)
    return right(kv_score, state, index, ape, late, dim=dim)


@mutant("cache_write", seen="a packing kernel that casts by cutting off, which rows that are on the grid do not show")
def packing_cuts_off(be: Any, right: Op, cache: Host, rows: Host, index: Host, *, layout: Any) -> Any:
    if layout.kind == "kv":  # three bits of mantissa stay
        cut = (rows.astype(np.float32).view(np.uint32) & np.uint32(0xFFF00000)).view(np.float32).astype(rows.dtype)
        rows = np.concatenate([cut[:, : -layout.rope_dim], rows[:, -layout.rope_dim :]], 1)
    return right(cache, rows, index, layout=layout)
