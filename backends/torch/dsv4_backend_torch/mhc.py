"""Hyper-connections."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.matmul import TorchMatmul
from dsv4_backend_torch.norm import TorchNorm
from dsv4_backend_torch.numeric import FEW
from dsv4_core.ops.mhc import MhcOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.dtypes import Host

Mixed = tuple[Tensor, Tensor, Tensor]


class TorchMhc(TorchNorm, TorchMatmul, MhcOps):
    """Contracts of ``ops/mhc.py``, and the fused ``hc_pre_norm``."""

    def hc_expand(self, x: Tensor, *, hc: int) -> Tensor:
        return x[:, None].expand(-1, hc, -1).contiguous()

    def hc_add(self, h: Tensor, x: Tensor) -> Tensor:
        return self.rounded(self.widen(h) + x[:, None])

    def hc_split_sinkhorn(
        self, mixes: Tensor, scale: Tensor, base: Tensor, *, hc: int, eps: float, iters: int
    ) -> Mixed:
        if self.on_cpu and hc == 4 and 0 < mixes.shape[0] <= FEW:
            return self._split_few(mixes.tolist(), scale, base, eps, iters)
        mixes, scale, base = self.widen(mixes), self.widen(scale), self.widen(base)
        post = (mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc]).sigmoid().mul_(2)
        logits = (mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(-1, hc, hc)
        return self.pre(mixes, scale, base, hc, eps), post, self.sinkhorn(logits.softmax(-1).add_(eps), eps, iters)

    def pre(self, mixes: Tensor, scale: Tensor, base: Tensor, hc: int, eps: float) -> Tensor:
        """Weights of the streams in a sub-layer's input."""
        return (mixes[:, :hc] * scale[0] + base[:hc]).sigmoid().add_(eps)

    def sinkhorn(self, comb: Tensor, eps: float, iters: int) -> Tensor:
        """Divide ``comb`` [tokens, hc, hc] by its column sums; then ``iters - 1`` times by its row sums and its column sums."""
        # NumPy on the same memory, tokens last: a sum is then the addition of a few long rows, and a call costs a
        # third of torch's
        if self.on_cpu:
            return torch.from_numpy(sinkhorn(comb.permute(1, 2, 0).contiguous().numpy(), eps, iters)).permute(2, 0, 1)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
        for _ in range(iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + eps)
            comb = comb / (comb.sum(-2, keepdim=True) + eps)
        return comb

    def _split_few(self, mixes: list[list[float]], scale: Tensor, base: Tensor, eps: float, iters: int) -> Mixed:
        """The same for a few tokens, in Python floats, rounded to the wide dtype at the end: sixteen numbers a token beat any
        array library (20 us against 130 us for 20 iterations).
        """
        (s0, s1, s2), b = scale.tolist(), base.tolist()
        split = array("d")
        for m in mixes:
            split.extend(sigmoid(m[j] * s0 + b[j]) + eps for j in range(4))
            split.extend(2 * sigmoid(m[j] * s1 + b[j]) for j in range(4, 8))
            split.extend(sinkhorn4([m[j] * s2 + b[j] for j in range(8, 24)], eps, iters))
        rows = torch.frombuffer(split, dtype=torch.float64).to(self.wide_type).view(len(mixes), 24)
        return rows[:, :4], rows[:, 4:8], rows[:, 8:].view(-1, 4, 4)

    def hc_pre(
        self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float, iters: int
    ) -> Mixed:
        tokens, hc, dim = h.shape
        if self.on_cpu and hc == 4 and 0 < tokens <= FEW:
            wide = self.widen(h)
            flat = wide.reshape(tokens, hc * dim)
            norms = torch.linalg.vector_norm(flat, dim=1).tolist()
            roots = [1 / math.sqrt(norm * norm / flat.shape[1] + norm_eps) for norm in norms]
            products = functional.linear(flat, self.widen(fn)).tolist()
            mixes = [[m * root for m in row] for row, root in zip(products, roots, strict=True)]
            few_pre, few_post, few_comb = self._split_few(mixes, scale, base, eps, iters)
            return self.rounded(self.reduce(wide, few_pre)), few_post, few_comb
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

    def hc_post(self, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        if self.on_cpu and h.shape[0] <= FEW:
            return self.rounded(torch.baddbmm(post[:, :, None] * y[:, None], comb.mT, self.widen(h)))
        out = torch.empty_like(h, memory_format=torch.contiguous_format)
        mix = comb.transpose(1, 2)
        for part in self.blocks(h.shape[0], h.shape[1] * h.shape[2]):
            out[part] = torch.bmm(mix[part], self.widen(h[part])).addcmul_(
                post[part, :, None], self.widen(y[part])[:, None]
            )
        return out

    def hc_head(self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float) -> Tensor:
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


def sigmoid(x: float) -> float:
    """Logistic function without overflow."""
    e = math.exp(-abs(x))
    return (1 if x >= 0 else e) / (1 + e)


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


def sinkhorn4(logits: Sequence[float], eps: float, iters: int) -> list[float]:
    """Row softmax of a 4 x 4 matrix plus ``eps``, then Sinkhorn's iterations; unrolled, since this is a decode
    step's hottest scalar code.
    """
    rows: list[float] = []
    for row in range(0, 16, 4):
        top = max(logits[row : row + 4])
        weights = [math.exp(x - top) for x in logits[row : row + 4]]
        total = sum(weights)
        rows += [x / total + eps for x in weights]
    a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p = rows
    for half in range(1, 2 * iters):
        if half % 2:
            s, t, u, v = (
                1 / (a + e + i + m + eps),
                1 / (b + f + j + n + eps),
                1 / (c + g + k + o + eps),
                1 / (d + h + l + p + eps),
            )
            a, b, c, d, e, f, g, h = a * s, b * t, c * u, d * v, e * s, f * t, g * u, h * v
            i, j, k, l, m, n, o, p = i * s, j * t, k * u, l * v, m * s, n * t, o * u, p * v
        else:
            s, t, u, v = (
                1 / (a + b + c + d + eps),
                1 / (e + f + g + h + eps),
                1 / (i + j + k + l + eps),
                1 / (m + n + o + p + eps),
            )
            a, b, c, d, e, f, g, h = a * s, b * s, c * s, d * s, e * t, f * t, g * t, h * t
            i, j, k, l, m, n, o, p = i * u, j * u, k * u, l * u, m * v, n * v, o * v, p * v
    return [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
