"""expert_linear over FP8 and FP4 weights on chips without either: expanded to BF16 a few experts at a time, which loses
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.cann.matmul import expert_linear_bf16
from dsv4_core.dtypes import ScaledArray

if TYPE_CHECKING:
    from dsv4_backend_torch.backend import TorchBackend

GROUPS = 1024  # npu_grouped_matmul takes no more


def expert_linear(
    backend: TorchBackend, x: torch.Tensor, stack: ScaledArray, offsets: torch.Tensor, *, expand_bytes: int
) -> torch.Tensor:
    """Contract ``expert_linear``. Never more than about ``expand_bytes`` of BF16 weights exist; offsets stay on the
    device.

    Few rows (decode): each row's expert is gathered, packed, and expanded, a group a row. Many: experts in blocks; the
    rows of a block are turned to the
    front, because npu_grouped_matmul counts its groups from row 0.
    """
    experts, out, cols = stack.shape
    x = backend.quantised_activation(x)
    rows, size = x.shape[0], 2 * out * cols
    row = torch.arange(rows, dtype=offsets.dtype, device=x.device)
    if rows <= GROUPS and rows * size <= expand_bytes:
        own = torch.searchsorted(offsets, row, right=True).sub(1).clamp(0, experts - 1)
        weight = backend.dequantise(ScaledArray(stack.data[own], stack.scale[own], stack.format), torch.bfloat16)
        each = torch.arange(rows + 1, dtype=offsets.dtype, device=x.device)
        y = expert_linear_bf16(x, weight, each)
        return y.masked_fill((row >= offsets[-1]).unsqueeze(-1), 0)
    y = x.new_zeros((rows, out))
    block = max(1, min(GROUPS, expand_bytes // size))
    for first in range(0, experts, block):
        bounds = offsets[first : first + block + 1]
        part = slice(first, first + block)
        weight = backend.dequantise(ScaledArray(stack.data[part], stack.scale[part], stack.format), torch.bfloat16)
        turned = expert_linear_bf16(x[(row + bounds[0]) % rows], weight, bounds - bounds[0])
        mine = (row >= bounds[0]) & (row < bounds[-1])
        y = torch.where(mine.unsqueeze(-1), turned[(row - bounds[0]) % rows], y)
    return y
