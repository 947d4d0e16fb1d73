"""Fused ops: the shared expert; on a CPU the routed experts, read in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dsv4_backend_torch.attention import TorchAttention, zero_row
from dsv4_backend_torch.cache import TorchCache
from dsv4_backend_torch.embed import TorchEmbed
from dsv4_backend_torch.mhc import TorchMhc
from dsv4_backend_torch.moe import TorchMoe, swiglu_
from dsv4_core.dtypes import Experts, ScaledArray, format_of
from dsv4_core.ops.fused import FusedOps

if TYPE_CHECKING:
    from dsv4_backend_torch.matmul import Weight
    from dsv4_core.dtypes import RowLayout


class RowMemory:
    """Where one row's activations in several experts lie: ``gate`` and ``up`` [experts, inter], ``rows`` the same by expert."""

    def __init__(self, experts: int, inter: int) -> None:
        with torch.inference_mode(mode=False):
            self.gate, self.up = torch.empty((2, experts, inter))
        self.rows = list(zip(self.gate, self.up, strict=True))


class TorchFused(TorchEmbed, TorchMoe, TorchAttention, TorchMhc, TorchCache, FusedOps):
    """Contracts of ``ops/fused.py``, where fusing pays."""

    _row_memory: dict[tuple[int, int], RowMemory]

    def ffn(self, x: Tensor, w1: Weight, w3: Weight, w2: Weight, *, limit: float) -> Tensor:
        if self.reads_in_place(x, w1):
            return self._row(x, [(w1, w3, w2)], None, None, limit)
        return self.expert(
            self.quantised_activation(x, w1.format) if isinstance(w1, ScaledArray) else x, (w1, w3), w2, None, limit
        )

    def moe(
        self, x: Tensor, weights: Tensor, indices: Tensor, shared: Tensor | None, w1: Experts, w3: Experts, w2: Experts,
        *, first_expert: int, limit: float, out_dtype: str,
    ) -> Tensor:  # fmt: skip
        if not self.on_cpu:
            return cast(
                "Tensor",
                super().moe(
                    x, weights, indices, shared, w1, w3, w2, first_expert=first_expert, limit=limit, out_dtype=out_dtype
                ),
            )
        tokens, topk = indices.shape
        x = self.quantised_activation(x, fmt) if (fmt := format_of(w1.dtype)) else x
        if tokens == 1:
            return self._one_token(x, weights, indices, shared, w1, w3, w2, first_expert, limit).to(
                getattr(torch, out_dtype)
            )
        y = (
            torch.zeros((tokens, x.shape[1]), dtype=self.wide_type)
            if shared is None
            else shared.to(self.wide_type, copy=True)
        )
        experts, order = indices.reshape(-1).sort(stable=True)
        used, counts = torch.unique(experts, return_counts=True)
        end = 0
        for e, count in zip(used.tolist(), counts.tolist(), strict=True):
            copies, end = order[end : end + count], end + count
            if 0 <= e - first_expert < w1.shape[0]:
                token = copies.div(topk, rounding_mode="floor")
                weight = weights.reshape(-1).index_select(0, copies)[:, None]
                rows = self.expert(
                    x.index_select(0, token),
                    (w1[e - first_expert], w3[e - first_expert]),
                    w2[e - first_expert],
                    weight,
                    limit,
                )
                y.index_add_(0, token, self.widen(rows))
        return y.to(getattr(torch, out_dtype))

    def cached_sparse_attn(
        self, q: Tensor, kv: Tensor, ring: Tensor, ring_index: Tensor, rows: Tensor | None, row_index: Tensor | None,
        attn_sink: Tensor, topk_idxs: Tensor, *, layout: RowLayout, softmax_scale: float,
    ) -> Tensor:  # fmt: skip
        if self.on_cpu and q.shape[0] == 1 and 0 not in ring_index.shape:
            every = self._all_rows(kv, ring, ring_index, rows, row_index, layout)
            if every is not None and torch.equal(topk_idxs, self.counted(every.shape[0] - 1)):
                return self.attend_all(q, every, attn_sink, softmax_scale)
        return cast(
            "Tensor",
            super().cached_sparse_attn(
                q,
                kv,
                ring,
                ring_index,
                rows,
                row_index,
                attn_sink,
                topk_idxs,
                layout=layout,
                softmax_scale=softmax_scale,
            ),
        )

    def _all_rows(
        self,
        kv: Tensor,
        ring: Tensor,
        ring_index: Tensor,
        rows: Tensor | None,
        row_index: Tensor | None,
        layout: RowLayout,
    ) -> Tensor | None:
        """``[ring[ring_index] | kv | rows[row_index] | zeros]``, wide; None where an index is -1."""
        try:
            recent = ring.index_select(0, ring_index)
            old = None if rows is None or row_index is None else rows.index_select(0, row_index)
        except IndexError:
            return None
        if layout.kind != "plain":  # window rows and compressed ones are unpacked together
            stored = self.unpack(recent if old is None else torch.cat([recent, old]), layout, self.wide_type)
            recent, old = stored[: recent.shape[0]], None if old is None else stored[recent.shape[0] :]
        parts = [recent, kv] if old is None else [recent, kv, old]
        return torch.cat([*map(self.widen, parts), zero_row(kv.shape[1], self.wide_type)])

    def _one_token(
        self,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        shared: Tensor | None,
        w1: Experts,
        w3: Experts,
        w2: Experts,
        first_expert: int,
        limit: float,
    ) -> Tensor:
        """A decode step's experts and the shared one [1, dim], summed wide: the activations of all between one pair of products each."""
        local = [
            (j, e - first_expert) for j, e in enumerate(indices[0].tolist()) if 0 <= e - first_expert < w1.shape[0]
        ]
        chosen = weights if len(local) == weights.shape[1] else weights[:, [j for j, _ in local]]
        if local and self.reads_in_place(x, w1[local[0][1]]):
            return self._row(x, [(w1[e], w3[e], w2[e]) for _, e in local], chosen.t(), shared, limit)
        rows = [] if shared is None else [shared]
        if local:
            gate, up = self.widen(torch.cat([self.product(x, (w1[e], w3[e]), wide=False) for _, e in local])).chunk(
                2, 1
            )
            hidden = self.rounded(swiglu_(gate, up, limit).mul_(chosen.t()))
            if fmt := format_of(w2.dtype):
                hidden = self.quantised_activation(hidden, fmt)
            rows += [
                self.product(row, (w2[e],), wide=False) for row, (_, e) in zip(hidden.split(1), local, strict=True)
            ]
        return torch.cat(rows or [x.new_zeros((1, w2.shape[1]))]).sum(0, dtype=self.wide_type, keepdim=True)

    def reads_in_place(self, x: Tensor, weight: Weight) -> bool:
        """Say whether a row is multiplied by float32 weights as they are, by MKL on a CPU."""
        return (
            x.shape[0] == 1
            and self.on_cpu
            and isinstance(weight, Tensor)
            and weight.dtype == x.dtype == torch.float32 == self.act_type
            and torch.float32 not in self.one_dnn
        )

    def _row(
        self,
        x: Tensor,
        experts: list[tuple[Tensor, Tensor, Tensor]],
        weights: Tensor | None,
        shared: Tensor | None,
        limit: float,
    ) -> Tensor:
        """One row through such experts, their sum added to ``shared``: every product goes to where it is needed, no call but products per expert."""
        inter = experts[0][0].shape[0]
        shape = len(experts), inter
        memory = self._row_memory.get(shape) or self._row_memory.setdefault(shape, RowMemory(*shape))
        row = x.reshape(-1)
        for (w1, w3, _), (gate, up) in zip(experts, memory.rows, strict=True):
            torch.mv(w1, row, out=gate)
            torch.mv(w3, row, out=up)
        hidden = swiglu_(memory.gate, memory.up, limit)
        if weights is not None:
            hidden.mul_(weights)
        y = None if shared is None else shared.reshape(-1)
        for (_, _, w2), (gate, _) in zip(experts, memory.rows, strict=True):
            y = torch.mv(w2, gate) if y is None else torch.addmv(y, w2, gate)
        return y[None]

    def expert(self, x: Tensor, w13: tuple[Weight, Weight], w2: Weight, weight: Tensor | None, limit: float) -> Tensor:
        """One expert's rows: ``w2 . swiglu(w1 . x, w3 . x)``; w1 and w3 in one product, block by block of rows while they are in cache."""
        gate, up = self.product(x, w13, wide=False).chunk(2, 1)
        hidden = self.weighted_swiglu(gate, up, weight, limit)
        return self.product(
            self.quantised_activation(hidden, w2.format) if isinstance(w2, ScaledArray) else hidden, (w2,), wide=False
        )
