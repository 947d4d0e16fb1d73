"""Storage formats of tensors: on an NPU the order of a tensor's bytes is a property of its storage,
which views share.

torch-npu knows it of its own tensors; of tensors without data and of simulated ones it is kept
here.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ND, NZ = 2, 29
"""torch-npu's numbers: row after row; tiles of 16 rows x 32 bytes, tile columns outermost."""
TILE_ROWS, TILE_BYTES = 16, 32

_marked: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()


def mark(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """Say that a tensor's storage is in a format; give the tensor."""
    _marked[tensor.untyped_storage()] = number
    return tensor


def format_of(tensor: torch.Tensor) -> int:
    """Format of a tensor without data, or of a simulated one."""
    return _marked.get(tensor.untyped_storage(), ND)
