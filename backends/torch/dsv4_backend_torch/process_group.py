"""Ranks over torch.distributed: gloo on a CPU, NCCL on cuda, HCCL on npu; what the device is decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsv4_backend_torch.numeric import torch_dtype
from dsv4_core.liveness import JOIN, RankError
from dsv4_core.rendezvous import Rendezvous

if TYPE_CHECKING:
    from dsv4_backend_torch.backend import TorchBackend

LIBRARY = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl", "xpu": "xccl"}
SLOWEST = timedelta(minutes=30)  # a collective waits so long for a rank that still shows signs of life
ANSWER = timedelta(seconds=10)  # of the store


class TorchProcessGroup:
    """All ranks of a run. Constructing it reaches the store, ``connect`` the other ranks."""

    def __init__(self, backend: TorchBackend, where: Rendezvous) -> None:
        """Raise ``RankError`` where the store cannot be reached."""
        self.backend, self.rank, self.ranks, self.holder = backend, where.rank, where.ranks, where.holder
        self.library = LIBRARY.get(backend.device.type, "gloo")
        self.attempt = where.attempt
        address = (where.host, where.port, where.ranks)
        try:
            self._own = dist.TCPStore(*address, is_master=where.rank == where.holder, timeout=timedelta(seconds=JOIN), wait_for_workers=False)
            self.store = dist.PrefixStore(where.attempt, dist.TCPStore(*address, is_master=False, timeout=ANSWER, wait_for_workers=False))
        except RuntimeError as error:
            holder = "the launcher" if where.holder is None else f"rank {where.holder}"
            raise RankError(
                f"rank {where.rank} found no store of {holder} at {where.host}:{where.port} within {JOIN:.0f} s: {str(error).splitlines()[0]}"
            ) from error

    def connect(self) -> None:
        """Connect with all other ranks, which do the same."""
        store = dist.PrefixStore(f"{self.attempt}/torch", self._own)
        if not dist.is_initialized():
            dist.init_process_group(self.library, store=store, rank=self.rank, world_size=self.ranks, timeout=SLOWEST)

    def groups(self, members: Sequence[Sequence[int]]) -> TorchGroup:
        """Make groups that together hold every rank once; give this rank's."""
        made = [dist.new_group(list(ranks), timeout=SLOWEST) for ranks in members]
        mine = next(group for group, ranks in zip(made, members, strict=True) if self.rank in ranks)
        return TorchGroup(self.backend, mine, len(members[0]))

    def dequantise(self, codes: Tensor, scale: Tensor, *, block: int) -> Tensor:
        """Codes [n, dim] times scales [n, dim / block], in the activation dtype."""
        be = self.backend
        values = be.decode_e4m3(codes, be.act_type).reshape(*scale.shape, block)
        return (values * be.scale_values(scale, be.act_type)[..., None]).reshape(codes.shape)

    def close(self) -> None:
        """Leave."""
        dist.destroy_process_group()


class TorchGroup:
    """Collectives among some of the ranks. What is only moved travels as bytes, whatever dtypes the library knows."""

    def __init__(self, backend: TorchBackend, group: Any, size: int) -> None:
        self.backend, self.group, self.size = backend, group, size

    def all_reduce(self, x: Tensor, *, out_dtype: str) -> Tensor:
        total = x.to(self.backend.wide_type, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total.to(torch_dtype(out_dtype))

    def all_gather(self, x: Tensor) -> Tensor:
        every = x.new_empty((self.size, *x.shape))
        dist.all_gather([part.view(torch.uint8) for part in every.reshape(self.size, -1)], x.contiguous().reshape(-1).view(torch.uint8), group=self.group)
        return every

    def all_to_all(self, parts: Sequence[Tensor], send: Sequence[int], receive: Sequence[int]) -> list[Tensor]:
        rows = [part.contiguous().reshape(part.shape[0], math.prod(part.shape[1:])) for part in parts]
        packed = torch.cat([part.view(torch.uint8) for part in rows], 1)
        came = packed.new_empty((sum(receive), packed.shape[1]))
        dist.all_to_all_single(came, packed, list(receive), list(send), group=self.group)
        columns = came.split([row.shape[1] * row.element_size() for row in rows], 1)
        return [
            column.contiguous().view(part.dtype).reshape(-1, *part.shape[1:]) if came.shape[0] else part.new_empty((0, *part.shape[1:]))
            for column, part in zip(columns, parts, strict=True)
        ]
