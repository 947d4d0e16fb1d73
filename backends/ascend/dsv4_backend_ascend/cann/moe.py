"""The gate, swiglu, dispatch and combine in npu ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.cann.call import call

if TYPE_CHECKING:
    from dsv4_backend_ascend.chip import ChipBackend

ROUTED = "routed among"
GATES = {"950": "npu_moe_gating_top_k"} | dict.fromkeys(("910B", "910C"), "moe_gating_top_k_hash")
SQRT_SOFTPLUS = 2  # norm_type of both
EPS = 1e-20  # added to the sum: a token whose scores are all lost gets zeros, and no NaN


def router_logits(backend: ChipBackend, x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """The router's product, float32 [tokens, experts]; while planning its shape alone, for
    nothing may be kept of it.
    """
    if backend.planning:
        return x.new_empty((x.shape[0], router.shape[0]), dtype=torch.float32)
    return backend.product(x, (router,), wide=True)


def routed(
    backend: ChipBackend, chosen: tuple[torch.Tensor, torch.Tensor], router: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A gate's weights and picks, of which ``dispatch`` is told among how many they were made."""
    backend.kept.of((chosen[1], ROUTED), lambda: router.shape[0])
    return chosen


def gate(
    op: str, logits: torch.Tensor, bias: torch.Tensor, *, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contract ``gate`` after the router's product, float32 [tokens, experts], but for scores so
    low that 1 + e^x is 1.
    """
    weights, picks, _ = call(
        op,
        x=logits,
        k=topk,
        bias=bias,
        norm_type=SQRT_SOFTPLUS,
        routed_scaling_factor=route_scale,
        eps=EPS,
    )
    return weights, picks


def gate_hash(
    op: str, logits: torch.Tensor, tid2eid: torch.Tensor, ids: torch.Tensor, *, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contract ``gate_hash`` after the router's product, as ``gate``."""
    weights, picks, _ = call(
        op,
        x=logits,
        k=tid2eid.shape[1],
        input_ids=ids,
        tid2eid=tid2eid,
        norm_type=SQRT_SOFTPLUS,
        routed_scaling_factor=route_scale,
        eps=EPS,
    )
    return weights, picks


def swiglu(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, *, limit: float) -> torch.Tensor:
    """Contract ``swiglu``: in float32, so that the routing weight comes before the rounding."""
    return gated(torch.cat([gate, up], dim=-1).unflatten(1, (2, -1)), weights, limit=limit)


def gated(pairs: torch.Tensor, weights: torch.Tensor | None, *, limit: float) -> torch.Tensor:
    """``swiglu`` of gate and up side by side [rows, 2, channels], in whatever order they lie."""
    both = pairs.to(torch.float32, memory_format=torch.contiguous_format).flatten(1)
    y = call("npu_clipped_swiglu", x=both, alpha=1.0, limit=limit, bias=0.0, interleaved=False)
    return (y if weights is None else y * weights.unsqueeze(-1)).to(pairs.dtype)  # type: ignore[no-any-return]


def dispatch(
    backend: ChipBackend,
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    *,
    first_expert: int,
    n_experts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contract ``dispatch``: copies for other ranks go to one expert more, which sorts them to the
    end in their order; there are none where all that the gate chose among are here.
    """
    local = indices
    if first_expert or backend.kept.known((indices, ROUTED)) != n_experts:
        local = indices - first_expert
        local = local.where((local >= 0) & (local < n_experts), n_experts)
    rows, order, ends, _ = call(
        "npu_moe_init_routing_v2",
        x=x,
        expert_idx=local.to(torch.int32),
        expert_num=n_experts + 1,
        expert_tokens_num_type=0,
        expert_tokens_num_flag=True,
        active_expert_range=[0, n_experts + 1],
        row_idx_type=1,
    )
    offsets = torch.nn.functional.pad(ends[:n_experts], (1, 0)).to(torch.int32)
    return rows, weights.flatten()[order.long()], order, offsets


def combine(
    rows: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    shared: torch.Tensor | None,
    *,
    topk: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Contract ``combine``: in float32, other ranks' rows as zeros."""
    own = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    position = torch.empty_like(order).scatter_(
        0, order.long(), torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    )
    y = call(
        "npu_moe_token_unpermute",
        permuted_tokens=rows.float().masked_fill(~own.unsqueeze(-1), 0),
        sorted_indices=position,
        probs=rows.new_ones((rows.shape[0] // topk, topk), dtype=torch.float32),
    )
    return (y if shared is None else y + shared.float()).to(out_dtype)  # type: ignore[no-any-return]
