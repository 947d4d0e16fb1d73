"""Cache rows: packing, scatter, gather."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_backend_torch.quant import TorchQuant
from dsv4_core.contract.dtypes import FP4_GROUP, KV_BLOCK, Format, RowLayout
from dsv4_core.contract.ops.cache import CacheOps

if TYPE_CHECKING:
    from collections.abc import Sequence


class TorchCache(TorchQuant, CacheOps):
    """Contracts of ``ops/cache.py``."""

    def cache_write(self, cache: Tensor, rows: Tensor, index: Tensor, *, layout: RowLayout) -> Tensor:
        if not (self.compiled and self.compiled.cache_write(cache, rows, index, layout)):
            self._store(cache, rows, index, layout)
        return cache

    def _store(self, cache: Tensor, rows: Tensor, index: Tensor, layout: RowLayout) -> None:
        if self.on_cpu:
            kept = torch.nonzero(index >= 0)[:, 0]
            if kept.shape[0] != index.shape[0]:
                index, rows = index.index_select(0, kept), rows.index_select(0, kept)
            cache.index_copy_(0, index.to(torch.int64), self.pack(rows, layout))
            return
        if not index.shape[0]:
            return
        stored = self.pack(rows, layout)
        # No shape may depend on values here: a row that is not stored repeats what the slot of a
        # row that is stored gets.
        target = index.to(torch.int64)
        kept = target >= 0
        if stored.dtype == torch.uint8 and stored.shape[1] % 4 == 0:  # fewer, wider elements, which every device copies
            stored, cache = stored.view(torch.int32), cache.view(torch.int32)
        if index.shape[0] == 1:  # no other row's slot to spare
            target = target.clamp(min=0)
            cache.index_copy_(0, target, torch.where(kept[:, None], stored, cache.index_select(0, target)))
            return
        first = kept.to(torch.int32).argmax(
            0, keepdim=True
        )  # one axis: an index without axes would be read on the host
        some = kept.index_select(0, first)[:, None]
        stored = torch.where(kept[:, None], stored, torch.where(some, stored.index_select(0, first), cache[:1]))
        cache.index_copy_(0, torch.where(kept, target, target.index_select(0, first).clamp(min=0)), stored)

    def cache_read(self, cache: Tensor, index: Tensor, *, layout: RowLayout) -> Tensor:
        if self.compiled:
            dtype = cache.dtype if layout.kind == "plain" else self.act_type
            if (rows := self.compiled.cache_read(cache, index, layout, dtype)) is not None:
                return rows
        if self.on_cpu and (not index.shape[0] or int(index.min()) >= 0):
            return self.unpack(cache.index_select(0, index), layout)
        rows = self.unpack(cache.index_select(0, index.clamp(min=0)), layout)
        return rows.masked_fill_((index < 0)[:, None], 0)

    def concat(self, parts: Sequence[Tensor], *, axis: int) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if self.compiled and (few := self.compiled.concat(parts, axis)) is not None:
            return few
        return torch.cat(tuple(parts), axis)

    def pack(self, rows: Tensor, layout: RowLayout) -> Tensor:
        """Rows [n, dim] as stored [n, width]."""
        if layout.kind == "plain":
            return rows
        fmt: Format = "e4m3" if layout.kind == "kv" else "e2m1"
        block = KV_BLOCK if layout.kind == "kv" else FP4_GROUP
        n, quantised = rows.shape[0], layout.dim - layout.rope_dim
        codes, scale = self.encode(rows[:, :quantised], fmt, block)
        codes = codes.reshape(n, quantised)
        if layout.kind == "key":
            pairs = (
                codes[:, 0::2] | (codes[:, 1::2] << 4)
                if codes.device.type == "cpu"
                else codes[:, 0::2] + 16 * codes[:, 1::2]
            )
            return torch.cat([pairs, scale], 1)
        rope = rows[:, quantised:]
        if n != 1:
            rope = rows.new_empty((n, layout.rope_dim)).copy_(rope)  # contiguous, with no rows too
        padding = codes.new_zeros((n, layout.width - quantised - 2 * layout.rope_dim - scale.shape[1]))
        return torch.cat([codes, scale, padding, rope.view(torch.uint8)], 1)

    def unpack(self, stored: Tensor, layout: RowLayout, dtype: torch.dtype | None = None) -> Tensor:
        """Stored rows [n, width] as rows [n, dim] of their own, in the activation dtype or
        ``dtype``: exact in both.
        """
        if layout.kind == "plain":
            return stored
        dtype = dtype or self.act_type
        n, quantised = stored.shape[0], layout.dim - layout.rope_dim
        if layout.kind == "key":
            values = self.decode_e2m1(stored[:, : quantised // 2], dtype).reshape(n, quantised // FP4_GROUP, FP4_GROUP)
            scale = stored[:, quantised // 2 :]
        else:
            values = self.decode_e4m3(stored[:, :quantised], dtype).reshape(n, quantised // KV_BLOCK, KV_BLOCK)
            scale = stored[:, quantised : quantised + quantised // KV_BLOCK]
        rows = values.mul_(self.scale_values(scale, dtype)[..., None]).reshape(n, quantised)
        if layout.rope_dim:
            rope = stored[:, -2 * layout.rope_dim :].contiguous().view(torch.bfloat16)
            rows = torch.cat([rows, rope.to(dtype)], 1)
        return rows
