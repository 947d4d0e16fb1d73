"""Fused ops: the shared expert; on a CPU the routed experts, read in place."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from dsv4_backend_torch.attention import TorchAttention
from dsv4_backend_torch.cache import TorchCache
from dsv4_backend_torch.compiled import ExpertTable
from dsv4_backend_torch.embed import TorchEmbed
from dsv4_backend_torch.mhc import TorchMhc
from dsv4_backend_torch.moe import TorchMoe, swiglu_
from dsv4_core.contract.dtypes import Experts, ScaledArray, format_of
from dsv4_core.contract.ops import EveryOp

if TYPE_CHECKING:
    from dsv4_backend_torch.matmul import Weight
    from dsv4_core.contract.dtypes import RowLayout


@functools.lru_cache(64)
def first_experts(rows: int) -> Tensor:
    """The first expert for each row [rows, 1]."""
    return torch.zeros((rows, 1), dtype=torch.int32)


class TorchFused(TorchEmbed, TorchMoe, TorchAttention, TorchMhc, TorchCache, EveryOp):
    """Contracts of ``ops/fused.py``, where fusing pays."""

    def ffn(self, x: Tensor, w1: Weight, w3: Weight, w2: Weight, *, limit: float) -> Tensor:
        x = self.quantised_activation(x, w1.format) if isinstance(w1, ScaledArray) else x
        if self.compiled and x.shape[0]:
            alone = ExpertTable((w1, w3, w2))
            few = self.compiled.moe(
                x, first_experts(x.shape[0]), None, None, alone, 0, limit, self.act_type, quantise=self.quantises(w2)
            )
            if few is not None:
                return few
        return self.expert(x, (w1, w3), w2, None, limit)

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
        if self.compiled and tokens:
            quantise = self.numerics == "native" and format_of(w2.dtype) in {"e4m3", "e2m1"}
            few = self.compiled.moe(
                x,
                indices,
                weights,
                shared,
                (w1, w3, w2),
                first_expert,
                limit,
                getattr(torch, out_dtype),
                quantise=quantise,
            )
            if few is not None:
                return few
        if tokens == 1:
            return self._one_token(
                x, weights, indices, shared, w1, w3, w2, first_expert, limit, getattr(torch, out_dtype)
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

    def cached_index_topk(
        self, q: Tensor, weights: Tensor, cache: Tensor, index: Tensor, visible: Tensor, offset: Tensor,
        *, layout: RowLayout, scale: float, topk: int,
    ) -> Tensor:  # fmt: skip
        if self.compiled:
            few = self.compiled.index_topk(q, weights, cache, index, visible, offset, layout, scale, topk)
            if few is not None:
                return few
        return cast(
            "Tensor",
            super().cached_index_topk(q, weights, cache, index, visible, offset, layout=layout, scale=scale, topk=topk),
        )

    def cached_sparse_attn(
        self, q: Tensor, kv: Tensor, ring: Tensor, ring_index: Tensor, rows: Tensor | None, row_index: Tensor | None,
        attn_sink: Tensor, topk_idxs: Tensor, *, layout: RowLayout, softmax_scale: float,
    ) -> Tensor:  # fmt: skip
        if self.compiled:
            few = self.compiled.sparse_attn(
                q, kv, ring, ring_index, rows, row_index, attn_sink, topk_idxs, layout, softmax_scale
            )
            if few is not None:
                return few
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
        out_type: torch.dtype,
    ) -> Tensor:
        """A decode step's experts and the shared one [1, dim], summed wide, in ``out_type``: the
        activations of all between one pair of products each.
        """
        local = [
            (j, e - first_expert) for j, e in enumerate(indices[0].tolist()) if 0 <= e - first_expert < w1.shape[0]
        ]
        chosen = weights if len(local) == weights.shape[1] else weights[:, [j for j, _ in local]]
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
        return (
            torch.cat(rows or [x.new_zeros((1, w2.shape[1]))]).sum(0, dtype=self.wide_type, keepdim=True).to(out_type)
        )

    def expert(self, x: Tensor, w13: tuple[Weight, Weight], w2: Weight, weight: Tensor | None, limit: float) -> Tensor:
        """One expert's rows: ``w2 . swiglu(w1 . x, w3 . x)``; w1 and w3 in one product, block by
        block of rows while they are in cache.
        """
        gate, up = self.product(x, w13, wide=False).chunk(2, 1)
        hidden = self.weighted_swiglu(gate, up, weight, limit)
        return self.product(
            self.quantised_activation(hidden, w2.format) if isinstance(w2, ScaledArray) else hidden, (w2,), wide=False
        )
