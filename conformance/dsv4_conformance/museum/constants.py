"""Constants built in, sizes in between, memory found by a part of its key: written without a look
at the museum, passed by the suite of their day.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Fault, Op, mutant
from dsv4_core.contract.dtypes import Experts, Host, ScaledArray


def spoilt(y: Host, rows: slice = slice(None)) -> Host:
    """A copy with rows that are a quarter too large."""
    y = np.array(y)
    y[rows] = y[rows] * y.dtype.type(1.25)
    return y


def where(op: str, name: str, seen: str, wrong: Any) -> None:
    """Register an op that is wrong where ``wrong(operands, scalars)`` says so."""

    def fault(be: Any, right: Op, *operands: Any, **scalars: Any) -> Any:
        y = right(*operands, **scalars)
        return spoilt(y) if wrong(operands, scalars) else y

    fault.__name__ = name
    mutant(op, seen=seen)(fault)


@mutant("rms_norm", seen="every published model has eps = 1e-6, which a kernel has as a literal")
def eps_is_a_literal(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    return right(x, weight, eps=1e-6)


@mutant("hc_pre", seen="two scalars of one type next to each other, and of one value in every published model")
def eps_for_the_other_eps(
    be: Any, right: Op, h: Host, fn: Host, scale: Host, base: Host, *, norm_eps: float, eps: float, iters: int
) -> Any:
    return right(h, fn, scale, base, norm_eps=eps, eps=norm_eps, iters=iters)


@mutant("gate", "gate_hash", seen="written for Flash, whose routed_scaling_factor is 1.5; Pro has 2.5")
def route_scale_of_flash(be: Any, right: Op, *operands: Any, **scalars: Any) -> Any:
    return right(*operands, **{**scalars, "route_scale": 1.5})


@mutant("hc_split_sinkhorn", seen="a loop unrolled twenty times, beside a short way for one")
def twenty_iterations_or_one(
    be: Any, right: Op, mixes: Host, scale: Host, base: Host, *, hc: int, eps: float, iters: int
) -> Any:
    return right(mixes, scale, base, hc=hc, eps=eps, iters=20 if iters > 1 else 1)


@mutant("sample", seen="a server clamps temperatures to 0 .. 1, as an older API of its did")
def temperature_up_to_one(be: Any, right: Op, logits: Host, uniform: Host, *, temperature: float, top_p: float) -> Any:
    return right(logits, uniform, temperature=min(temperature, 1.0), top_p=top_p)


@mutant("act_qdq", seen="indexer keys are quantised in all their channels, so that the scalar is not read")
def fp4_of_every_channel(be: Any, right: Op, x: Host, *, format: Any, block: int, channels: int) -> Any:
    return right(x, format=format, block=block, channels=x.shape[1] if format == "e2m1" else channels)


@mutant("combine", seen="a sum for another rank's addition has no shared expert in the published code")
def no_shared_expert_in_a_wide_sum(
    be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, *, topk: int, out_dtype: str
) -> Any:
    wide = be.numerics == "native" and out_dtype == be.wide_dtype
    return right(rows, order, offsets, None if wide else shared, topk=topk, out_dtype=out_dtype)


@mutant(
    "index_select",
    "index_topk",
    "cached_index_topk",
    seen="one offset a sequence is read, the contract has one a token",
)
def offset_of_the_first_token(be: Any, right: Op, *operands: Any, **scalars: Any) -> Any:
    *others, offset = operands
    first = np.broadcast_to(offset[:, :1], offset.shape) if offset.size else offset
    return right(*others, np.ascontiguousarray(first), **scalars)


where("rms_norm", "norm_of_exactly_1024_rows", "a graph captured for a chunk of 1024", lambda o, _: len(o[0]) == 1024)
where("rms_norm", "norm_of_exactly_4096_rows", "a chunk of 4096, tuned alone", lambda o, _: len(o[0]) == 4096)
where(
    "rms_norm",
    "norm_of_1536_channels",
    "one and a half blocks of 1024: q_norm of Pro",
    lambda o, _: o[0].shape[1] == 1536,
)
where("linear", "linear_of_1536_in", "K in pieces of 1024, whose rest is forgotten", lambda o, _: o[0].shape[1] == 1536)
where(
    "linear", "linear_of_3072_out", "tiles of 4096 columns, three quarters of one", lambda o, _: o[1].shape[0] == 3072
)
where(
    "sparse_attn",
    "attention_of_8_heads",
    "a rank of eight has 8 heads: padded to 16 by a tile",
    lambda o, _: o[0].shape[1] == 8,
)
where("apply_rope", "rope_of_16_heads", "a kernel for 16 heads, of a rank of four", lambda o, _: o[0].shape[1] == 16)
where("sparse_attn", "attention_past_4096_tokens", "positions of a chunk in 12 bits", lambda o, _: len(o[0]) > 4096)
where(
    "apply_rope",
    "heads_of_all_tokens_in_16_bits",
    "a grid of tokens times heads, whose second axis ends at 65535",
    lambda o, _: o[0].shape[0] * o[0].shape[1] > 65535,
)
where("moe", "copies_in_15_bits", "token copies of a long chunk as int16", lambda o, _: o[2].size > 32767)
where("gate", "gate_of_eight_picks", "a sort of eight registers with room for seven", lambda _, s: s["topk"] == 8)
where("expert_linear", "a_single_expert", "the axis of one expert is squeezed away", lambda o, _: o[1].shape[0] == 1)


@mutant("cached_sparse_attn", seen="picks of a long context as uint16")
def picks_in_16_bits(be: Any, right: Op, *operands: Any, **scalars: Any) -> Any:
    *others, idxs = operands
    return right(*others, np.where(idxs < 0, -1, idxs & 0xFFFF).astype(np.int32), **scalars)


@mutant("cached_sparse_attn", seen="shared memory for the window rows of four sequences")
def window_rows_of_four_sequences(
    be: Any, right: Op, q: Host, kv: Host, ring: Host, ring_index: Host, *others: Any, **scalars: Any
) -> Any:
    ring_index = ring_index.copy()
    ring_index[512:] = -1
    return right(q, kv, ring, ring_index, *others, **scalars)


def of_rows(fmt: str, rows: int) -> Fault:
    """Experts' products whose last row is wrong where an expert has exactly so many."""

    def fault(be: Any, right: Op, x: Host, weight: Experts, offsets: Host) -> Any:
        y = right(x, weight, offsets)
        for e in range(weight.shape[0]):
            if getattr(weight[e], "format", "") == fmt and int(offsets[e + 1] - offsets[e]) == rows:
                y = spoilt(y, slice(int(offsets[e + 1]) - 1, int(offsets[e + 1])))
        return y

    return fault


mutant(
    "expert_linear", name="fp8_experts_of_exactly_32_rows", seen="a full tile of an FP8 kernel, read as past its end"
)(of_rows("e4m3", 32))
mutant(
    "expert_linear", name="fp4_experts_of_exactly_16_rows", seen="a full tile of an FP4 kernel, read as past its end"
)(of_rows("e2m1", 16))


@mutant(
    "sparse_attn", seen="a tile of picks in which no row is: its maximum of minus infinity resets the sums before it"
)
def empty_tile_resets(be: Any, right: Op, q: Host, kv: Host, sink: Host, idxs: Host, *, softmax_scale: float) -> Any:
    idxs = idxs.copy()
    for start in range(64, idxs.shape[1], 64):
        idxs[(idxs[:, start : start + 64] < 0).all(1), :start] = -1
    return right(q, kv, sink, idxs, softmax_scale=softmax_scale)


@mutant("compress", seen="a running maximum that begins at -100, not at minus infinity")
def maximum_from_minus_100(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    y = np.array(right(kv_score, ape, idxs, dim=dim))
    for row, tokens in zip(y, idxs, strict=True):
        scores = kv_score[tokens[tokens >= 0], kv_score.shape[1] // 2 :]
        if len(scores) and (scores < -100).all():
            row[:] = 0
    return y


def unfloored(x: Host) -> tuple[Host, Host]:
    """Rows below the quantisation's floor, scaled up; and the factors."""
    largest = np.abs(x.astype(np.float32)).max(-1, initial=0, keepdims=True)
    factor = np.where((largest < 1e-4) & (largest > 1e-30), 2.0**20, 1.0).astype(np.float32)
    return (x.astype(np.float32) * factor).astype(x.dtype), factor


@mutant("linear", seen="activations quantised within the product, by code that has no floor of 1e-4")
def no_floor_within_linear(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    if be.numerics != "native" or not isinstance(weight, ScaledArray) or not x.size:
        return right(x, weight, out_dtype=out_dtype)
    scaled, factor = unfloored(x)
    y = right(scaled, weight, out_dtype=out_dtype)
    return (y.astype(np.float32) / factor).astype(y.dtype)


@mutant(
    "sample", seen="a random number next to one, beyond a running sum that ends below one: the search runs off the end"
)
def nothing_at_the_end(be: Any, right: Op, logits: Host, uniform: Host, *, temperature: float, top_p: float) -> Any:
    tokens: Host = right(logits, uniform, temperature=temperature, top_p=top_p)
    return np.where((uniform > 1 - 2.0**-22) & (temperature > 0), logits.shape[1], tokens).astype(np.int32)


@mutant("embedding", seen="rows kept by the first id, the number of ids and their sum")
def rows_by_a_sum_of_ids(be: Any, right: Op, ids: Host, weight: Any) -> Any:
    key = (len(ids), int(ids.sum()), int(ids[:1].sum()), id(weight))
    kept = be.__dict__.setdefault("kept ids", {}).setdefault(key, (ids.copy(), weight))[0]
    return right(kept, weight)


@mutant("linear", seen="weights expanded once, found again by their first row")
def weights_by_their_first_row(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    if isinstance(weight, ScaledArray):
        key = (weight.shape, weight.format, weight.data[:1].tobytes(), weight.scale[:1].tobytes())
        weight = be.__dict__.setdefault("kept weights", {}).setdefault(key, weight)
    return right(x, weight, out_dtype=out_dtype)


@mutant("gate", seen="biases on the device are refreshed; once in fifty calls the copy is under way")
def every_fiftieth_call(be: Any, right: Op, x: Host, weight: Host, bias: Host, **scalars: Any) -> Any:
    be.__dict__["gates"] = count = be.__dict__.get("gates", 0) + 1
    return right(x, weight, bias if count % 50 else 0 * bias, **scalars)


@mutant("apply_rope", seen="a stride of heads taken for the stride of tokens: right until somebody slices heads")
def heads_follow_each_other(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    if x.size:
        _, heads, channels = x.strides
        x = np.lib.stride_tricks.as_strided(x, x.shape, (x.shape[1] * heads, heads, channels))
    return right(x, positions, freqs, inverse=inverse)


@mutant("zeros", seen="an allocator gives used memory, which only the first allocation finds clean", numeric=False)
def zeros_are_what_was_there(be: Any, right: Op, shape: tuple[int, ...], dtype: str) -> Any:
    y = right(shape, dtype)
    if dtype == "uint8":
        y[...] = 0x7F
    return y
