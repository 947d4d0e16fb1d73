"""Compressor, indexer and sparse attention in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_backend_reference import tiles
from dsv4_backend_reference.numeric import Numeric
from dsv4_core.contract.ops.attention import AttentionOps

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host

AT_ONCE = 1 << 22  # elements of a block's intermediate scores: 16 MB in float32
IN_CACHE = 1 << 18  # elements of products that are read at once after they were made: 1 MB, in a core's own cache
TOKENS = 64  # of a block of attention: neighbours share most of their rows


class ReferenceAttention(Numeric, AttentionOps):
    """Contracts of ``ops/attention.py``."""

    keys_at_once: int | None = 2048  # of 128 channels: 1 MB in float32

    def compress(self, kv_score: Host, ape: Host, window_idxs: Host, *, dim: int) -> Host:
        ratio, width = ape.shape
        _rows, span = window_idxs.shape
        absent = window_idxs < 0
        entries = self.widen(kv_score[np.maximum(window_idxs, 0)])
        kv, score = entries[..., :width], entries[..., width:] + np.tile(self.widen(ape), (span // ratio, 1))
        if (
            span > ratio
        ):  # overlapping: first half of the channels of the previous window, second half of the current one
            kv = np.concatenate([kv[:, :ratio, :dim], kv[:, ratio:, dim:]], axis=1)
            score = np.concatenate([score[:, :ratio, :dim], score[:, ratio:, dim:]], axis=1)
        score = np.where(absent[..., None], -np.inf, score)
        top = np.maximum(
            score.max(1, keepdims=True), np.finfo(score.dtype).min
        )  # a row without tokens: exp(-inf - min) = 0
        weight = np.exp(score - top)
        total = self.total(weight, 1)[:, 0]
        mixed = self.total(weight * np.where(absent[..., None], 0, kv), 1)[:, 0]
        return self.rounded(mixed / np.where(total == 0, 1, total))

    def index_scores(self, q: Host, weights: Host, keys: Host, *, scale: float) -> Host:
        batch, seq, heads, dim = q.shape
        visible = keys.shape[1]
        if self.batch_invariant:
            keys = tiles.padded(keys, 1, tiles.TERMS)
        rows = keys.shape[1]
        tile = max(256, IN_CACHE // (min(TOKENS, max(1, seq)) * heads))  # of rows
        tile = tiles.TERMS if self.batch_invariant else tile  # one shape: BLAS has another kernel for few columns
        scores = np.empty((batch, seq, rows), self.wide_type)
        for b in range(batch):  # one product per sequence
            wide_keys = self.widen(keys[b]).T
            for i in range(0, seq, TOKENS):
                wide = self.widen(q[b, i : i + TOKENS])
                scaled = self.widen(weights[b, i : i + TOKENS]) * self.wide_type.type(scale)
                for row in range(0, rows, tile):
                    part = slice(row, row + tile)
                    hits = self.dot(wide.reshape(-1, dim), wide_keys[:, part]).reshape(len(wide), heads, -1)
                    np.maximum(hits, 0, out=hits)
                    scores[b, i : i + TOKENS, part] = self.dot(scaled[:, None], hits)[:, 0]
        return scores[:, :, :visible]

    def index_select(self, scores: Host, visible: Host, offset: Host, *, topk: int) -> Host:
        rows = scores.shape[-1]
        flat, seen = scores.reshape(-1, rows), visible.reshape(-1, 1)
        picks = np.empty((len(flat), topk), np.int64)
        step = max(1, AT_ONCE // (4 * max(1, rows)))
        for i in range(0, len(flat), step):
            part = slice(i, i + step)
            masked = flat[part].copy()
            first = int(seen[part].min(initial=rows))  # rows before it are visible to all
            masked[:, first:] = np.where(np.arange(first, rows) < seen[part], masked[:, first:], -np.inf)
            picks[part] = self.best(masked, topk)
        picks = np.where(picks < seen, picks + offset.reshape(-1, 1), -1)
        return picks.astype(np.int32).reshape(*visible.shape, topk)

    def best(self, scores: Host, topk: int) -> Host:
        """Columns of each row's ``topk`` largest scores, of equals the lowest; a NaN is larger than
        all and so reaches the output.

        The topk-th largest of the maxima over groups of columns bounds the topk-th score from
        below, so that only scores above it are sorted; where those are too few, the bound is the
        topk-th score itself, and the lowest columns that equal it are the rest.
        """
        n, rows = scores.shape
        group = max(1, min(64, rows // (4 * topk)))
        grouped = rows // group * group
        maxima = np.concatenate([scores[:, :grouped].reshape(n, group, -1).max(1), scores[:, grouped:]], axis=1)
        if np.isnan(maxima).any():
            scores, maxima = (np.where(np.isnan(x), np.inf, x) for x in (scores, maxima))
        bound = np.partition(maxima, maxima.shape[1] - topk, axis=1)[:, maxima.shape[1] - topk, None]
        row, column = np.divmod(np.flatnonzero(scores > bound), rows)  # flat: many times faster than by two axes
        above = np.bincount(row, minlength=n)
        short = np.flatnonzero(above < topk)
        if len(short):
            level, at = np.divmod(np.flatnonzero(scores[short] == bound[short]), rows)
            rank = np.arange(len(level)) - np.searchsorted(level, np.arange(len(short)))[level]
            kept = rank < (topk - above[short])[level]
            row, column = np.concatenate([row, short[level[kept]]]), np.concatenate([column, at[kept]])
        order = np.lexsort((column, -scores[row, column], row))
        first = np.searchsorted(row[order], np.arange(n))
        return column[order][first[:, None] + np.arange(topk)]

    def sparse_attn(self, q: Host, kv: Host, attn_sink: Host, topk_idxs: Host, *, softmax_scale: float) -> Host:
        out = np.empty(q.shape, self.wide_type)
        if self.batch_invariant:
            topk_idxs = tiles.compacted(topk_idxs)
        sink = self.widen(attn_sink)[:, None]
        for i in range(0, len(q), TOKENS):
            block = slice(i, i + TOKENS)
            out[block] = self.attend(
                self.widen(q[block]) * self.wide_type.type(softmax_scale), kv, sink, topk_idxs[block]
            )
        return self.rounded(out)

    def attend(self, q: Host, kv: Host, sink: Host, idxs: Host) -> Host:
        """Attention of a block of tokens: over the union of their rows where they share most of
        them, else over gathered rows.
        """
        if self.batch_invariant:  # the union is the batch's
            return self.attend_gathered(q, kv, sink, idxs)
        tokens, heads, dim = q.shape
        listed = np.zeros(len(kv), bool)
        listed[idxs[idxs >= 0]] = True
        union = np.flatnonzero(listed)
        if len(union) <= 2 * idxs.shape[1]:
            place = np.zeros(len(kv) + 1, np.intp)  # place[-1] stays for the index -1
            place[union] = np.arange(len(union))
            width = len(union) + 1  # the last column collects -1
            cell = np.where(idxs < 0, len(union), place[idxs]) + np.arange(tokens)[:, None] * width
            listings = np.bincount(cell.reshape(-1), minlength=tokens * width).reshape(
                tokens, width
            )  # how often a token lists a row
            count = listings[:, None, :-1].astype(self.wide_type)
            rows = self.widen(kv[union])
            if not np.isfinite(rows).all():  # 0 times NaN: a row would reach tokens that do not list it
                return self.attend_gathered(q, kv, sink, idxs)
            scores = self.dot(q.reshape(-1, dim), rows.T).reshape(tokens, heads, len(union))
            weight = self.softmax_with_sink(scores, count, sink)
            return self.dot(weight.reshape(tokens * heads, len(union)), rows).reshape(q.shape)
        return self.attend_gathered(q, kv, sink, idxs)

    def attend_gathered(self, q: Host, kv: Host, sink: Host, idxs: Host) -> Host:
        """Attention of a block of tokens, each over rows gathered for it."""
        tokens, heads, dim = q.shape
        out = np.empty_like(q)
        step = max(1, AT_ONCE // (idxs.shape[1] * max(dim, heads)))
        for i in range(0, tokens, step):
            part = slice(i, i + step)
            rows = self.widen(kv[np.maximum(idxs[part], 0)])
            if not np.isfinite(kv[:1].astype(self.wide_type)).all():
                rows[idxs[part] < 0] = 0  # what stands for -1 is row 0
            count = (idxs[part] >= 0).astype(self.wide_type)[:, None]
            columns = rows.transpose(0, 2, 1)
            scores = tiles.wide_product(q[part], columns) if self.batch_invariant else self.dot(q[part], columns)
            weight = self.softmax_with_sink(scores, count, sink)
            out[part] = tiles.long_product(weight, rows) if self.batch_invariant else self.dot(weight, rows)
        return out

    def softmax_with_sink(self, scores: Host, count: Host, sink: Host) -> Host:
        """``count * exp(s) / (sum count * exp(s) + exp(sink))`` over the last axis; columns of
        count 0 do not matter.
        """
        scores = np.where(count > 0, scores, -np.inf)
        top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), sink)
        weight = np.exp(scores - top) * count
        return weight / (
            (tiles.long_sum(weight) if self.batch_invariant else self.total(weight, -1)) + np.exp(sink - top)
        )
