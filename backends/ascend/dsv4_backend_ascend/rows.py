"""Cache rows that are plain, and what is read by their indices, with what indices need made once
for all layers of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dsv4_backend_ascend.chip import ChipBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import RowLayout


class Written(NamedTuple):
    """Where rows go. ``target`` [n], int64: slots, no row to none. ``source`` [n]: which row goes
    there: a row that is not stored repeats what the slot of one that is stored gets; None for a
    single row. ``some`` [n or 1, 1]: whether a row is stored.
    """

    target: torch.Tensor
    source: torch.Tensor | None
    some: torch.Tensor


class Read(NamedTuple):
    """Which rows are gathered: ``index`` without -1, and where that was, [n, 1]."""

    index: torch.Tensor
    absent: torch.Tensor


def writing(index: torch.Tensor) -> Written:
    """Prepare a write; shapes do not depend on values."""
    target, stored = index.to(torch.int64), index >= 0
    if index.shape[0] == 1:
        return Written(target.clamp(min=0), None, stored[:, None])
    first = stored.to(torch.int32).argmax(0, keepdim=True)
    row = torch.arange(index.shape[0], device=index.device)
    return Written(
        torch.where(stored, target, target.index_select(0, first).clamp(min=0)),
        torch.where(stored, row, first),
        stored.index_select(0, first)[:, None],
    )


def reading(index: torch.Tensor) -> Read:
    """Prepare a gather."""
    return Read(index.clamp(min=0), (index < 0)[:, None])


class Rows(ChipBackend):
    """Cache ops over plain rows, and the compressor; packed rows go the portable way."""

    def cache_write(
        self, cache: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, *, layout: RowLayout
    ) -> torch.Tensor:
        if layout.kind != "plain":
            return super().cache_write(cache, rows, index, layout=layout)
        if not index.shape[0]:
            return cache
        where: Written = self.kept.of((index, "written"), lambda: writing(index))
        if where.source is None:
            old = cache.index_select(0, where.target)
        else:
            old, rows = cache[:1], rows.index_select(0, where.source)
        return cache.index_copy_(0, where.target, torch.where(where.some, rows, old))

    def cache_read(self, cache: torch.Tensor, index: torch.Tensor, *, layout: RowLayout) -> torch.Tensor:
        where: Read = self.kept.of((index, "read"), lambda: reading(index))
        rows = cache.index_select(0, where.index)
        rows = rows if layout.kind == "plain" else self.unpack(rows, layout)
        return rows.masked_fill_(where.absent, 0)

    def concat(self, parts: Sequence[torch.Tensor], *, axis: int) -> torch.Tensor:
        """Indices that were joined in a layer before are joined already."""
        if len(parts) > 1 and all(part.dtype == torch.int32 for part in parts):
            return self.kept.of((*parts, "joined", axis), lambda: torch.cat(tuple(parts), axis))  # type: ignore[no-any-return]
        return super().concat(parts, axis=axis)

    def compress(
        self, kv_score: torch.Tensor, ape: torch.Tensor, window_idxs: torch.Tensor, *, dim: int
    ) -> torch.Tensor:
        """One gather for keys, values and scores of both halves of a window."""
        ratio, width = ape.shape
        span = window_idxs.shape[1]
        if not window_idxs.numel() or not kv_score.numel():
            return super().compress(kv_score, ape, window_idxs, dim=dim)
        halves = width // dim  # 2 where windows overlap: the first half of a window reads the first ``dim`` channels

        def index() -> tuple[torch.Tensor, torch.Tensor]:
            part = torch.arange(2 * halves, dtype=torch.int32, device=window_idxs.device).reshape(2, 1, halves, 1)
            rows = window_idxs.clamp(min=0).reshape(1, -1, halves, span // halves)
            return (rows * (2 * halves) + part).reshape(-1), (window_idxs < 0)[..., None]

        where, absent = self.kept.of((window_idxs, "window", dim, width), index)
        bias = self.kept.always(
            ("ape", id(ape), span),
            ape,
            lambda: self.widen(ape).unflatten(1, (halves, dim)).transpose(0, 1).reshape(-1, dim).repeat(
                span // (ratio * halves), 1
            ),
        )  # fmt: skip
        kv, score = kv_score.reshape(-1, dim).index_select(0, where).reshape(2, -1, span, dim).unbind(0)
        score = (score + bias).masked_fill_(absent, torch.finfo(score.dtype).min)
        return self.rounded(score.softmax(1).mul_(kv.masked_fill_(absent, 0)).sum(1))

    def cached_index_topk(
        self, q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor, index: torch.Tensor, visible: torch.Tensor,
        offset: torch.Tensor, *, layout: RowLayout, scale: float, topk: int,
    ) -> torch.Tensor:  # fmt: skip
        keys = self.cache_read(cache, index, layout=layout).unflatten(0, (q.shape[0], -1))
        return self.index_topk(q, weights, keys, visible, offset, scale=scale, topk=topk)
