"""Compressor, indexer and sparse attention."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_backend_torch.numeric import Numeric
from dsv4_core.contract.ops.attention import AttentionOps

AT_ONCE = 1 << 22  # elements of a block's intermediate scores: 16 MB in float32
SORTED = 4096  # rows up to which one call that sorts them all beats several that make them distinct and choose
TOKENS = 64  # of a block of attention on a CPU: neighbours share most of their rows


class TorchAttention(Numeric, AttentionOps):
    """Contracts of ``ops/attention.py``."""

    @property
    def keys_at_once(self) -> int | None:
        """On a CPU, keys of 128 channels that are 2 MB in float32."""
        return 4096 if self.on_cpu else None

    def compress(self, kv_score: Tensor, ape: Tensor, window_idxs: Tensor, *, dim: int) -> Tensor:
        if self.compiled:
            few = self.compiled.compress(kv_score, None, None, ape, window_idxs, dim, self.act_type)
            if few is not None:
                return few
        ratio, width = ape.shape
        rows, span = window_idxs.shape
        entries = kv_score.index_select(0, window_idxs.reshape(-1).clamp(min=0)).reshape(rows, span, 2 * width)
        kv, score = entries[..., :width], entries[..., width:] + self.widen(ape).repeat(span // ratio, 1)
        if (
            span > ratio
        ):  # overlapping: first half of the channels of the previous window, second half of the current one
            kv = torch.cat([kv[:, :ratio, :dim], kv[:, ratio:, dim:]], 1)
            score = torch.cat([score[:, :ratio, :dim], score[:, ratio:, dim:]], 1)
        absent = (window_idxs < 0)[..., None]
        score = score.masked_fill(
            absent, torch.finfo(score.dtype).min
        )  # not -inf: a row without tokens is a mean of zeros
        return self.rounded((score.softmax(1) * kv.masked_fill(absent, 0)).sum(1))

    def cached_compress(
        self, kv_score: Tensor, state: Tensor, index: Tensor, ape: Tensor, window_idxs: Tensor, *, dim: int
    ) -> Tensor:
        if self.compiled:
            few = self.compiled.compress(kv_score, state, index, ape, window_idxs, dim, self.act_type)
            if few is not None:
                return few
        rows: Tensor = super().cached_compress(kv_score, state, index, ape, window_idxs, dim=dim)
        return rows

    def index_scores(self, q: Tensor, weights: Tensor, keys: Tensor, *, scale: float) -> Tensor:
        batch, seq, heads, dim = q.shape
        rows = keys.shape[1]
        step = max(1, AT_ONCE // max(1, batch * heads * rows))
        wide_keys = self.widen(keys).transpose(1, 2)
        wide_weights = (self.widen(weights) * scale).reshape(batch, seq, 1, heads)
        scores = torch.empty((batch, seq, rows), dtype=self.wide_type, device=q.device)
        for i in range(0, seq, step):
            block = self.widen(q[:, i : i + step])
            tokens = block.shape[1]
            hits = (block.reshape(batch, tokens * heads, dim) @ wide_keys).relu_().reshape(batch, tokens, heads, rows)
            scores[:, i : i + step] = (wide_weights[:, i : i + step] @ hits)[:, :, 0]
        return scores

    def index_select(self, scores: Tensor, visible: Tensor, offset: Tensor, *, topk: int) -> Tensor:
        rows = scores.shape[-1]
        if self.on_cpu and rows <= SORTED and visible.numel() == 1 and int(visible) == rows:  # a decode step
            picks = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
            return (picks + offset[..., None]).to(torch.int32)
        row = torch.arange(rows, dtype=torch.int32, device=scores.device)
        hidden = row >= visible[..., None]
        if topk == rows:
            picks = row.expand(scores.shape)
        elif scores.dtype == torch.float32:
            picks = (
                self.selection_keys(scores, row).masked_fill_(hidden, torch.iinfo(torch.int64).min).topk(topk).indices
            )  # sorted: visible rows first
        else:
            picks = (
                scores.masked_fill(hidden, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
            )
        return torch.where(picks < visible[..., None], picks + offset[..., None], -1).to(torch.int32)

    @staticmethod
    def selection_keys(scores: Tensor, row: Tensor) -> Tensor:
        """Float32 scores as integers of the same order, NaN largest, made distinct by their rows:
        of equals the lower is the larger.
        """
        bits = scores.nan_to_num(torch.inf, torch.inf, -torch.inf).add_(0.0).view(torch.int32)  # -0 + 0.0 is 0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)  # negative: magnitude inverted
        return ordered.mul_(1 << 32).sub_(row)

    def sparse_attn(
        self, q: Tensor, kv: Tensor, attn_sink: Tensor, topk_idxs: Tensor, *, softmax_scale: float
    ) -> Tensor:
        if self.compiled:
            none = (None,) * 4
            few = self.compiled.sparse_attn(q, kv, *none, attn_sink, topk_idxs, None, softmax_scale)
            if few is not None:
                return few
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        padded = torch.cat([self.widen(kv), torch.zeros((1, kv.shape[1]), dtype=self.wide_type, device=kv.device)])
        sink = self.widen(attn_sink)
        step = self.attention_tokens(q, topk_idxs)
        for i in range(0, q.shape[0], step):
            block = slice(i, i + step)
            out[block] = self.attend(self.widen(q[block]) * softmax_scale, padded, sink, topk_idxs[block])
        return out

    def attention_tokens(self, q: Tensor, idxs: Tensor) -> int:
        """How many tokens attend at a time."""
        if self.on_cpu:
            return TOKENS
        return max(1, AT_ONCE // max(1, idxs.shape[1] * max(q.shape[1], q.shape[2])))

    def attend(self, q: Tensor, padded: Tensor, sink: Tensor, idxs: Tensor) -> Tensor:
        """Attention of a block of tokens, wide. The last row of ``padded`` is zero: it takes the
        sink's place in the softmax, and adds nothing.
        """
        tokens, _, dim = q.shape
        zero = padded.shape[0] - 1
        if self.on_cpu and tokens > 1:
            listed = torch.zeros(zero + 1, dtype=torch.bool)
            listed[torch.where(idxs < 0, zero, idxs).reshape(-1)] = True
            listed[zero] = True
            union = torch.nonzero(listed)[:, 0]
            shared = union.shape[0] <= 2 * idxs.shape[1]
            if shared and bool(torch.isfinite(q.sum() + padded.sum())):  # 0 times NaN would reach all tokens
                return self.attend_union(q, padded, sink, idxs, union)
        idxs = torch.cat([torch.where(idxs < 0, zero, idxs), torch.full_like(idxs[:, :1], zero)], 1)
        rows = padded.index_select(0, idxs.reshape(-1)).reshape(tokens, -1, dim)
        scores = q @ rows.transpose(1, 2)
        scores.masked_fill_((idxs == zero)[:, None], -torch.inf)
        scores[..., -1] = sink
        return scores.softmax(-1) @ rows

    def attend_union(self, q: Tensor, padded: Tensor, sink: Tensor, idxs: Tensor, union: Tensor) -> Tensor:
        """Attention of tokens that share most of their rows: one product with all rows that any of
        them lists, the others masked.
        """
        tokens, heads, dim = q.shape
        zero, count = padded.shape[0] - 1, union.shape[0]
        place = torch.empty(zero + 1, dtype=torch.int64)
        place[union] = torch.arange(count)
        times = torch.zeros((tokens, count), dtype=q.dtype)  # how often a token lists a row
        columns = place[torch.where(idxs < 0, zero, idxs)]
        times.scatter_add_(1, columns, torch.ones((), dtype=q.dtype).expand(columns.shape))
        bias = times.log_()
        rows = padded.index_select(0, union)
        scores = (q.reshape(-1, dim) @ rows.T).reshape(tokens, heads, count).add_(bias[:, None])
        scores[..., -1] = sink
        return (scores.softmax(-1).reshape(-1, count) @ rows).reshape(q.shape)
