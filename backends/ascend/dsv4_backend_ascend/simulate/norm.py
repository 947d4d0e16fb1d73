"""npu_rms_norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import simulated

if TYPE_CHECKING:
    from types import SimpleNamespace


def _shapes(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    lead = a.input.dim() - a.gamma.dim()
    rstd = a.input.new_empty([*a.input.shape[:lead], *[1] * a.gamma.dim()], dtype=torch.float32)
    return torch.empty_like(a.input), rstd


@simulated("npu_rms_norm", shapes=_shapes)
def rms_norm(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x^2) + epsilon) * gamma`` over gamma's axes in float32, rounded once; and the
    reciprocal root.
    """
    x = a.input.float()
    rstd = torch.rsqrt(x.square().mean(tuple(range(-a.gamma.dim(), 0)), keepdim=True) + a.epsilon)
    return (x * rstd * a.gamma.float()).to(a.input.dtype), rstd
