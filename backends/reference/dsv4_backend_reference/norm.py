"""RMS norm and RoPE in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_backend_reference.numeric import Numeric
from dsv4_core.contract.ops.norm import NormOps

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host


class ReferenceNorm(Numeric, NormOps):
    """Contracts of ``ops/norm.py``."""

    def rms_norm(self, x: Host, weight: Host | None, *, eps: float) -> Host:
        wide = self.widen(x)
        y = wide / np.sqrt(self.square_mean(wide) + wide.dtype.type(eps))
        if weight is not None:
            y *= self.widen(weight)
        return self.rounded(y)

    def apply_rope(self, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Host:
        angle = (positions.astype(np.float32)[:, None] * freqs).astype(
            self.wide_type
        )  # the product is float32 in every mode
        cos, sin = (part[:, None] for part in self.cos_sin(angle))
        if inverse:
            sin = -sin
        rotated = 2 * freqs.shape[0]
        pairs = self.widen(x[..., -rotated:])
        a, b = pairs[..., 0::2], pairs[..., 1::2]
        y = np.empty_like(pairs)
        y[..., 0::2] = a * cos - b * sin
        y[..., 1::2] = a * sin + b * cos
        rotated_part = self.rounded(y)
        out = x.astype(rotated_part.dtype)  # x's own; the oracle's results are wider
        out[..., -rotated:] = rotated_part
        return out

    def cos_sin(self, angle: Host) -> tuple[Host, Host]:
        """Cosine and sine of each angle."""
        return np.cos(angle), np.sin(angle)
