"""npu_clipped_swiglu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import simulated

if TYPE_CHECKING:
    from types import SimpleNamespace


@simulated("npu_clipped_swiglu", shapes=lambda a: a.x.new_empty([*a.x.shape[:-1], a.x.shape[-1] // 2]))
def clipped_swiglu(a: SimpleNamespace) -> torch.Tensor:
    """``g * sigmoid(alpha * g) * (u + bias)`` of the clamped halves g and u, in float32, rounded
    once.
    """
    gate, up = a.x.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=a.limit), up.clamp(-a.limit, a.limit)
    return (gate * torch.sigmoid(a.alpha * gate) * (up + a.bias)).to(a.x.dtype)
