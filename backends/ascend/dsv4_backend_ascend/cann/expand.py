"""expert_linear over FP8 and FP4 weights on chips without either: expanded to BF16 a few experts at
a time, which loses nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from dsv4_backend_torch.matmul import expert_of_rows

from dsv4_backend_ascend.cann.matmul import expert_linear_bf16
from dsv4_core.contract.dtypes import ScaledArray

if TYPE_CHECKING:
    from dsv4_backend_ascend.chip import ChipBackend

GROUPS = 1024  # npu_grouped_matmul takes no more
PIECES = 16  # a sixteenth of what may be expanded is made at a time, an expert at least: that needs twice as many bytes beside it


def expand(
    backend: ChipBackend, stack: ScaledArray, experts: torch.Tensor | slice, into: torch.Tensor, piece: int
) -> torch.Tensor:
    """Dequantise some experts of a stack into the front of ``into`` [groups, out, in], BF16,
    ``piece`` bytes at a time; give that part.
    """
    data, scale = (
        part[experts] if isinstance(experts, slice) else part.index_select(0, experts)
        for part in (stack.data, stack.scale)
    )
    count = data.shape[0]
    step = max(1, piece // (2 * into[0].numel()))
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        into[part] = backend.dequantise(ScaledArray(data[part], scale[part], stack.format), torch.bfloat16)
    return into[:count]


def expert_linear(
    backend: ChipBackend, x: torch.Tensor, stack: ScaledArray, offsets: torch.Tensor, *, expand_bytes: int
) -> torch.Tensor:
    """Contract ``expert_linear``. No more than ``expand_bytes`` of BF16 weights exist (and one
    expert's at least), with about a quarter more while they are made; offsets stay on the device.

    Few rows (decode): each row's expert is gathered, packed, and expanded, a group a row. Many:
    experts in blocks; the rows of a block are turned to the front, because npu_grouped_matmul
    counts its groups from row 0.
    """
    experts, out, cols = stack.shape
    x = backend.quantised_activation(x)
    rows, size = x.shape[0], 2 * out * cols
    row = torch.arange(rows, dtype=offsets.dtype, device=x.device)
    gathered = rows <= GROUPS and rows * size <= expand_bytes
    block = rows if gathered else max(1, min(GROUPS, experts, expand_bytes // size))
    held = x.new_empty((block, out, cols), dtype=torch.bfloat16)
    if gathered:
        own = expert_of_rows(row, offsets, experts)
        each = torch.arange(rows + 1, dtype=offsets.dtype, device=x.device)
        y = expert_linear_bf16(backend, x, expand(backend, stack, own, held, expand_bytes // PIECES), each)
        return y.masked_fill((row >= offsets[-1]).unsqueeze(-1), 0)
    y = x.new_zeros((rows, out))
    for first in range(0, experts, block):
        bounds = offsets[first : first + block + 1]
        weight = expand(backend, stack, slice(first, first + block), held, expand_bytes // PIECES)
        turned = expert_linear_bf16(backend, x[(row + bounds[0]) % rows], weight, bounds - bounds[0])
        mine = (row >= bounds[0]) & (row < bounds[-1])
        y = torch.where(mine.unsqueeze(-1), turned[(row - bounds[0]) % rows], y)
    return y
