"""Ranks over torch.distributed with gloo: the one module of the reference that needs torch. Arrays
share memory with it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed

from dsv4_core.contract.dtypes import E8M0_VALUES, Host, decode, numpy_dtype
from dsv4_core.ranks.store import StoredRanks, reaching

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_backend_reference.numeric import Numeric
    from dsv4_core.contract.rendezvous import Rendezvous

dist: Any = torch.distributed  # its stubs leave out what it documents


class ReferenceProcessGroup(StoredRanks):
    """All ranks of a run, over gloo."""

    def __init__(self, backend: Numeric, where: Rendezvous) -> None:
        super().__init__(dist, where, "gloo")
        self.backend = backend

    def groups(self, members: Sequence[Sequence[int]]) -> ReferenceGroup:
        """Make groups that together hold every rank once; give this rank's."""
        return ReferenceGroup(self.backend, self.own_group(members), len(members[0]))

    def dequantise(self, codes: Host, scale: Host, *, block: int) -> Host:
        """Codes [n, dim] times scales [n, dim / block], in the activation dtype."""
        values = decode(codes, "e4m3").reshape(*scale.shape, block) * E8M0_VALUES[scale][..., None]
        return self.backend.rounded(values.reshape(codes.shape))

    def local_ids(self, ids: Host, first: int) -> Host:
        """Ids counted from ``first``."""
        return ids - np.int32(first)


class ReferenceGroup:
    """Collectives among some of the ranks. What is only moved travels as bytes: torch has no
    ml_dtypes.
    """

    def __init__(self, backend: Numeric, group: Any, size: int) -> None:
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
