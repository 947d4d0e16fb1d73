"""Hyper-connections."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.matmul import TorchMatmul
from dsv4_core.ops.mhc import MhcOps


class TorchMhc(TorchMatmul, MhcOps):
    """Contracts of ``ops/mhc.py``."""

    def hc_expand(self, x: Tensor, *, hc: int) -> Tensor:
        return x[:, None].expand(-1, hc, -1).contiguous()

    def hc_add(self, h: Tensor, x: Tensor) -> Tensor:
        return self.rounded(self.widen(h) + x[:, None])

    def hc_split_sinkhorn(self, mixes: Tensor, scale: Tensor, base: Tensor, *, hc: int, eps: float, iters: int) -> tuple[Tensor, Tensor, Tensor]:
        mixes, scale, base = self.widen(mixes), self.widen(scale), self.widen(base)
        pre = (mixes[:, :hc] * scale[0] + base[:hc]).sigmoid().add_(eps)
        post = (mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc]).sigmoid().mul_(2)
        logits = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(-1, hc, hc)
        return pre, post, self.sinkhorn(logits.softmax(-1).add_(eps), eps, iters)

    def sinkhorn(self, comb: Tensor, eps: float, iters: int) -> Tensor:
        """Divide ``comb`` [tokens, hc, hc], in place, by its column sums; then in turn by row sums and column sums."""
        comb.div_(comb.sum(-2, keepdim=True).add_(eps))
        for _ in range(iters - 1):
            comb.div_(comb.sum(-1, keepdim=True).add_(eps))
            comb.div_(comb.sum(-2, keepdim=True).add_(eps))
        return comb

    def hc_pre(self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float, iters: int) -> tuple[Tensor, Tensor, Tensor]:
        wide, mixes = self.mixes(h, fn, norm_eps)
        pre, post, comb = self.hc_split_sinkhorn(mixes, scale, base, hc=h.shape[1], eps=eps, iters=iters)
        return self.rounded(self.reduce(wide, pre)), post, comb

    def hc_post(self, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        mixed = comb.transpose(1, 2) @ self.widen(h)
        return self.rounded(mixed.addcmul_(post[:, :, None], self.widen(y)[:, None]))

    def hc_head(self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float) -> Tensor:
        wide, mixes = self.mixes(h, fn, norm_eps)
        pre = (mixes * self.widen(scale) + self.widen(base)).sigmoid().add_(eps)
        return self.rounded(self.reduce(wide, pre))

    def mixes(self, h: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
        """The streams, wide, and ``fn @ flatten(h)`` over their root-mean-square."""
        wide = self.widen(h)
        flat = wide.reshape(h.shape[0], h.shape[1] * h.shape[2])
        mean_square = torch.linalg.vector_norm(flat, dim=1, keepdim=True).square_().div_(flat.shape[1])
        return wide, functional.linear(flat, self.widen(fn)).div_(mean_square.add_(norm_eps).sqrt_())

    def reduce(self, wide: Tensor, pre: Tensor) -> Tensor:
        """``sum_j pre[j] h[j]``."""
        return torch.bmm(pre[:, None], wide)[:, 0]
