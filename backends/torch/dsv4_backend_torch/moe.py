"""Routing, dispatch, SwiGLU and combination."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.matmul import TorchMatmul, Weight
from dsv4_core.contract.ops.moe import MoeOps

SHORT = 64  # rows that are not worth cutting into blocks


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)`` of a wide tensor that may be overwritten; torch's own is a unit off in
    float64, where that shows.
    """
    return x / x.neg().exp_().add_(1) if x.dtype == torch.float64 else functional.silu(x, inplace=True)


def swiglu_(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """``silu(min(gate, limit)) * clamp(up, -limit, limit)`` of wide tensors, which are
    overwritten.
    """
    return silu(gate.clamp_(max=limit)).mul_(up.clamp_(-limit, limit))


class TorchMoe(TorchMatmul, MoeOps):
    """Contracts of ``ops/moe.py``."""

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, *, topk: int, route_scale: float) -> tuple[Tensor, Tensor]:
        if self.compiled and (few := self.compiled.gate(x, weight, bias, None, None, topk, route_scale)):
            return few
        scores = self.router_scores(x, weight)
        indices = (
            (scores + self.widen(bias)).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
        )  # topk does not promise the lower of equals
        return self.route_weights(scores, indices, route_scale), indices.to(torch.int32)

    def gate_hash(
        self, x: Tensor, weight: Tensor, tid2eid: Tensor, ids: Tensor, *, route_scale: float
    ) -> tuple[Tensor, Tensor]:
        if self.compiled and (few := self.compiled.gate(x, weight, None, tid2eid, ids, tid2eid.shape[1], route_scale)):
            return few
        indices = tid2eid.index_select(0, ids)
        return self.route_weights(self.router_scores(x, weight), indices, route_scale), indices.to(torch.int32)

    def router_scores(self, x: Tensor, weight: Weight) -> Tensor:
        """``sqrt(softplus(x . weight))``; beyond 40 softplus is the identity, in float64 too."""
        return functional.softplus(self.product(x, (weight,), wide=True), threshold=40).sqrt_()

    def route_weights(self, scores: Tensor, indices: Tensor, route_scale: float) -> Tensor:
        """The chosen experts' scores, normalised and scaled."""
        chosen = scores.gather(-1, indices)
        return (chosen / chosen.sum(-1, keepdim=True)).mul_(route_scale)

    def dispatch(
        self, x: Tensor, weights: Tensor, indices: Tensor, *, first_expert: int, n_experts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local = indices.reshape(-1) - first_expert
        local = torch.where((local >= 0) & (local < n_experts), local, n_experts)
        bounds = torch.arange(n_experts + 1, dtype=local.dtype, device=local.device)
        if self.on_cpu:
            expert, order = local.sort(stable=True)
            offsets = torch.searchsorted(expert, bounds, out_int32=True)
        else:  # in float32, exact to 2^24: whole numbers are sorted, and searched, on a scalar core of some devices
            order = local.to(torch.float32).sort(stable=True).indices.to(torch.int32)
            offsets = (local[:, None] < bounds).sum(0, dtype=torch.int32)
        rows = x.index_select(0, order.div(indices.shape[1], rounding_mode="floor"))
        return rows, weights.reshape(-1).index_select(0, order), order.to(torch.int32), offsets

    def swiglu(self, gate: Tensor, up: Tensor, weights: Tensor | None, *, limit: float) -> Tensor:
        return self.weighted_swiglu(gate, up, None if weights is None else weights[:, None], limit)

    def weighted_swiglu(self, gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
        """``silu(min(gate, limit)) * clamp(up, -limit, limit) * weight``, wide, rounded once."""
        if gate.shape[0] <= SHORT:
            return self._swiglu(gate, up, weight, limit)
        out = torch.empty(gate.shape, dtype=self.act_type, device=gate.device)
        for part in self.blocks(*gate.shape):
            out[part] = self._swiglu(gate[part], up[part], None if weight is None else weight[part], limit)
        return out

    def _swiglu(self, gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
        y = silu(self.widen(gate).clamp(max=limit)).mul_(self.widen(up).clamp(-limit, limit))
        return self.rounded(y if weight is None else y.mul_(weight))

    def combine(
        self, rows: Tensor, order: Tensor, offsets: Tensor, shared: Tensor | None, *, topk: int, out_dtype: str
    ) -> Tensor:
        copies, dim = rows.shape
        copy = torch.arange(copies, dtype=offsets.dtype, device=rows.device)
        rows = torch.where((copy < offsets[-1])[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
        place = torch.empty_like(order).scatter_(0, order.to(torch.int64), copy.to(order.dtype))
        y = rows.index_select(0, place).reshape(copies // topk, topk, dim).sum(1, dtype=self.wide_type)
        return (y if shared is None else y.add_(shared)).to(getattr(torch, out_dtype))
