"""Faults of hyper-connections, the cache, embedding and sampling, and of the form of what is
returned.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import Host


@mutant(
    "hc_post",
    seen="comb[j, n] sums over its first index; the other way round is a legal matrix product; shipped in a public port",
)
def comb_not_transposed(be: Any, right: Op, y: Host, h: Host, post: Host, comb: Host) -> Any:
    return right(y, h, post, np.ascontiguousarray(comb.transpose(0, 2, 1)))


@mutant(
    "hc_split_sinkhorn", seen="the first division is one half of an iteration: counts of 20 and 19 are both plausible"
)
def sinkhorn_one_iteration_short(
    be: Any, right: Op, mixes: Host, scale: Host, base: Host, *, hc: int, eps: float, iters: int
) -> Any:
    return right(mixes, scale, base, hc=hc, eps=eps, iters=max(iters - 1, 1))


@mutant(
    "hc_split_sinkhorn",
    seen="softmax over the first axis: rows and columns of a nearly doubly stochastic matrix look alike",
)
def comb_softmax_over_columns(
    be: Any, right: Op, mixes: Host, scale: Host, base: Host, *, hc: int, eps: float, iters: int
) -> Any:
    def turned(x: Host) -> Host:
        y = x.copy()
        y[..., 2 * hc :] = (
            x[..., 2 * hc :].reshape(*x.shape[:-1], hc, hc).swapaxes(-1, -2).reshape(*x.shape[:-1], hc * hc)
        )
        return y

    pre, post, comb = right(turned(mixes), scale, turned(base), hc=hc, eps=eps, iters=iters)
    return pre, post, np.ascontiguousarray(comb.swapaxes(-1, -2))


@mutant("hc_split_sinkhorn", seen="post is twice a sigmoid, pre is not")
def post_not_doubled(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    pre, post, comb = right(*operands, **kw)
    return pre, post / 2, comb


@mutant("hc_split_sinkhorn", "hc_head", seen="hc_eps looks negligible; float32 shows it")
def hc_eps_missing(be: Any, right: Op, *operands: Any, eps: float, **kw: Any) -> Any:
    del eps
    return right(*operands, eps=0.0, **kw)


@mutant("hc_pre", seen="the streams' norm taken per stream instead of over all of them")
def mixes_normed_per_stream(be: Any, right: Op, h: Host, *operands: Any, **kw: Any) -> Any:
    wide = h.astype(np.float64)
    level = np.sqrt((wide * wide).mean((1, 2), keepdims=True) / np.maximum((wide * wide).mean(2, keepdims=True), 1e-30))
    _, post, comb = right((wide * level).astype(h.dtype), *operands, **kw)
    return right(h, *operands, **kw)[0], post, comb


@mutant("hc_expand", seen="streams that start as the embedding and zeros", numeric=False)
def only_the_first_stream(be: Any, right: Op, x: Host, *, hc: int) -> Any:
    y = right(x, hc=hc)
    y[:, 1:] = 0
    return y


@mutant("cache_write", seen="slot taken modulo the window instead of the ring's rows", numeric=False)
def ring_wrap_wrong(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    last = cache.shape[0] - 1
    kept = index != last
    written = right(cache, rows[kept], index[kept], **kw)
    if (~kept).any() and not (index == 0).any():
        return right(written, rows[~kept], np.zeros(int((~kept).sum()), np.int32), **kw)
    return written


@mutant(
    "cache_write", seen="-1 means no row; as a Python or C index it is the last one, or the byte before", numeric=False
)
def minus_one_is_written(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    written = right(cache, rows, index, **kw)
    if (index < 0).any():
        return right(written, rows[index < 0][:1], np.array([cache.shape[0] - 1], np.int32), **kw)
    return written


@mutant("cache_write", seen="a kernel that stores whole vectors of four rows", numeric=False)
def writes_past_the_end(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    written = right(cache, rows, index, **kw)
    if cache.base is not None and cache.size:
        beyond = np.lib.stride_tricks.as_strided(cache, (cache.shape[0] + 1, cache.shape[1]), cache.strides)
        beyond[-1] = 0
    return written


@mutant("cache_read", seen="a gather that clamps the index reads row 0 for padding", numeric=False)
def padding_reads_row_0(be: Any, right: Op, cache: Host, index: Host, **kw: Any) -> Any:
    return right(cache, np.maximum(index, 0), **kw)


@mutant("cache_read", seen="the scale of the next block: bytes counted from the padded end", numeric=False)
def cache_scale_of_the_wrong_block(be: Any, right: Op, cache: Host, index: Host, *, layout: Any) -> Any:
    if layout.kind != "key" or layout.dim < 64:
        return right(cache, index, layout=layout)
    turned, half = cache.copy(), layout.dim // 2
    turned[:, half:] = np.roll(cache[:, half:], 1, axis=1)
    return right(turned, index, layout=layout)


@mutant("embedding", seen="a negative id wraps to the end of the table; ranks rely on zeros", numeric=False)
def ids_outside_the_vocabulary_wrap(be: Any, right: Op, ids: Host, weight: Host) -> Any:
    return right(ids % weight.shape[0], weight)


@mutant("sample", seen="top-p that drops the token which crosses the threshold", numeric=False)
def top_p_prefix_too_short(be: Any, right: Op, logits: Host, uniform: Host, *, temperature: float, top_p: float) -> Any:
    return right(logits, uniform, temperature=temperature, top_p=top_p / 2)


@mutant("sample", seen="temperature multiplied instead of divided by", numeric=False)
def temperature_upside_down(
    be: Any, right: Op, logits: Host, uniform: Host, *, temperature: float, top_p: float
) -> Any:
    return right(logits, uniform, temperature=1 / temperature if temperature else 0.0, top_p=top_p)


@mutant("sample", seen="a model of NaN says the token 0 for ever: the largest of NaN is the first", numeric=False)
def nan_is_a_choice(be: Any, right: Op, logits: Host, uniform: Host, *, temperature: float, top_p: float) -> Any:
    return right(np.nan_to_num(logits, nan=1e9, posinf=1e9), uniform, temperature=temperature, top_p=top_p)


# logits, uniform, temperature, top_p, top_k, min_p, ids, added, allowed
@mutant("sample_each", seen="one temperature a batch: the first row's", numeric=False)
def temperature_of_the_first_row(
    be: Any, right: Op, logits: Host, uniform: Host, heat: Host, *rest: Any, **kw: Any
) -> Any:
    return right(logits, uniform, np.broadcast_to(heat[:1], heat.shape).copy(), *rest, **kw)


@mutant("sample_each", seen="top-k that keeps what equals its threshold's rank too", numeric=False)
def top_k_one_too_many(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    top_k = np.where(operands[4] > 0, operands[4] + 1, 0).astype(np.int32)
    return right(*operands[:4], top_k, *operands[5:], **kw)


@mutant("sample_each", seen="min-p of the whole, not of the most likely token", numeric=False)
def min_p_of_the_whole(be: Any, right: Op, logits: Host, uniform: Host, *rest: Any, **kw: Any) -> Any:
    heat, top_p, top_k, min_p, ids, added, allowed = rest
    warm = np.where(heat > 0, heat, 1)[:, None].astype(np.float64)
    whole = np.exp((logits - logits.max(-1, keepdims=True)) / warm).sum(-1) if logits.size else min_p
    share = np.minimum(min_p * whole, 1).astype(np.float32)
    return right(logits, uniform, heat, top_p, top_k, share, ids, added, allowed, **kw)


@mutant("sample_each", seen="a mask read from the highest bit of each byte", numeric=False)
def mask_from_the_other_end(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    if operands[8] is None:
        return right(*operands, **kw)
    bits = np.unpackbits(np.ascontiguousarray(operands[8]).view(np.uint8), axis=1, bitorder="big")
    return right(*operands[:8], np.packbits(bits, axis=1, bitorder="little").view(np.int32), **kw)


@mutant("sample_each", seen="padding of the shorter rows' bias, -1, is the last id of the vocabulary", numeric=False)
def bias_of_no_id_at_the_end(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    logits, ids, added = operands[0].copy(), operands[6], operands[7]
    np.add.at(logits[:, -1], np.nonzero(ids < 0)[0], added[ids < 0])
    token, *_ = right(logits, *operands[1:], **kw)
    return (token, *right(*operands, **kw)[1:])


@mutant("sample_each", seen="log-probabilities of the logits after bias and penalties", numeric=False)
def told_after_the_bias(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    logits, ids, added = operands[0].copy(), operands[6], operands[7]
    rows, at = np.nonzero(ids >= 0)
    np.add.at(logits, (rows, ids[rows, at]), added[rows, at].astype(logits.dtype))
    return right(logits, *operands[1:7], np.zeros_like(added), operands[8], **kw)


@mutant("sample_each", seen="log-probabilities at the temperature that is sampled with", numeric=False)
def told_at_the_temperature(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    warm = np.where(operands[2] > 0, operands[2], 1)[:, None]
    told = right((operands[0] / warm).astype(operands[0].dtype), *operands[1:], **kw)
    token, _, most, _ = right(*operands, **kw)
    return token, told[1], most, told[3]


@mutant(
    "sample_each", seen="the likeliest ids as a partial sort leaves them: the right ones in any order", numeric=False
)
def likely_unsorted(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    token, logprob, most, logprobs = right(*operands, **kw)
    return token, logprob, most[:, ::-1].copy(), logprobs[:, ::-1].copy()


@mutant("sample_each", seen="a row of NaN says a token: the largest of NaN is the first", numeric=False)
def nan_is_a_choice_of_a_row(be: Any, right: Op, logits: Host, *rest: Any, **kw: Any) -> Any:
    return right(np.nan_to_num(logits, nan=1e9, posinf=1e9), *rest, **kw)


@mutant("swiglu", seen="results computed in float32 and returned so", numeric=False)
def wrong_dtype(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    return right(*operands, **kw).astype(np.float64)


@mutant("hc_add", seen="an in-place addition on the caller's streams", numeric=False)
def operand_modified(be: Any, right: Op, h: Host, x: Host) -> Any:
    y = right(h, x)
    h[...] = y
    return y


@mutant("hc_expand", seen="a broadcast view of the input where a copy is promised", numeric=False)
def result_aliases_its_input(be: Any, right: Op, x: Host, *, hc: int) -> Any:
    return np.broadcast_to(x[:, None], (x.shape[0], hc, x.shape[1]))


@mutant("gate", seen="weights alone returned, ids forgotten", numeric=False)
def second_result_forgotten(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    return right(*operands, **kw)[0]


@mutant("act_qdq", seen="an in-place kernel that returns nothing", numeric=False)
def returns_none(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    return None
