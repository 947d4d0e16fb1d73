"""Routing, dispatch, SwiGLU and combination in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_backend_reference.matmul import ReferenceMatmul
from dsv4_core.contract.ops.moe import MoeOps

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host


class ReferenceMoe(ReferenceMatmul, MoeOps):
    """Contracts of ``ops/moe.py``."""

    def gate(self, x: Host, weight: Host, bias: Host, *, topk: int, route_scale: float) -> tuple[Host, Host]:
        scores = self.router_scores(x, weight)
        indices = np.argsort(-(scores + self.widen(bias)), axis=-1, kind="stable")[:, :topk].astype(np.int32)
        return self.route_weights(scores, indices, route_scale), indices

    def gate_hash(self, x: Host, weight: Host, tid2eid: Host, ids: Host, *, route_scale: float) -> tuple[Host, Host]:
        indices = tid2eid[ids].astype(np.int32)
        return self.route_weights(self.router_scores(x, weight), indices, route_scale), indices

    def router_scores(self, x: Host, weight: Host) -> Host:
        """``sqrt(softplus(x . weight))``."""
        product = self.times(self.widen(x), weight)
        return np.sqrt(np.logaddexp(product, self.wide_type.type(0)))

    def route_weights(self, scores: Host, indices: Host, route_scale: float) -> Host:
        """The chosen experts' scores, normalised and scaled."""
        chosen = np.take_along_axis(scores, indices, -1)
        return chosen / self.total(chosen, -1) * self.wide_type.type(route_scale)

    def dispatch(
        self, x: Host, weights: Host, indices: Host, *, first_expert: int, n_experts: int
    ) -> tuple[Host, Host, Host, Host]:
        local = indices.reshape(-1) - first_expert
        local = np.where((local >= 0) & (local < n_experts), local, n_experts)
        order = np.argsort(local, kind="stable").astype(np.int32)
        offsets = np.searchsorted(local[order], np.arange(n_experts + 1)).astype(np.int32)
        return x[order // indices.shape[1]], weights.reshape(-1)[order], order, offsets

    def swiglu(self, gate: Host, up: Host, weights: Host | None, *, limit: float) -> Host:
        g, u = np.minimum(self.widen(gate), limit), np.clip(self.widen(up), -limit, limit)
        with np.errstate(over="ignore"):  # exp of a very negative gate: infinity, and the quotient 0
            y = g / (1 + np.exp(-g)) * u
        if weights is not None:
            y *= weights[:, None]
        return self.rounded(y)

    def combine(
        self, rows: Host, order: Host, offsets: Host, shared: Host | None, *, topk: int, out_dtype: str
    ) -> Host:
        local = int(offsets[-1])
        tokens = rows.shape[0] // topk
        copies = np.zeros((tokens * topk, rows.shape[1]), self.wide_type)
        copies[order[:local]] = self.widen(rows[:local])
        y = self.total(copies.reshape(tokens, topk, rows.shape[1]), 1)[:, 0]
        if shared is not None:
            y += self.widen(shared)
        return self.round_to(y, out_dtype)
