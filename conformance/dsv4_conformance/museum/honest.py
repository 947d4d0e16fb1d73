"""Honest variants: right in every respect, and different in the last bits. The suite must not fail
one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4_conformance.museum import otherwise
from dsv4_conformance.museum.fault import Fault, Op, altered
from dsv4_core.contract.backend import Backend
from dsv4_core.contract.dtypes import BFLOAT16, Experts, Host, ScaledArray


@dataclass(frozen=True)
class Variant:
    """A backend that computes the same in another way. ``narrower``, ``declares``: what it says of
    itself.
    """

    name: str
    how: str
    steps: dict[str, Fault] = field(default_factory=dict)
    narrower: dict[str, tuple[str, ...]] = field(default_factory=dict)
    declares: dict[str, Any] = field(default_factory=dict)

    def build(self, base: type[Backend]) -> type[Backend]:
        """The class: ``base`` with its sums, or whole ops, done otherwise."""
        return altered(base, self.name, self.steps, narrower=self.narrower, **self.declares)


def blocked(size: int) -> Fault:
    """Sums of ``size`` products each, added one after another."""

    def dot(be: Any, right: Op, a: Host, b: Host) -> Host:
        y = right(a[..., :size], b[..., :size, :])
        for k in range(size, a.shape[-1], size):
            y = y + right(a[..., k : k + size], b[..., k : k + size, :])
        return np.asarray(y)

    return dot


def pairwise(be: Any, right: Op, a: Host, b: Host) -> Host:
    """Halves of the sum on their own, down to 16 products."""
    n = a.shape[-1]
    if n <= 16:
        return np.asarray(right(a, b))
    return pairwise(be, right, a[..., : n // 2], b[..., : n // 2, :]) + pairwise(
        be, right, a[..., n // 2 :], b[..., n // 2 :, :]
    )


def backwards(be: Any, right: Op, a: Host, b: Host) -> Host:
    """The last product first."""
    return np.asarray(right(np.ascontiguousarray(a[..., ::-1]), np.ascontiguousarray(b[..., ::-1, :])))


def transposed(be: Any, right: Op, a: Host, b: Host) -> Host:
    """The other BLAS order: ``(b^T a^T)^T``."""
    return np.asarray(
        right(np.ascontiguousarray(b.swapaxes(-1, -2)), np.ascontiguousarray(a.swapaxes(-1, -2)))
    ).swapaxes(-1, -2)


def fused_multiply_add(be: Any, right: Op, a: Host, b: Host) -> Host:
    """Products of 4 channels exact, one rounding per addition to the accumulator."""
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), a.dtype)
    step = 4 if a.shape[-1] * total.size < 1 << 22 else 64  # a loop in Python: coarser for large products
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], step):
        total = (total + wide_a[..., k : k + step] @ wide_b[..., k : k + step, :]).astype(a.dtype)
    return total


def float64_sums(be: Any, right: Op, a: Host, b: Host) -> Host:
    """A wider accumulator than the contract asks for."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(a.dtype)


def row_splits(be: Any, right: Op, a: Host, b: Host) -> Host:
    """Tiles of 4 rows, so that another BLAS kernel runs."""
    if a.ndim > 2:
        return np.asarray(right(a, b))
    parts = [right(a[i : i + 4], b) for i in range(0, len(a), 4)]
    return np.concatenate(parts) if parts else np.asarray(right(a, b))


def sequential(be: Any, right: Op, x: Host, axis: int) -> Host:
    """One term after another."""
    return (
        np.take(np.cumsum(x, axis=axis, dtype=x.dtype), [-1], axis=axis)
        if x.shape[axis]
        else np.asarray(right(x, axis))
    )


def sequential_mean(be: Any, right: Op, x: Host) -> Host:
    """Squares added one after another."""
    return (
        np.cumsum(x * x, axis=-1, dtype=x.dtype)[:, -1:] / x.dtype.type(x.shape[1])
        if x.shape[1]
        else np.asarray(right(x))
    )


def bf16_probabilities(be: Any, right: Op, scores: Host, count: Host, sink: Host) -> Host:
    """Rounded before they meet the values, as tensor cores take them."""
    weight = right(scores, count, sink)
    return weight.astype(BFLOAT16).astype(weight.dtype) if be.numerics == "native" else weight


def promoted(be: Any, right: Op, x: Host, weight: Any) -> Host:
    """FP8 products summed in 14 bits within 128 channels, promoted to float32 after each."""
    if not isinstance(weight, ScaledArray) or be.numerics != "native":
        return np.asarray(right(x, weight))
    matrix = weight.dequantise()
    total = np.zeros((len(x), weight.shape[0]), x.dtype)
    for k in range(0, x.shape[1], 128):
        partial = np.zeros(total.shape)
        for i in range(k, min(k + 128, x.shape[1]), 32):
            partial = partial + x[:, i : i + 32].astype(np.float64) @ matrix[:, i : i + 32].astype(np.float64).T
            _, exponent = np.frexp(partial)
            partial = np.trunc(np.ldexp(partial, 14 - exponent)) * np.ldexp(1.0, exponent - 14)
        total = total + partial.astype(x.dtype)
    return total


def last_expert_first(
    be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, *, topk: int, out_dtype: str
) -> Any:
    """Each token's copies added in the other order, the shared expert first."""
    local = int(offsets[-1])
    copies = np.zeros((len(rows), rows.shape[1]), be.wide_dtype)
    copies[order[:local]] = rows[:local]
    parts = copies.reshape(-1, topk, rows.shape[1])
    total = np.zeros_like(parts[:, 0]) if shared is None else shared.astype(be.wide_dtype)
    for j in range(topk - 1, -1, -1):
        total = total + parts[:, j]
    return be.round_to(total, out_dtype)


def online_softmax(be: Any, right: Op, scores: Host, count: Host, sink: Host) -> Host:
    """Two halves with maxima of their own, put together at the end."""
    middle = scores.shape[-1] // 2
    if not middle:
        return np.asarray(right(scores, count, sink))
    parts, tops, totals = [], [], []
    for part in (slice(None, middle), slice(middle, None)):
        s = np.where(count[..., part] > 0, scores[..., part], -np.inf)
        top = np.maximum(s.max(-1, keepdims=True), np.finfo(s.dtype).min)
        parts.append(np.exp(s - top) * count[..., part])
        tops.append(top)
        totals.append(parts[-1].sum(-1, keepdims=True))
    top = np.maximum(np.maximum(*tops), sink)
    factors = [np.exp(t - top) for t in tops]
    total = totals[0] * factors[0] + totals[1] * factors[1] + np.exp(sink - top)
    return np.concatenate([p * (f / total) for p, f in zip(parts, factors, strict=True)], axis=-1)


def fused_ffn(be: Any, right: Op, x: Host, w1: Any, w3: Any, w2: Any, *, limit: float) -> Any:
    """Gate and up stay wide between w1, w3 and SwiGLU: one kernel, one rounding less."""
    gate, up = be.linear(x, w1, out_dtype=be.wide_dtype), be.linear(x, w3, out_dtype=be.wide_dtype)
    return be.linear(be.swiglu(gate, up, None, limit=limit), w2, out_dtype=be.activation_dtype)


def fused_pre_norm(
    be: Any,
    right: Op,
    h: Host,
    fn: Host,
    scale: Host,
    base: Host,
    weight: Host,
    *,
    norm_eps: float,
    eps: float,
    iters: int,
) -> Any:
    """The reduced stream stays wide until the norm has been applied."""
    wide, mixes = be.mixes(h, fn, norm_eps)
    pre, post, comb = be.hc_split_sinkhorn(mixes, scale, base, hc=h.shape[1], eps=eps, iters=iters)
    x = be.reduce(wide, pre)
    return be.rounded(x / np.sqrt(be.square_mean(x) + x.dtype.type(norm_eps)) * be.widen(weight)), post, comb


def experts_one_by_one(
    be: Any,
    right: Op,
    x: Host,
    weights: Host,
    indices: Host,
    shared: Any,
    w1: Experts,
    w3: Experts,
    w2: Experts,
    **kw: Any,
) -> Any:
    """A fused layer: gate and up wide, experts from the last to the first, outputs added as they
    come.
    """
    total = np.zeros((len(x), w2.shape[1]), be.wide_dtype)
    for e in range(w1.shape[0] - 1, -1, -1):
        token, slot = np.nonzero(indices == e + kw["first_expert"])
        if token.size:
            gate, up = (
                be.linear(x[token], w1[e], out_dtype=be.wide_dtype),
                be.linear(x[token], w3[e], out_dtype=be.wide_dtype),
            )
            y = be.linear(
                be.swiglu(gate, up, weights[token, slot], limit=kw["limit"]), w2[e], out_dtype=be.activation_dtype
            )
            total[token] += y
    return be.round_to(total if shared is None else total + shared.astype(total.dtype), kw["out_dtype"])


_FP8 = "fp8 products summed in less than float32 within 128 channels, promoted to float32 after each"
_BF16 = "probabilities in bfloat16"

VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("blocks_of_32", "sums in blocks of 32, one after another", {"dot": blocked(32), "total": sequential}),
        Variant("blocks_of_128", "sums in blocks of 128", {"dot": blocked(128)}),
        Variant("pairwise", "pairwise sums down to 16 terms", {"dot": pairwise}),
        Variant("backwards", "the last product first", {"dot": backwards}),
        Variant("transposed", "float32 in the other BLAS order", {"dot": transposed}),
        Variant("fused_multiply_add", "exact products, one rounding per addition", {"dot": fused_multiply_add}),
        Variant("float64_sums", "sums in float64", {"dot": float64_sums}),
        Variant("row_splits", "tiles of four rows", {"dot": row_splits}),
        Variant(
            "sequential_totals",
            "norms and softmax sums one term after another",
            {"total": sequential, "square_mean": sequential_mean},
        ),
        Variant(
            "online_softmax", "softmax in two halves with maxima of their own", {"softmax_with_sink": online_softmax}
        ),
        Variant("last_expert_first", "experts' outputs added in the other order", {"combine": last_expert_first}),
        Variant(
            "fused_experts", "moe and ffn fused: gate and up stay wide", {"moe": experts_one_by_one, "ffn": fused_ffn}
        ),
        Variant("fused_pre_norm", "mHC reduction and norm fused", {"hc_pre_norm": fused_pre_norm}),
        Variant(
            "bf16_probabilities",
            "probabilities in BF16, declared",
            {"softmax_with_sink": bf16_probabilities},
            {"sparse_attn": (_BF16,), "cached_sparse_attn": (_BF16,)},
        ),
        Variant(
            "fp8_partial_sums",
            "FP8 partial sums in 14 bits, declared",
            {"times": promoted},
            {"linear": (_FP8,), "expert_linear": (_FP8,)},
        ),
        Variant("split_k", "products shared among four programs, whose sums are added", {"dot": otherwise.split_k(4)}),
        Variant(
            "scales_after_products", "FP8 codes multiplied, blocks scaled", {"times": otherwise.scales_after_products}
        ),
        Variant("rows_gathered", "attention gathers rows for every token", {"attend": otherwise.always_gathered}),
        Variant("sink_as_a_column", "the sink is one more score", {"softmax_with_sink": otherwise.sink_as_a_column}),
        Variant("powers_of_two", "softmax by exp2", {"softmax_with_sink": otherwise.powers_of_two}),
        Variant(
            "other_ties",
            "of equal scores the highest row or expert, declared",
            {"best": otherwise.any_tie, "gate": otherwise.any_tie_of_experts},
            declares={"ties": "any"},
        ),
        Variant("picks_by_row", "the indexer's picks in order of rows", {"best": otherwise.in_order_of_rows}),
        Variant(
            "norm_by_reciprocal", "the weight first, then the reciprocal root", {"rms_norm": otherwise.by_reciprocal}
        ),
        Variant(
            "complex_rope", "RoPE in complex numbers, from a float64 table", {"apply_rope": otherwise.complex_rope}
        ),
        Variant("butterflies", "Hadamard in stages of sums and differences", {"hadamard": otherwise.butterflies}),
        Variant(
            "weight_before_sigmoid", "SwiGLU's factors in another order", {"swiglu": otherwise.swiglu_weight_first}
        ),
        Variant("softplus_by_log1p", "the gate's softplus by log1p", {"router_scores": otherwise.softplus_by_log1p}),
        Variant("post_in_one_product", "mHC's post mix as one product", {"hc_post": otherwise.one_product_post}),
        Variant(
            "scattered_experts",
            "experts' outputs added in an order of chance",
            {"combine": otherwise.scattered_experts},
        ),
        Variant(
            "other_memory",
            "results transposed in memory and read-only, as some libraries give them",
            dict.fromkeys(("linear", "rms_norm", "hc_post", "logits", "swiglu"), otherwise.other_memory),
        ),
        Variant(
            "in_a_pool", "rows shared among three threads", dict.fromkeys(("rms_norm", "linear"), otherwise.in_a_pool)
        ),
        Variant(
            "functional_arrays",
            "a write gives another array and spoils the one given",
            {"cache_write": otherwise.functional},
        ),
        Variant("padded_tiles", "experts' rows in padded tiles of eight", {"expert_linear": otherwise.tiles_of_rows}),
        Variant(
            "flushes_subnormals",
            "numbers below the least normal one are zero, declared",
            {
                "widen": otherwise.flushing_operands,
                "round_to": otherwise.flushing_results,
                "unpack": otherwise.flushing_rows,
            },
            declares={"flushes_subnormals": True},
        ),
    )
}
