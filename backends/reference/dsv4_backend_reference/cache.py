"""Cache rows in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_backend_reference.quant import ReferenceQuant, scale_bytes
from dsv4_core.contract.dtypes import (
    BFLOAT16,
    E8M0_VALUES,
    FP4_GROUP,
    KV_BLOCK,
    Format,
    Host,
    RowLayout,
    encode,
    pack_fp4,
    unpack,
)
from dsv4_core.contract.ops.cache import CacheOps

if TYPE_CHECKING:
    from collections.abc import Sequence


class ReferenceCache(ReferenceQuant, CacheOps):
    """Contracts of ``ops/cache.py``."""

    def cache_write(self, cache: Host, rows: Host, index: Host, *, layout: RowLayout) -> Host:
        kept = index >= 0
        if kept.any():
            cache[index[kept]] = self.pack(rows[kept], layout)
        return cache

    def cache_read(self, cache: Host, index: Host, *, layout: RowLayout) -> Host:
        stored = np.take(cache, np.maximum(index, 0), axis=0)  # several times faster than by []
        rows = self.unpack(stored, layout)
        rows[index < 0] = 0
        return rows

    def concat(self, parts: Sequence[Host], *, axis: int) -> Host:
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)

    def pack(self, rows: Host, layout: RowLayout) -> Host:
        """Rows [n, dim] as stored [n, width]."""
        if layout.kind == "plain":
            return rows
        fmt: Format = "e4m3" if layout.kind == "kv" else "e2m1"
        block = KV_BLOCK if fmt == "e4m3" else FP4_GROUP
        quantised = layout.dim - layout.rope_dim
        blocks = self.widen(rows[:, :quantised]).reshape(len(rows), quantised // block, block)
        scale = scale_bytes(blocks, fmt)
        codes = encode(blocks / E8M0_VALUES[scale][..., None], fmt).reshape(len(rows), quantised)
        if layout.kind == "key":
            return np.concatenate([pack_fp4(codes), scale], axis=1)
        padding = np.zeros((len(rows), layout.width - quantised - 2 * layout.rope_dim - scale.shape[1]), np.uint8)
        rope = np.ascontiguousarray(rows[:, quantised:]).view(np.uint8)
        return np.concatenate([codes, scale, padding, rope], axis=1)

    def unpack(self, stored: Host, layout: RowLayout) -> Host:
        """Stored rows [n, width] as rows [n, dim] of their own."""
        if layout.kind == "plain":
            return stored
        n, quantised = len(stored), layout.dim - layout.rope_dim
        if layout.kind == "key":
            values = unpack(stored[:, : quantised // 2], "e2m1").reshape(n, quantised // FP4_GROUP, FP4_GROUP)
            scale = stored[:, quantised // 2 :]
        else:
            values = unpack(stored[:, :quantised], "e4m3").reshape(n, quantised // KV_BLOCK, KV_BLOCK)
            scale = stored[:, quantised : quantised + values.shape[1]]
        values *= E8M0_VALUES[scale][..., None]
        rows = np.empty((n, layout.dim), BFLOAT16)
        rows[:, :quantised] = values.reshape(n, quantised)
        if layout.rope_dim:
            rows[:, quantised:] = np.ascontiguousarray(stored[:, -2 * layout.rope_dim :]).view(BFLOAT16)
        return self.rounded(rows)
