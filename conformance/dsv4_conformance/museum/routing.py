"""Faults of the mixture of experts: gate, dispatch, clamp, combine."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import BFLOAT16, Host


def scores_of(x: Host, weight: Host) -> Host:
    """Router scores in float64."""
    return np.sqrt(np.logaddexp(x.astype(np.float64) @ weight.astype(np.float64).T, 0.0))


def take(scores: Host, indices: Host) -> Host:
    """Scores of the chosen experts."""
    return np.take_along_axis(scores, indices.astype(np.int64), 1)


@mutant("swiglu", seen="swiglu_limit is new in this model; older expert code has no clamp")
def clamp_missing_routed(be: Any, right: Op, gate: Host, up: Host, weights: Any, *, limit: float) -> Any:
    return right(gate, up, weights, limit=limit if weights is None else 1e30)


@mutant("swiglu", seen="the clamp added to the routed experts alone; shipped in a public port")
def clamp_missing_shared(be: Any, right: Op, gate: Host, up: Host, weights: Any, *, limit: float) -> Any:
    return right(gate, up, weights, limit=1e30 if weights is None else limit)


@mutant("swiglu", seen="gate is clamped above only, up on both sides; another model of the same make clamps otherwise")
def clamp_on_the_wrong_side(be: Any, right: Op, gate: Host, up: Host, weights: Any, *, limit: float) -> Any:
    return right(np.maximum(gate, gate.dtype.type(-limit)), np.minimum(up, up.dtype.type(limit)), weights, limit=limit)


@mutant("swiglu", seen="min and max that return the other operand where one is NaN: a diverging model goes on silently")
def nan_swallowed(be: Any, right: Op, gate: Host, up: Host, weights: Any, *, limit: float) -> Any:
    quiet = [np.where(x != x, x.dtype.type(limit), x) for x in (gate, up)]  # noqa: PLR0124  NaN is what is not itself
    return right(*quiet, weights, limit=limit)


@mutant(
    "moe",
    seen="other mixtures of experts weigh the experts' outputs; here the weight comes before w2 and its quantisation",
)
def routing_weight_after_w2(
    be: Any, right: Op, x: Host, weights: Host, indices: Host, shared: Any, w1: Any, w3: Any, w2: Any, **kw: Any
) -> Any:
    rows, row_weights, order, offsets = be.dispatch(
        x, weights, indices, first_expert=kw["first_expert"], n_experts=w1.shape[0]
    )
    gate, up = be.expert_linear(rows, w1, offsets), be.expert_linear(rows, w3, offsets)
    y = be.expert_linear(be.swiglu(gate, up, None, limit=kw["limit"]), w2, offsets)
    y = (y.astype(row_weights.dtype) * row_weights[:, None]).astype(y.dtype)
    return be.combine(y, order, offsets, shared, topk=indices.shape[1], out_dtype=kw["out_dtype"])


@mutant("gate", seen="the bias balances load and belongs to the choice alone; adding it to the weights trains as well")
def bias_added_to_the_weights(
    be: Any, right: Op, x: Host, weight: Host, bias: Host, *, topk: int, route_scale: float
) -> Any:
    weights, indices = right(x, weight, bias, topk=topk, route_scale=route_scale)
    chosen = take(scores_of(x, weight) + bias, indices)
    return (chosen / chosen.sum(-1, keepdims=True) * route_scale).astype(weights.dtype), indices


@mutant("gate", "gate_hash", seen="the gate's weight is BF16, so its product is left in BF16; shipped in a public port")
def router_in_bf16(be: Any, right: Op, x: Host, weight: Host, *rest: Any, route_scale: float, **kw: Any) -> Any:
    weights, indices = right(x, weight, *rest, route_scale=route_scale, **kw)
    logits = (x.astype(np.float64) @ weight.astype(np.float64).T).astype(BFLOAT16).astype(np.float32)
    scores = np.sqrt(np.logaddexp(logits, np.float32(0)))
    if kw:
        indices = np.argsort(-(scores + rest[0]), axis=-1, kind="stable")[:, : kw["topk"]].astype(np.int32)
    chosen = take(scores, indices)
    return (chosen / chosen.sum(-1, keepdims=True) * route_scale).astype(weights.dtype), indices


@mutant("gate", "gate_hash", seen="norm_topk_prob read as false")
def weights_not_normalised(be: Any, right: Op, x: Host, weight: Host, *rest: Any, route_scale: float, **kw: Any) -> Any:
    weights, indices = right(x, weight, *rest, route_scale=route_scale, **kw)
    return (take(scores_of(x, weight), indices) * route_scale).astype(weights.dtype), indices


@mutant("gate", "gate_hash", seen="routed_scaling_factor forgotten: 1.5 or 2.5 by model, 1 in many others")
def weights_not_scaled(be: Any, right: Op, *operands: Any, route_scale: float, **kw: Any) -> Any:
    del route_scale
    return right(*operands, route_scale=1.0, **kw)


@mutant("gate", seen="a top-k that keeps the last of equal scores")
def router_ties_to_the_higher_id(
    be: Any, right: Op, x: Host, weight: Host, bias: Host, *, topk: int, route_scale: float
) -> Any:
    weights, indices = right(
        x, np.ascontiguousarray(weight[::-1]), np.ascontiguousarray(bias[::-1]), topk=topk, route_scale=route_scale
    )
    return weights, (weight.shape[0] - 1 - indices).astype(np.int32)


@mutant("gate", seen="sigmoid is the older model's score function")
def sigmoid_scores(be: Any, right: Op, x: Host, weight: Host, bias: Host, *, topk: int, route_scale: float) -> Any:
    weights, indices = right(x, weight, bias, topk=topk, route_scale=route_scale)
    chosen = take(1 / (1 + np.exp(-(x.astype(np.float64) @ weight.astype(np.float64).T))), indices)
    return (chosen / chosen.sum(-1, keepdims=True) * route_scale).astype(weights.dtype), indices


@mutant("gate_hash", seen="hash layers run through the score path: same shapes, plausible text")
def hash_table_ignored(
    be: Any, right: Op, x: Host, weight: Host, tid2eid: Host, ids: Host, *, route_scale: float
) -> Any:
    return be.gate(x, weight, np.zeros(weight.shape[0], np.float32), topk=tid2eid.shape[1], route_scale=route_scale)


@mutant("expert_linear", seen="a loop over range(experts - 1), or a grid one block short")
def last_expert_dropped(be: Any, right: Op, x: Host, weight: Any, offsets: Host) -> Any:
    y = right(x, weight, offsets)
    y[offsets[-2] : offsets[-1]] = 0
    return y


@mutant("expert_linear", seen="rows of other ranks left as the allocator gave them")
def other_ranks_rows_not_cleared(be: Any, right: Op, x: Host, weight: Any, offsets: Host) -> Any:
    y = right(x, weight, offsets)
    y[offsets[-1] :] = 1
    return y


@mutant("dispatch", seen="a sort that is not stable: rows of one expert in another order each run", numeric=False)
def dispatch_not_stable(be: Any, right: Op, x: Host, weights: Host, indices: Host, **kw: Any) -> Any:
    rows, row_weights, order, offsets = right(x, weights, indices, **kw)
    for e in range(len(offsets) - 1):
        part = slice(offsets[e], offsets[e + 1])
        rows[part], row_weights[part], order[part] = (
            rows[part][::-1].copy(),
            row_weights[part][::-1].copy(),
            order[part][::-1].copy(),
        )
    return rows, row_weights, order, offsets


@mutant("combine", seen="rows of other ranks counted twice once results are reduced")
def other_ranks_rows_counted(be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, **kw: Any) -> Any:
    everywhere = offsets.copy()
    everywhere[-1] = len(rows)
    return right(rows, order, everywhere, shared, **kw)


@mutant("combine", seen="the shared expert's output added on the path with one rank only")
def shared_expert_forgotten(be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, **kw: Any) -> Any:
    return right(rows, order, offsets, None, **kw)


@mutant("combine", seen="an atomic add in BF16, one expert after the other")
def combined_in_bf16(
    be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, *, topk: int, out_dtype: str
) -> Any:
    y = right(rows, order, offsets, shared, topk=topk, out_dtype=out_dtype)
    copies = np.zeros((len(rows), rows.shape[1]), np.float32)
    copies[order[: offsets[-1]]] = rows[: offsets[-1]]
    parts = copies.reshape(-1, topk, rows.shape[1])
    total = np.zeros_like(parts[:, 0])
    for j in range(topk):
        total = (total + parts[:, j]).astype(BFLOAT16).astype(np.float32)
    return (total if shared is None else total + shared.astype(np.float32)).astype(y.dtype)


@mutant("gate", seen="a sorting network that keeps the order of two equal scores, not of three", numeric=False)
def of_many_equal_the_last(be: Any, right: Op, x: Host, weight: Host, bias: Host, **kw: Any) -> Any:
    weights, indices = right(x, weight, bias, **kw)
    equal = ~x.any(1) & (bias == bias[0]).all()
    indices = np.where(equal[:, None] & (indices == indices.max(1, keepdims=True)), len(bias) - 1, indices)
    return weights, indices.astype(np.int32)
