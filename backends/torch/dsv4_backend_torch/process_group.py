"""Ranks over torch.distributed: gloo on a CPU, NCCL on cuda, HCCL on npu; what the device is
decides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from dsv4_backend_torch.numeric import torch_dtype
from dsv4_core.ranks.store import StoredRanks, reaching

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_backend_torch.quant import TorchQuant
    from dsv4_core.contract.rendezvous import Rendezvous

dist: Any = torch.distributed  # its stubs leave out what it documents
LIBRARY = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl", "xpu": "xccl"}


class TorchProcessGroup(StoredRanks):
    """All ranks of a run, over the device's own library."""

    def __init__(self, backend: TorchQuant, where: Rendezvous) -> None:
        super().__init__(dist, where, LIBRARY.get(backend.device.type, "gloo"))
        self.backend = backend
        self.host_reads_stall = backend.device.type != "cpu"
        if backend.device.type == "cuda" and backend.device.index is not None:
            self.device_id = backend.device

    def groups(self, members: Sequence[Sequence[int]]) -> TorchGroup:
        """Make groups that together hold every rank once; give this rank's."""
        return TorchGroup(self.backend, self.own_group(members), len(members[0]))

    def dequantise(self, codes: Tensor, scale: Tensor, *, block: int) -> Tensor:
        """Codes [n, dim] times scales [n, dim / block], in the activation dtype."""
        be = self.backend
        values = be.decode_e4m3(codes, be.act_type).reshape(*scale.shape, block)
        # exponents as float32's; act_quant makes none of 0 or 255. A product: shifts run on a
        # scalar core of some devices
        scales = (scale.to(torch.int32) * (1 << 23)).view(torch.float32)
        return (values * scales.to(be.act_type)[..., None]).reshape(codes.shape)

    def local_ids(self, ids: Tensor, first: int) -> Tensor:
        """Ids counted from ``first``, on the device."""
        return ids - first


class TorchGroup:
    """Collectives among some of the ranks. What is only moved travels as bytes, whatever dtypes the
    library knows.
    """

    def __init__(self, backend: TorchQuant, group: Any, size: int) -> None:
        self.backend, self.group, self.size = backend, group, size

    def all_reduce(self, x: Tensor, *, out_dtype: str) -> Tensor:
        total = x.to(self.backend.wide_type, copy=True, memory_format=torch.contiguous_format)
        with reaching():
            dist.all_reduce(total, group=self.group)
        return total.to(torch_dtype(out_dtype))

    def all_gather(self, x: Tensor) -> Tensor:
        every = x.new_empty((self.size, *x.shape))
        parts = [part.view(torch.uint8) for part in every.reshape(self.size, -1)]
        with reaching():
            dist.all_gather(parts, x.reshape(-1).view(torch.uint8), group=self.group)
        return every

    def all_to_all(self, parts: Sequence[Tensor], send: Sequence[int], receive: Sequence[int]) -> list[Tensor]:
        widths = [math.prod(part.shape[1:]) * part.element_size() for part in parts]
        rows = [part.reshape(-1).view(torch.uint8) for part in parts]
        packed = torch.cat([row.reshape(-1, width) for row, width in zip(rows, widths, strict=True)], 1)
        came = packed.new_empty((sum(receive), packed.shape[1]))
        with reaching():
            dist.all_to_all_single(came, packed, list(receive), list(send), group=self.group)
        columns = came.split(widths, 1)
        return [
            column.clone(memory_format=torch.contiguous_format)
            .reshape(-1)
            .view(part.dtype)
            .reshape(came.shape[0], *part.shape[1:])
            for column, part in zip(columns, parts, strict=True)
        ]
