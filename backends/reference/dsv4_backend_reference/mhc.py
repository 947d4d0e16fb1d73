"""Hyper-connections in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_backend_reference.matmul import ReferenceMatmul
from dsv4_core.contract.ops.mhc import MhcOps

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host


def sigmoid(x: Host) -> Host:
    """Logistic function, accurate at both ends (half a hyperbolic tangent plus a half is not)."""
    with np.errstate(over="ignore"):  # exp of a very negative input: infinity, and the quotient 0
        return 1 / (1 + np.exp(-x))


class ReferenceMhc(ReferenceMatmul, MhcOps):
    """Contracts of ``ops/mhc.py``."""

    def hc_expand(self, x: Host, *, hc: int) -> Host:
        return np.repeat(x[:, None], hc, axis=1)

    def hc_add(self, h: Host, x: Host) -> Host:
        return self.rounded(self.widen(h) + self.widen(x)[:, None])

    def hc_split_sinkhorn(
        self, mixes: Host, scale: Host, base: Host, *, hc: int, eps: float, iters: int
    ) -> tuple[Host, Host, Host]:
        mixes, scale, base = self.widen(mixes), self.widen(scale), self.widen(base)
        tiny = self.wide_type.type(eps)
        pre = sigmoid(mixes[:, :hc] * scale[0] + base[:hc]) + tiny
        post = 2 * sigmoid(mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
        logits = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(-1, hc, hc)
        comb = np.exp(logits - logits.max(-1, keepdims=True))
        comb = comb / self.total(comb, -1) + tiny
        comb /= self.total(comb, -2) + tiny
        for _ in range(iters - 1):
            comb /= self.total(comb, -1) + tiny
            comb /= self.total(comb, -2) + tiny
        return pre, post, comb

    def hc_pre(
        self, h: Host, fn: Host, scale: Host, base: Host, *, norm_eps: float, eps: float, iters: int
    ) -> tuple[Host, Host, Host]:
        hc = h.shape[1]
        wide, mixes = self.mixes(h, fn, norm_eps)
        pre, post, comb = self.hc_split_sinkhorn(mixes, scale, base, hc=hc, eps=eps, iters=iters)
        return self.rounded(self.reduce(wide, pre)), post, comb

    def hc_post(self, y: Host, h: Host, post: Host, comb: Host) -> Host:
        mixed = self.dot(self.widen(comb).transpose(0, 2, 1), self.widen(h))
        mixed += post[:, :, None] * self.widen(y)[:, None]
        return self.rounded(mixed)

    def hc_head(self, h: Host, fn: Host, scale: Host, base: Host, *, norm_eps: float, eps: float) -> Host:
        wide, mixes = self.mixes(h, fn, norm_eps)
        pre = sigmoid(mixes * self.widen(scale) + self.widen(base)) + self.wide_type.type(eps)
        return self.rounded(self.reduce(wide, pre))

    def mixes(self, h: Host, fn: Host, norm_eps: float) -> tuple[Host, Host]:
        """The streams, wide, and ``fn @ flatten(h)`` over their root-mean-square."""
        wide = self.widen(h)
        flat = wide.reshape(h.shape[0], h.shape[1] * h.shape[2])
        return wide, self.times(flat, fn) / np.sqrt(self.square_mean(flat) + self.wide_type.type(norm_eps))

    def reduce(self, wide: Host, pre: Host) -> Host:
        """``sum_j pre[j] h[j]``."""
        return self.dot(pre[:, None], wide)[:, 0]
