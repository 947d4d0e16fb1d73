"""npu_grouped_matmul: BF16, int8 and MX, grouped by rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.constraints import E2M1
from dsv4_backend_ascend.simulate.format_cast import from_tiles
from dsv4_backend_ascend.simulate.library import CannError, simulated, undefined
from dsv4_backend_ascend.simulate.numerics import OUTPUT_DTYPES, expand
from dsv4_backend_ascend.simulate.quant_matmul import int8_product, mx_weight

if TYPE_CHECKING:
    from types import SimpleNamespace


def _dtype(a: SimpleNamespace) -> torch.dtype:
    return OUTPUT_DTYPES[a.output_dtype] if a.output_dtype is not None else a.x[0].dtype


def _shapes(a: SimpleNamespace) -> list[torch.Tensor]:
    return [a.x[0].new_empty([a.x[0].shape[0], a.weight[0].shape[2]], dtype=_dtype(a))]


def boundaries(group_list: torch.Tensor, *, counts: bool, rows: int) -> list[int]:
    """Row at which each group ends. Raises ``CannError`` for a group_list that is not what its type
    says.
    """
    ends = group_list.cumsum(0) if counts else group_list
    if int(group_list.min()) < 0 or bool((ends.diff() < 0).any()) or int(ends[-1]) > rows:
        form = "counts" if counts else "running totals"
        raise CannError(
            f"npu_grouped_matmul: group_list {group_list.tolist()} is not {form} of at most {rows} rows, none negative"
        )
    return [int(end) for end in ends]


@simulated("npu_grouped_matmul", shapes=_shapes)
def grouped_matmul(a: SimpleNamespace) -> list[torch.Tensor]:
    """Multiply the rows of group e by ``weight[e]``; rows after the last group are left
    undefined.
    """
    x, weight = a.x[0], a.weight[0]
    y = undefined((x.shape[0], weight.shape[2]), _dtype(a), x)
    start = 0
    for e, end in enumerate(boundaries(a.group_list, counts=a.group_list_type == 1, rows=x.shape[0])):
        y[start:end] = _product(a, e, slice(start, end)).to(y.dtype)
        start = end
    return [y]


def _product(a: SimpleNamespace, e: int, rows: slice) -> torch.Tensor:
    """One group's product in float32."""
    x, weight = a.x[0][rows], a.weight[0][e]
    if x.dtype == torch.int8:
        return int8_product(x, weight) * a.scale[0][e].float() * a.per_token_scale[0][rows].unsqueeze(-1)
    if x.dtype == torch.float8_e4m3fn:
        fp4 = a.weight_dtype == E2M1
        scale = (a.antiquant_scale if fp4 else a.scale)[0][e].transpose(0, 1)
        if fp4:  # read as the op reads it: tiles of the transposed weight
            weight = from_tiles(weight.t()).t()
        return expand(x.float(), a.per_token_scale[0][rows]) @ mx_weight(weight, scale, pairs=fp4)
    return x.float() @ weight.float()
