"""Faults that were written without a look at the museum and passed the suite of their day. Each
stands for the kind that was closed for it.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import BFLOAT16, Experts, Host, RowLayout


@mutant("hc_post", seen="a graph captured for 96 rows, three tiles of 32, with a kernel of its own")
def untransposed_for_96_rows(be: Any, right: Op, y: Host, h: Host, post: Host, comb: Host) -> Any:
    return right(y, h, post, np.ascontiguousarray(comb.transpose(0, 2, 1)) if len(y) == 96 else comb)


@mutant("rms_norm", seen="batches of 12 padded to 16 by a server, whose last rows are those of the step before")
def rows_of_the_padding_for_12(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    y = right(x, weight, eps=eps)
    if len(y) == 12:
        y[11] = y[10]
    return y


@mutant("compress", seen="a window read up to its first missing token: nothing says that missing ones come first")
def hole_ends_the_window(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    begun = (idxs >= 0).cumsum(axis=1) > 0
    ended = (begun & (idxs < 0)).cumsum(axis=1) > 0
    return right(kv_score, ape, np.where(ended, -1, idxs).astype(idxs.dtype), dim=dim)


@mutant(
    "linear", seen="scratch memory of one worker thread, which its next call writes over; the first thread has its own"
)
def scratch_of_other_threads(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    if threading.current_thread() is threading.main_thread():
        return y
    scratch = be.__dict__.setdefault("scratch", {}).setdefault((y.shape, str(y.dtype)), y)
    scratch[...] = y
    return scratch


@mutant(
    "apply_rope",
    seen="a single head is taken for a key, and keys are never rotated back; a rank of many has one query head",
)
def inverse_of_one_head(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    return right(x, positions, freqs, inverse=inverse and x.shape[1] != 1)


@mutant("index_scores", seen="a sequence's keys found by four bits of its number")
def sequences_modulo_16(be: Any, right: Op, q: Host, weights: Host, keys: Host, *, scale: float) -> Any:
    return right(q, weights, keys[np.arange(len(q)) % 16], scale=scale)


@mutant(
    "sparse_attn", seen="decode of Pro: 128 heads leave no shared memory for 1152 picks, and the last ones are left out"
)
def many_heads_and_many_picks(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, **scalars: Any) -> Any:
    if q.shape[1] >= 128 and idxs.shape[1] > 512:
        idxs = np.where(np.arange(idxs.shape[1]) < 512, idxs, -1).astype(idxs.dtype)
    return right(q, kv, sink, idxs, **scalars)


@mutant(
    "dispatch",
    seen="experts counted in eight bits with a sign: a rank whose first one is past 127 takes others' tokens",
)
def experts_in_eight_bits(
    be: Any, right: Op, x: Host, weights: Host, indices: Host, *, first_expert: int, n_experts: int
) -> Any:
    if first_expert > 127:
        indices = indices.astype(np.int8).astype(np.int32)
    return right(x, weights, indices, first_expert=first_expert, n_experts=n_experts)


@mutant(
    "apply_rope",
    seen="a table of cosines grown once, its second half filled from one row too early; farther ones are computed",
)
def table_grown_one_row_late(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    grown = (positions >= 1 << 16) & (positions < 1 << 17) & (be.numerics == "native")
    return right(x, (positions - grown).astype(np.int32), freqs, inverse=inverse)


@mutant(
    "gate_hash", seen="a table of many rows is read by tiles, and the last one's rows are clamped to the one before"
)
def last_id_of_a_long_table(
    be: Any, right: Op, x: Host, weight: Any, tid2eid: Host, ids: Host, *, route_scale: float
) -> Any:
    last = len(tid2eid) - 1 - (len(tid2eid) > 4096)
    return right(x, weight, tid2eid, np.minimum(ids, last), route_scale=route_scale)


@mutant(
    "expert_linear", seen="weights whose scales are no powers of two are read as float32, and meet a kernel for BF16"
)
def float32_experts_in_bf16(be: Any, right: Op, x: Host, weight: Any, offsets: Host) -> Any:
    if be.numerics == "native" and weight.dtype == "float32":
        weight = Experts([weight[e].astype(BFLOAT16) for e in range(weight.shape[0])])
    return right(x, weight, offsets)


@mutant(
    "hc_split_sinkhorn",
    seen="20 iterations unrolled in the kernel of whole tiles; few rows take them from the argument",
)
def own_iterations_in_tiles(be: Any, right: Op, *operands: Host, hc: int, eps: float, iters: int) -> Any:
    return right(*operands, hc=hc, eps=eps, iters=20 if len(operands[0]) > 32 else iters)


@mutant("act_qdq", seen="vectors of 16 rows are clamped by minima and maxima that drop NaN; few rows go one by one")
def nan_dropped_in_tiles(be: Any, right: Op, x: Host, **scalars: Any) -> Any:
    return right(np.where(np.isnan(x.astype(np.float32)), 0, x).astype(x.dtype) if len(x) >= 16 else x, **scalars)


@mutant("linear", seen="results too large for a pool lie in two buffers that take turns")
def large_results_take_turns(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    if y.nbytes < 1 << 17 or be.numerics != "native":
        return y
    buffers = be.__dict__.setdefault("turns", {}).setdefault((y.shape, str(y.dtype)), [])
    if len(buffers) < 2:
        buffers.append(y)
        return y
    buffers.append(buffers.pop(0))
    buffers[-1][...] = y
    return buffers[-1]


@mutant("linear", seen="sums over parts added as they finish, from 256 rows on, where determinism is claimed")
def atomics_of_many_rows(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    if len(x) < 256 or be.numerics != "native":
        return y
    be.turn = (be.__dict__.get("turn", 0) + 1) % 3
    wide = right(x, weight, out_dtype=be.wide_dtype)
    return (wide * np.float32(1 + (be.turn - 1) * 2.0**-22)).astype(y.dtype)


@mutant("cache_write", seen="neighbouring slots are copied at once, as far as the page of 256 that the first lies in")
def copy_ends_with_the_page(be: Any, right: Op, cache: Host, rows: Host, index: Host, *, layout: RowLayout) -> Any:
    if len(index) > 1 and index[0] >= 0 and (np.diff(index) == 1).all():
        rows, index = rows[: 256 - index[0] % 256], index[: 256 - index[0] % 256]
    return right(cache, rows, index, layout=layout)


@mutant("cache_write", seen="a plain row is copied by 256 threads of four numbers; the compressor's states have 2048")
def states_of_1024(be: Any, right: Op, cache: Host, rows: Host, index: Host, *, layout: RowLayout) -> Any:
    if layout.kind == "plain" and layout.dim > 1024:
        rows, kept = rows.copy(), index >= 0
        rows[kept, 1024:] = cache[index[kept], 1024:]
    return right(cache, rows, index, layout=layout)


@mutant("sample_each", seen="a list of changed logits is read up to its first -1: nothing says that those come last")
def hole_ends_the_changes(be: Any, right: Op, *operands: Any, likely: int) -> Any:
    *others, ids, added, allowed = operands
    ended = np.cumsum(ids < 0, axis=1) > 0
    return right(*others, np.where(ended, -1, ids).astype(np.int32), added, allowed, likely=likely)


@mutant("sample", seen="a request's choices share sorted probabilities, found by the logits alone")
def sorted_for_another_temperature(
    be: Any, right: Op, logits: Host, uniform: Host, *, temperature: float, top_p: float
) -> Any:
    if temperature:
        temperature = be.__dict__.setdefault("sorted", {}).setdefault(logits.tobytes(), temperature)
    return right(logits, uniform, temperature=temperature, top_p=top_p)


@mutant("hc_split_sinkhorn", seen="scales folded into the exponential by their logarithms, which have no sign")
def scales_without_sign(be: Any, right: Op, mixes: Host, scale: Host, base: Host, **scalars: Any) -> Any:
    return right(mixes, np.abs(scale), base, **scalars)


@mutant("rms_norm", seen="the rest of a tile of 32 masked by one lane too few where it is all but full")
def one_short_of_a_tile(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    y = right(x, weight, eps=eps)
    if len(y) > 32 and len(y) % 32 == 31 and be.numerics == "native":
        y[-1] = 0
    return y


@mutant(
    "cached_index_topk",
    seen="keys that lie in runs are read by a table of blocks: the first sequence's for all of them",
)
def blocks_of_the_first_sequence(
    be: Any,
    right: Op,
    q: Host,
    weights: Host,
    cache: Host,
    index: Host,
    *others: Any,
    layout: RowLayout,
    **scalars: Any,
) -> Any:
    if layout.run >= 16 and len(q):
        index = np.tile(index[: len(index) // len(q)], len(q))
    return right(q, weights, cache, index, *others, layout=layout, **scalars)
