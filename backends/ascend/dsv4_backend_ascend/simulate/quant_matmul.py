"""npu_quant_matmul: int8 per token and channel, and MX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.constraints import E2M1
from dsv4_backend_ascend.simulate.library import simulated
from dsv4_backend_ascend.simulate.numerics import OUTPUT_DTYPES, e2m1_pairs, expand

if TYPE_CHECKING:
    from types import SimpleNamespace


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum int8 products as int32 does, to float32. Float64 holds the sums exactly: 127^2 * 65535 <
    2^53.
    """
    return (x.double() @ weight.double()).float()


def mx_weight(weight: torch.Tensor, scale: torch.Tensor, *, pairs: bool) -> torch.Tensor:
    """Values [k, n] of an MX weight [k or k / 2, n] with scales [n, k / 64, 2]."""
    values = e2m1_pairs(weight.t()) if pairs else weight.t().float()
    return expand(values, scale).t()


@simulated(
    "npu_quant_matmul",
    shapes=lambda a: a.x1.new_empty([a.x1.shape[0], a.x2.shape[1]], dtype=OUTPUT_DTYPES[a.output_dtype]),
)
def quant_matmul(a: SimpleNamespace) -> torch.Tensor:
    """``x1 @ x2`` with both scales: after int32 sums, or per 32 channels inside a float32 sum.
    Rounded once.
    """
    if a.x1.dtype == torch.int8:
        y = int8_product(a.x1, a.x2) * a.scale.float() * a.pertoken_scale.unsqueeze(-1)
    else:
        y = expand(a.x1.float(), a.pertoken_scale) @ mx_weight(a.x2, a.scale.transpose(0, 1), pairs=a.x2_dtype == E2M1)
    return y.to(OUTPUT_DTYPES[a.output_dtype])  # type: ignore[no-any-return]
