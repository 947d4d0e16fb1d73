"""npu_transpose_batchmatmul."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_backend_ascend.simulate.library import simulated

if TYPE_CHECKING:
    from types import SimpleNamespace

    import torch


def _shapes(a: SimpleNamespace) -> torch.Tensor:
    perm = a.perm_x1 or [0, 1, 2]
    rows, batch, columns = a.input.shape[perm[1]], a.weight.shape[0], a.weight.shape[2]
    return a.input.new_empty([rows, batch, columns])  # type: ignore[no-any-return]


@simulated("npu_transpose_batchmatmul", shapes=_shapes)
def transpose_batchmatmul(a: SimpleNamespace) -> torch.Tensor:
    """``y[m, b] = input^T1[b, m] @ weight[b]``, summed in float32, rounded once."""
    x = a.input.float().permute(a.perm_x1 or [0, 1, 2])
    return (x @ a.weight.float()).transpose(0, 1).contiguous().to(a.input.dtype)  # type: ignore[no-any-return]
