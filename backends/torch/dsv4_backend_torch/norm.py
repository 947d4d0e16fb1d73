"""RMS norm and RoPE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.numeric import Numeric
from dsv4_core.ops.norm import NormOps


class TorchNorm(Numeric, NormOps):
    """Contracts of ``ops/norm.py``."""

    def rms_norm(self, x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
        wide = self.widen(x)
        return self.rounded(functional.rms_norm(wide, (x.shape[1],), None if weight is None else self.widen(weight), eps))

    def apply_rope(self, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool) -> Tensor:
        rotated = 2 * freqs.shape[0]
        cos, sin = self.rotation(positions, freqs)
        pairs = self.widen(x[..., -rotated:]).reshape(*x.shape[:-1], freqs.shape[0], 2)
        swapped = pairs.flip(-1)
        y = pairs * cos + swapped * (-sin if inverse else sin)
        return torch.cat([x[..., :-rotated], self.rounded(y).reshape(*x.shape[:-1], rotated)], -1)

    def rotation(self, positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        """``(cos, cos)`` and ``(-sin, sin)`` of each pair's angle, [tokens, 1, half, 2]; the angle is a float32 product in every mode."""
        angle = self.widen(positions.to(torch.float32)[:, None] * freqs)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos, cos], -1)[:, None], torch.stack([-sin, sin], -1)[:, None]
