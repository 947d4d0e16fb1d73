"""Small formats in torch: E8M0 scales, E2M1 pairs, and MX operands expanded to float32."""

from __future__ import annotations

import torch

from dsv4_backend_ascend.constraints import BFLOAT16, FLOAT16, FLOAT32

E4M3_MAX = 448.0
MX_GROUP = 32  # channels under one E8M0 scale of an MX operand
OUTPUT_DTYPES = {FLOAT16: torch.float16, FLOAT32: torch.float32, BFLOAT16: torch.bfloat16}

_E8M0 = torch.cat([torch.ldexp(torch.ones(255), torch.arange(-127, 128)), torch.tensor([torch.nan])])
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Values of E8M0 bytes in float32: ``2 ** (byte - 127)``, NaN for 255."""
    return _E8M0[scale.view(torch.uint8).long()]


def e2m1_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Values [..., 2 n] of bytes [..., n], the low nibble first."""
    return _E2M1[torch.stack([packed & 0xF, packed >> 4], dim=-1).long()].flatten(-2)


def expand(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply [..., k] values by MX scales [..., k / 64, 2], one per 32 of them."""
    k = codes.shape[-1]
    return codes * e8m0(scale).flatten(-2).repeat_interleave(MX_GROUP, dim=-1)[..., :k]
