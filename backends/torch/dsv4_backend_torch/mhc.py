"""Hyper-connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.matmul import FEW, TorchMatmul
from dsv4_backend_torch.norm import TorchNorm
from dsv4_core.contract.ops.mhc import MhcOps

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host

Mixed = tuple[Tensor, Tensor, Tensor]


class TorchMhc(TorchNorm, TorchMatmul, MhcOps):
    """Contracts of ``ops/mhc.py``, and the fused ``hc_pre_norm``."""

    def hc_expand(self, x: Tensor, *, hc: int) -> Tensor:
        if self.compiled and (few := self.compiled.hc_expand(x, hc)) is not None:
            return few
        return x[:, None].expand(-1, hc, -1).contiguous()

    def hc_add(self, h: Tensor, x: Tensor) -> Tensor:
        return self.rounded(self.widen(h) + x[:, None])

    def hc_split_sinkhorn(
        self, mixes: Tensor, scale: Tensor, base: Tensor, *, hc: int, eps: float, iters: int
    ) -> Mixed:
        mixes, scale, base = self.widen(mixes), self.widen(scale), self.widen(base)
        post = (mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc]).sigmoid().mul_(2)
        logits = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(-1, hc, hc)
        return self.pre(mixes, scale, base, hc, eps), post, self.sinkhorn(logits.softmax(-1).add_(eps), eps, iters)

    def pre(self, mixes: Tensor, scale: Tensor, base: Tensor, hc: int, eps: float) -> Tensor:
        """Weights of the streams in a sub-layer's input."""
        return (mixes[:, :hc] * scale[0] + base[:hc]).sigmoid().add_(eps)

    def sinkhorn(self, comb: Tensor, eps: float, iters: int) -> Tensor:
        """Divide ``comb`` [tokens, hc, hc] by its column sums; then ``iters - 1`` times by its row
        sums and its column sums.
        """
        # NumPy on the same memory, tokens last: a sum is then the addition of a few long rows, and
        # a call costs a third of torch's
        if self.on_cpu:
            return torch.from_numpy(sinkhorn(comb.permute(1, 2, 0).contiguous().numpy(), eps, iters)).permute(2, 0, 1)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        return comb

    def hc_pre(
        self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float, iters: int
    ) -> Mixed:
        tokens, hc, dim = h.shape
        if self.compiled and (few := self.compiled.hc_pre(h, fn, scale, base, None, norm_eps, eps, iters)):
            return few
        if tokens <= FEW:
            wide, mixes = self.mixes(h, fn, norm_eps)
            pre, post, comb = self.hc_split_sinkhorn(mixes, scale, base, hc=hc, eps=eps, iters=iters)
            return self.rounded(self.reduce(wide, pre)), post, comb
        y = torch.empty((tokens, dim), dtype=self.act_type, device=h.device)
        all_mixes = torch.empty((tokens, fn.shape[0]), dtype=self.wide_type, device=h.device)
        for part in self.blocks(tokens, hc * dim):  # the streams are widened once, and reduced while they are in cache
            wide, mixes = self.mixes(h[part], fn, norm_eps)
            y[part] = self.reduce(wide, self.pre(mixes, scale, base, hc, eps))
            all_mixes[part] = mixes
        _, post, comb = self.hc_split_sinkhorn(all_mixes, scale, base, hc=hc, eps=eps, iters=iters)
        return y, post, comb

    def hc_pre_norm(
        self,
        h: Tensor,
        fn: Tensor,
        scale: Tensor,
        base: Tensor,
        weight: Tensor,
        *,
        norm_eps: float,
        eps: float,
        iters: int,
    ) -> Mixed:
        if self.compiled and (few := self.compiled.hc_pre(h, fn, scale, base, weight, norm_eps, eps, iters)):
            return few
        y, post, comb = self.hc_pre(h, fn, scale, base, norm_eps=norm_eps, eps=eps, iters=iters)
        return self.rms_norm(y, weight, eps=norm_eps), post, comb

    def hc_post(self, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        if self.compiled and (few := self.compiled.hc_post(y, h, post, comb)) is not None:
            return few
        out = torch.empty_like(h, memory_format=torch.contiguous_format)
        mix = comb.transpose(1, 2)
        for part in self.blocks(h.shape[0], h.shape[1] * h.shape[2]):
            out[part] = torch.bmm(mix[part], self.widen(h[part])).addcmul_(
                post[part, :, None], self.widen(y[part])[:, None]
            )
        return out

    def hc_head(self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float) -> Tensor:
        if self.compiled and (few := self.compiled.hc_head(h, fn, scale, base, norm_eps, eps)) is not None:
            return few
        wide, mixes = self.mixes(h, fn, norm_eps)
        return self.rounded(self.reduce(wide, self.pre(mixes, scale, base, h.shape[1], eps)))

    def mixes(self, h: Tensor, fn: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
        """The streams, wide, and ``fn @ flatten(h)`` over their root-mean-square."""
        wide = self.widen(h)
        flat = wide.reshape(h.shape[0], h.shape[1] * h.shape[2])
        product = functional.linear(flat, self.widen(fn))
        mean_square = torch.linalg.vector_norm(flat, dim=1, keepdim=True).square_().div_(flat.shape[1])
        return wide, product.div_(mean_square.add_(norm_eps).sqrt_())

    def reduce(self, wide: Tensor, pre: Tensor) -> Tensor:
        """``sum_j pre[j] h[j]``."""
        return torch.bmm(pre[:, None], wide)[:, 0]


def sinkhorn(comb: Host, eps: float, iters: int) -> Host:
    """Sinkhorn's iterations on [hc, hc, tokens], in place."""
    hc, _, tokens = comb.shape
    tiny = comb.dtype.type(eps)
    sums = (np.empty((1, hc, tokens), comb.dtype), np.empty((hc, 1, tokens), comb.dtype))
    for half in range(1, 2 * iters):
        axis = 1 - half % 2  # columns, then rows and columns in turn
        total = sums[axis]
        np.add.reduce(comb, axis, out=total, keepdims=True)
        np.add(total, tiny, out=total)
        np.divide(comb, total, out=comb)
    return comb
