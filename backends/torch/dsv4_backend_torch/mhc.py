"""Hyper-connections."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.matmul import TorchMatmul
from dsv4_backend_torch.norm import TorchNorm
from dsv4_backend_torch.numeric import FEW, vector
from dsv4_core.ops.mhc import MhcOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.dtypes import Host

Mixed = tuple[Tensor, Tensor, Tensor]


class OneToken:
    """Memory of a decode step's hyper-connections on a CPU, for four streams of ``dim`` channels, wide.

    ``rows`` [5, dim]: the streams, and below them a sub-layer's output, so that ``matrix`` [4, 5] times it is ``hc_post``.
    ``read`` [25]: products with ``fn`` and the sum of squares, in ``host`` too. ``given``: what ``matrix`` was made with.
    """

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        with torch.inference_mode(mode=False):
            self.rows, self.read = torch.empty((5, dim), dtype=dtype), torch.empty(25, dtype=dtype)
        self.streams, self.output = self.rows[:4].view(1, 4, dim), self.rows[4:]
        self.flat, self.channels = self.rows[:4].view(-1), self.rows[:4].t()
        self.products, self.square = self.read[:24], self.read[24]
        self.host = self.read.numpy()
        self.matrix: Tensor
        self.given: Mixed | None = None


class TorchMhc(TorchNorm, TorchMatmul, MhcOps):
    """Contracts of ``ops/mhc.py``, and the fused ``hc_pre_norm``."""

    _streams: OneToken | None = None

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
        s, b = scale.tolist(), base.tolist()
        split = [x for m in mixes for x in split4(m, s, b, eps, iters)]
        rows = vector(split, torch.float64).to(self.wide_type).view(len(mixes), 24)
        return rows[:, :4], rows[:, 4:8], rows[:, 8:].view(-1, 4, 4)

    def hc_pre(
        self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float, iters: int
    ) -> Mixed:
        tokens, hc, dim = h.shape
        if self.on_cpu and hc == 4 and tokens == 1:
            y, one_post, one_comb = self._pre_one(h, fn, scale, base, norm_eps, eps, iters)
            return self.rounded(y), one_post, one_comb
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
        if self.on_cpu and h.shape[:2] == (1, 4):  # the norm of what is not rounded in between
            y, post, comb = self._pre_one(h, fn, scale, base, norm_eps, eps, iters)
        else:
            y, post, comb = self.hc_pre(h, fn, scale, base, norm_eps=norm_eps, eps=eps, iters=iters)
        return self.rms_norm(y, weight, eps=norm_eps), post, comb

    def _mixes_one(self, h: Tensor, fn: Tensor, norm_eps: float) -> tuple[OneToken, list[float]]:
        """``mixes`` of one token's four streams on a CPU, as Python floats; the streams are in the memory that is given back."""
        dim, count = h.shape[2], fn.shape[0]
        one = self._streams
        if one is None or one.rows.shape[1] != dim or one.rows.dtype != self.wide_type:
            one = self._streams = OneToken(dim, self.wide_type)
        one.given = None  # the streams that it belonged to are overwritten
        one.streams.copy_(h)
        torch.mv(self.widen(fn), one.flat, out=one.products[:count])
        torch.dot(one.flat, one.flat, out=one.square)
        *products, square = one.host.tolist()
        root = 1 / math.sqrt(square / (4 * dim) + norm_eps)
        return one, [m * root for m in products[:count]]

    def _pre_one(
        self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, eps: float, iters: int
    ) -> Mixed:
        """``hc_pre`` of one token's four streams on a CPU, its first result wide."""
        one, mixes = self._mixes_one(h, fn, norm_eps)
        s = split4(mixes, self.on_host(scale), self.on_host(base), eps, iters)
        # pre, then what gives a stream: its column of comb and its share of post
        split = vector((*s[:4], *s[8::4], s[4], *s[9::4], s[5], *s[10::4], s[6], *s[11::4], s[7]), self.wide_type)
        one.matrix = split.as_strided((4, 5), (5, 1), 4)
        post, comb = split.as_strided((1, 4), (20, 5), 8), split.as_strided((1, 4, 4), (20, 1, 5), 4)
        one.given = h, post, comb
        return torch.mv(one.channels, split.as_strided((4,), (1,), 0))[None], post, comb

    def hc_post(self, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        one = self._streams
        if one and one.given and one.given[0] is h and one.given[1] is post and one.given[2] is comb:
            one.output.copy_(y)
            return self.rounded(torch.mm(one.matrix, one.rows).view(h.shape))
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
        if self.on_cpu and h.shape[:2] == (1, 4):
            one, few = self._mixes_one(h, fn, norm_eps)
            (s,), b = self.on_host(scale), self.on_host(base)
            pre = vector([sigmoid(m * s + b[j]) + eps for j, m in enumerate(few)], self.wide_type)
            return self.rounded(torch.mv(one.channels, pre))[None]
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


def split4(
    mixes: Sequence[float], scale: Sequence[float], base: Sequence[float], eps: float, iters: int
) -> list[float]:
    """``hc_split_sinkhorn`` of one token's 24 mixes: pre, post, comb one after another."""
    s0, s1, s2 = scale
    x = [m * s + b for m, s, b in zip(mixes, (s0, s0, s0, s0, s1, s1, s1, s1, *(s2,) * 16), base, strict=True)]
    return [*[sigmoid(v) + eps for v in x[:4]], *[2 * sigmoid(v) for v in x[4:8]], *sinkhorn4(x[8:], eps, iters)]


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
    """Row softmax of a 4 x 4 matrix plus ``eps``, then Sinkhorn's iterations on what rows and columns are multiplied by;
    unrolled, since this is a decode step's hottest scalar code.
    """
    matrix: list[float] = []
    for row in range(0, 16, 4):
        top = max(logits[row : row + 4])
        weights = [math.exp(x - top) for x in logits[row : row + 4]]
        total = sum(weights)
        matrix += [x / total + eps for x in weights]
    a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p = matrix
    w = x = y = z = 1.0  # of rows
    s, t, u, v = (
        1 / (a + e + i + m + eps),
        1 / (b + f + j + n + eps),
        1 / (c + g + k + o + eps),
        1 / (d + h + l + p + eps),
    )
    for _ in range(iters - 1):
        w /= w * (a * s + b * t + c * u + d * v) + eps
        x /= x * (e * s + f * t + g * u + h * v) + eps
        y /= y * (i * s + j * t + k * u + l * v) + eps
        z /= z * (m * s + n * t + o * u + p * v) + eps
        s /= s * (a * w + e * x + i * y + m * z) + eps
        t /= t * (b * w + f * x + j * y + n * z) + eps
        u /= u * (c * w + g * x + k * y + o * z) + eps
        v /= v * (d * w + h * x + l * y + p * z) + eps
    return [
        x * r * q
        for x, r, q in zip(matrix, (w, w, w, w, x, x, x, x, y, y, y, y, z, z, z, z), (s, t, u, v) * 4, strict=True)
    ]
