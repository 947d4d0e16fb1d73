"""Fused ops: the shared expert; on a CPU the routed experts, read in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dsv4_backend_torch.attention import TorchAttention
from dsv4_backend_torch.cache import TorchCache
from dsv4_backend_torch.embed import TorchEmbed
from dsv4_backend_torch.mhc import TorchMhc
from dsv4_backend_torch.moe import TorchMoe
from dsv4_core.dtypes import Experts, ScaledArray, format_of
from dsv4_core.ops.fused import FusedOps

if TYPE_CHECKING:
    from dsv4_backend_torch.matmul import Weight
    from dsv4_core.dtypes import RowLayout


class TorchFused(TorchEmbed, TorchMoe, TorchAttention, TorchMhc, TorchCache, FusedOps):
    """Contracts of ``ops/fused.py``, where fusing pays."""

    def ffn(self, x: Tensor, w1: Weight, w3: Weight, w2: Weight, *, limit: float) -> Tensor:
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
        y = (
            torch.zeros((tokens, x.shape[1]), dtype=self.wide_type)
            if shared is None
            else shared.to(self.wide_type, copy=True)
        )
        x = self.quantised_activation(x, fmt) if (fmt := format_of(w1.dtype)) else x
        if tokens == 1:
            return self._one_token(x, weights, indices, y, w1, w3, w2, first_expert, limit).to(
                getattr(torch, out_dtype)
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
        if not (self.on_cpu and q.shape[0] == 1) or rows is None or row_index is None:
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
        # a decode step on a CPU: window rows and compressed ones are unpacked together
        recent = ring_index.shape[0]
        if min(int(index.min()) if index.shape[0] else 0 for index in (ring_index, row_index)) < 0:
            old = torch.cat(
                [self.cache_read(ring, ring_index, layout=layout), self.cache_read(rows, row_index, layout=layout)]
            )
        else:
            old = self.unpack(torch.cat([ring.index_select(0, ring_index), rows.index_select(0, row_index)]), layout)
        every = torch.cat([old[:recent], kv, old[recent:]])
        return self.sparse_attn(q, every, attn_sink, topk_idxs, softmax_scale=softmax_scale)

    def _one_token(
        self,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        y: Tensor,
        w1: Experts,
        w3: Experts,
        w2: Experts,
        first_expert: int,
        limit: float,
    ) -> Tensor:
        """A decode step's experts, added to ``y`` [1, dim]: the activations of all between one pair of products each."""
        local = [
            (j, e - first_expert) for j, e in enumerate(indices[0].tolist()) if 0 <= e - first_expert < w1.shape[0]
        ]
        if not local:
            return y
        gate, up = torch.cat([self.product(x, (w1[e], w3[e]), wide=False) for _, e in local]).chunk(2, 1)
        chosen = weights[0] if len(local) == weights.shape[1] else weights[0, [j for j, _ in local]]
        hidden = self.weighted_swiglu(gate, up, chosen[:, None], limit)
        if fmt := format_of(w2.dtype):
            hidden = self.quantised_activation(hidden, fmt)
        rows = [self.product(row, (w2[e],), wide=False) for row, (_, e) in zip(hidden.split(1), local, strict=True)]
        return y.add_(torch.cat(rows).sum(0, dtype=self.wide_type))

    def expert(self, x: Tensor, w13: tuple[Weight, Weight], w2: Weight, weight: Tensor | None, limit: float) -> Tensor:
        """One expert's rows: ``w2 . swiglu(w1 . x, w3 . x)``; w1 and w3 in one product, block by block of rows while they are in cache."""
        gate_up = self.product(x, w13, wide=False)
        inter = w2.shape[1]
        hidden = self.weighted_swiglu(gate_up[:, :inter], gate_up[:, inter:], weight, limit)
        return self.product(
            self.quantised_activation(hidden, w2.format) if isinstance(w2, ScaledArray) else hidden, (w2,), wide=False
        )
