"""Ranks over torch.distributed: gloo on a CPU, NCCL on cuda, HCCL on npu; what the device is decides."""

from __future__ import annotations

import math
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from dsv4_backend_torch.numeric import torch_dtype
from dsv4_core.ranks.watch import JOIN, RankError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_backend_torch.backend import TorchBackend
    from dsv4_core.contract.rendezvous import Rendezvous

dist: Any = torch.distributed  # its stubs leave out what it documents
LIBRARY = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl", "xpu": "xccl"}
SLOWEST = timedelta(minutes=30)  # a collective waits so long for a rank that still shows signs of life
ANSWER = timedelta(seconds=10)  # of the store


@contextmanager
def reaching() -> Iterator[None]:
    """Tell a connection that broke, or that was never made, from other errors: torch.distributed has no class for it."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error


class TorchProcessGroup:
    """All ranks of a run. Constructing it reaches the store, ``connect`` the other ranks."""

    def __init__(self, backend: TorchBackend, where: Rendezvous) -> None:
        """Raise ``RankError`` where the store cannot be reached."""
        self.backend, self.rank, self.ranks, self.holder = backend, where.rank, where.ranks, where.holder
        self.library = LIBRARY.get(backend.device.type, "gloo")
        self.attempt = where.attempt

        def store(*, is_master: bool, seconds: timedelta) -> Any:
            return dist.TCPStore(
                where.host, where.port, where.ranks, is_master, timeout=seconds, wait_for_workers=False
            )

        try:
            self._own = store(is_master=where.rank == where.holder, seconds=timedelta(seconds=JOIN))
            self.store = dist.PrefixStore(where.attempt, store(is_master=False, seconds=ANSWER))
        except RuntimeError as error:
            holder = "the launcher" if where.holder is None else f"rank {where.holder}"
            at = f"{where.host}:{where.port} within {JOIN:.0f} s"
            raise RankError(
                f"rank {where.rank} found no store of {holder} at {at}: {str(error).splitlines()[0]}"
            ) from error

    def connect(self) -> None:
        """Connect with all other ranks, which do the same."""
        store = dist.PrefixStore(f"{self.attempt}/torch", self._own)
        if not dist.is_initialized():
            with reaching():
                dist.init_process_group(
                    self.library, store=store, rank=self.rank, world_size=self.ranks, timeout=SLOWEST
                )

    def groups(self, members: Sequence[Sequence[int]]) -> TorchGroup:
        """Make groups that together hold every rank once; give this rank's."""
        with reaching():
            made = [dist.new_group(list(ranks), timeout=SLOWEST) for ranks in members]
        mine = next(group for group, ranks in zip(made, members, strict=True) if self.rank in ranks)
        return TorchGroup(self.backend, mine, len(members[0]))

    def dequantise(self, codes: Tensor, scale: Tensor, *, block: int) -> Tensor:
        """Codes [n, dim] times scales [n, dim / block], in the activation dtype."""
        be = self.backend
        values = be.decode_e4m3(codes, be.act_type).reshape(*scale.shape, block)
        scales = (scale.to(torch.int32) << 23).view(
            torch.float32
        )  # exponents as float32's; act_quant makes none of 0 or 255
        return (values * scales.to(be.act_type)[..., None]).reshape(codes.shape)

    def close(self) -> None:
        """Leave."""
        dist.destroy_process_group()


class TorchGroup:
    """Collectives among some of the ranks. What is only moved travels as bytes, whatever dtypes the library knows."""

    def __init__(self, backend: TorchBackend, group: Any, size: int) -> None:
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
