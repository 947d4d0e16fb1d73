"""Ranks over torch.distributed with gloo: the one module of the reference that needs torch. Arrays share memory with it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed

from dsv4_core.contract.dtypes import E8M0_VALUES, Host, decode, numpy_dtype
from dsv4_core.ranks.watch import JOIN, RankError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_backend_reference.backend import ReferenceBackend
    from dsv4_core.contract.rendezvous import Rendezvous

dist: Any = torch.distributed  # its stubs leave out what it documents
SLOWEST = timedelta(minutes=30)  # a collective waits so long for a rank that still shows signs of life
ANSWER = timedelta(seconds=10)  # of the store


@contextmanager
def reaching() -> Iterator[None]:
    """Tell a connection that broke, or that was never made, from other errors: torch.distributed has no class for it."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error).splitlines()[0]) from error


class ReferenceProcessGroup:
    """All ranks of a run. Constructing it reaches the store, ``connect`` the other ranks."""

    def __init__(self, backend: ReferenceBackend, where: Rendezvous) -> None:
        """Raise ``RankError`` where the store cannot be reached."""
        self.backend, self.where = backend, where
        self.rank, self.ranks, self.holder = where.rank, where.ranks, where.holder

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
        store = dist.PrefixStore(f"{self.where.attempt}/torch", self._own)
        if not dist.is_initialized():
            with reaching():
                dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.ranks, timeout=SLOWEST)

    def groups(self, members: Sequence[Sequence[int]]) -> ReferenceGroup:
        """Make groups that together hold every rank once; give this rank's."""
        with reaching():
            made = [dist.new_group(list(ranks), timeout=SLOWEST) for ranks in members]
        mine = next(group for group, ranks in zip(made, members, strict=True) if self.rank in ranks)
        return ReferenceGroup(self.backend, mine, len(members[0]))

    def dequantise(self, codes: Host, scale: Host, *, block: int) -> Host:
        """Codes [n, dim] times scales [n, dim / block], in the activation dtype."""
        values = decode(codes, "e4m3").reshape(*scale.shape, block) * E8M0_VALUES[scale][..., None]
        return self.backend.rounded(values.reshape(codes.shape))

    def close(self) -> None:
        """Leave."""
        dist.destroy_process_group()


class ReferenceGroup:
    """Collectives among some of the ranks. What is only moved travels as bytes: torch has no ml_dtypes."""

    def __init__(self, backend: ReferenceBackend, group: Any, size: int) -> None:
        self.backend, self.group, self.size = backend, group, size

    def all_reduce(self, x: Host, *, out_dtype: str) -> Host:
        """Sum wide, rounded once."""
        total = x.astype(self.backend.wide_type)
        with reaching():
            dist.all_reduce(torch.from_numpy(total), group=self.group)
        return total.astype(numpy_dtype(out_dtype), copy=False)

    def all_gather(self, x: Host) -> Host:
        """Stack the members' arrays."""
        every = np.empty((self.size, *x.shape), x.dtype)
        with reaching():
            dist.all_gather([_bytes(part) for part in every], _bytes(x), group=self.group)
        return every

    def all_to_all(self, parts: Sequence[Host], send: Sequence[int], receive: Sequence[int]) -> list[Host]:
        """Exchange rows of several arrays, packed into one row of bytes each."""
        widths = [math.prod(part.shape[1:]) * part.itemsize for part in parts]
        packed = np.empty((parts[0].shape[0], sum(widths)), np.uint8)
        ends = np.cumsum(widths).tolist()
        for part, width, end in zip(parts, widths, ends, strict=True):
            packed[:, end - width : end] = np.ascontiguousarray(part).view(np.uint8).reshape(-1, width)
        came = np.empty((sum(receive), sum(widths)), np.uint8)
        with reaching():
            dist.all_to_all_single(_bytes(came, 2), _bytes(packed, 2), list(receive), list(send), group=self.group)
        return [
            np.ascontiguousarray(came[:, end - width : end]).view(part.dtype).reshape(-1, *part.shape[1:])
            for part, width, end in zip(parts, widths, ends, strict=True)
        ]


def _bytes(x: Host, axes: int = 1) -> torch.Tensor:
    """View an array's bytes as a tensor."""
    tensor = torch.from_numpy(np.ascontiguousarray(x).view(np.uint8))
    return tensor if axes == 2 else tensor.reshape(-1)
