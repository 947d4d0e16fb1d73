"""npu_rotary_mul."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import simulated

if TYPE_CHECKING:
    from types import SimpleNamespace


@simulated("npu_rotary_mul", shapes=lambda a: torch.empty_like(a.input))
def rotary_mul(a: SimpleNamespace) -> torch.Tensor:
    """``x * r1 + rotate(x) * r2`` with ``rotate(x)[2i], [2i + 1] = -x[2i + 1], x[2i]``."""
    x = a.input.float()
    rotated = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return (x * a.r1.float() + rotated * a.r2.float()).to(a.input.dtype)
