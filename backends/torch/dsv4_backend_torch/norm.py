"""RMS norm and RoPE."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.numeric import BLOCK, Numeric
from dsv4_core.ops.norm import NormOps


class TorchNorm(Numeric, NormOps):
    """Contracts of ``ops/norm.py``."""

    _rotation: tuple[Tensor, Tensor, Tensor] | None = None

    def rms_norm(self, x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
        tokens, dim = x.shape
        if self.on_cpu and tokens == 1:  # a decode step is bound by the number of its calls: here three
            wide = self.widen(x)
            y = wide * (1 / math.sqrt(float(torch.dot(wide[0], wide[0])) / dim + eps))
            return self.rounded(y if weight is None else y.mul_(weight))
        gain = None if weight is None else self.widen(weight)
        if tokens * dim <= BLOCK:
            return self.rounded(functional.rms_norm(self.widen(x), (dim,), gain, eps))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for part in self.blocks(tokens, dim):
            out[part] = functional.rms_norm(self.widen(x[part]), (dim,), gain, eps)
        return out

    def apply_rope(self, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool) -> Tensor:
        rotated = 2 * freqs.shape[0]
        turn = self.rotation(positions, freqs)
        pairs = torch.view_as_complex(self.widen(x[..., -rotated:]).reshape(*x.shape[:-1], freqs.shape[0], 2))
        y = torch.view_as_real(pairs * (turn.conj() if inverse else turn)).reshape(*x.shape[:-1], rotated)
        return torch.cat([x[..., :-rotated], self.rounded(y)], -1)

    def rotation(self, positions: Tensor, freqs: Tensor) -> Tensor:
        """``cos + i sin`` of each pair's angle, [tokens, 1, half]; the angle is a float32 product in every mode.

        On a CPU the last one is kept: a layer turns four or more arrays by the same angles. On a device a kept
        tensor would break a captured graph.
        """
        kept = self._rotation
        if kept is not None and kept[0] is positions and kept[1] is freqs:
            return kept[2]
        angle = self.widen(positions.to(torch.float32)[:, None] * freqs)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        if self.on_cpu:
            self._rotation = (positions, freqs, turn)
        return turn
