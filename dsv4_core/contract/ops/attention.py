"""Compressed sparse attention: compressor, lightning indexer, attention over selected rows."""

from __future__ import annotations

from dsv4_core.contract.dtypes import RowLayout
from dsv4_core.contract.ops.cache import CacheOps
from dsv4_core.contract.ops.matmul import MatmulOps
from dsv4_core.contract.spec import Array, op

SCORES_AT_ONCE = 1 << 24  # elements of indexer scores alive at a time in the default: 64 MB in float32


class AttentionOps(CacheOps, MatmulOps):
    """Compression, indexing, attention; over rows at hand, and fused over cached ones."""

    keys_at_once: int | None = None
    """Rows of a sequence that ``cached_index_topk`` unpacks and scores at a time, so that they stay
    in a core's cache: what is read from memory is the packed rows, once for a step's tokens. None:
    all, as a device would, where each call is a launch.
    """

    @op(
        axes={"kv_score": "pool 2*width", "ape": "ratio width", "window_idxs": "rows span"},
        returns="rows dim",
        dtypes={"kv_score": "wide", "ape": "float32", "window_idxs": "int32", "return": "act"},
        work={"vector": "6*rows*span*dim"},
    )
    def compress(self, kv_score: Array, ape: Array, window_idxs: Array, *, dim: int) -> Array:
        """Mix windows of tokens into one row each, by a softmax per channel.

        ``kv_score[p]`` holds a token's kv (first half) and score (second half). Row r mixes the
        tokens ``window_idxs[r, j]`` (-1: none) with ``w[j, c] = softmax_j(score[j, c] + ape[j mod
        ratio, c])``. ``span = ratio`` (``width = dim``): ``y[r, c] = sum_j w[j, c] kv[j, c]``.
        ``span = 2 * ratio`` (overlapping, ``width = 2 dim``): the first ``ratio`` tokens are the
        previous window and use channels ``c`` of the first half of ``width``, the others the
        current window and ``dim + c``; one softmax over both. A row with no token is zero. Wide
        inside, rounded once. Source: Compressor of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim", "wkv": "width dim", "wgate": "width dim"},
        returns="tokens 2*width",
        dtypes={"x": "act", "wkv": "weight", "wgate": "weight", "return": "wide"},
        fused=True,
    )
    def kv_score(self, x: Array, wkv: Array, wgate: Array) -> Array:
        """What ``compress`` mixes: ``linear`` with ``wkv`` and with ``wgate``, wide, side by
        side.
        """
        return self.concat([self.linear(x, weight, out_dtype=self.wide_dtype) for weight in (wkv, wgate)], axis=1)

    @op(
        axes={
            "kv_score": "tokens 2*width", "state": "slots 2*width", "index": "recent", "ape": "ratio width",
            "window_idxs": "rows span",
        },
        returns="rows dim",
        dtypes={
            "kv_score": "wide", "state": "wide", "index": "int32", "ape": "float32", "window_idxs": "int32",
            "return": "act",
        },
        fused=True,
    )  # fmt: skip
    def cached_compress(
        self, kv_score: Array, state: Array, index: Array, ape: Array, window_idxs: Array, *, dim: int
    ) -> Array:
        """``compress`` over ``[state[index] | kv_score]``: tokens before this step, and this
        step's.

        ``window_idxs`` counts in that concatenation. ``state`` holds plain rows; ``index`` -1 is a
        row of zeros.
        """
        before = self.cache_read(state, index, layout=RowLayout("plain", state.shape[1]))
        return self.compress(self.concat((before, kv_score), axis=0), ape, window_idxs, dim=dim)

    @op(
        axes={"q": "batch seq heads dim", "weights": "batch seq heads", "keys": "batch rows dim"},
        returns="batch seq rows",
        dtypes={"q": "act", "weights": "wide", "keys": "act", "return": "wide"},
        work={"fp4": "2*batch*seq*heads*rows*dim", "vector": "3*batch*seq*heads*rows"},
    )
    def index_scores(self, q: Array, weights: Array, keys: Array, *, scale: float) -> Array:
        """``score[b, s, n] = sum_h scale * weights[b, s, h] * relu(sum_d q[b, s, h, d] * keys[b, n,
        d])``, all wide.

        Source: Indexer.
        """
        raise NotImplementedError

    @op(
        axes={"scores": "batch seq rows", "visible": "batch seq", "offset": "batch seq"},
        returns="batch seq topk",
        dtypes={"scores": "wide", "visible": "int32", "offset": "int32", "return": "int32"},
        judged="discrete",
        work={"vector": "batch*seq*rows"},
    )
    def index_select(self, scores: Array, visible: Array, offset: Array, *, topk: int) -> Array:
        """Pick each token's best rows among its first ``visible`` ones: row + ``offset``, ``-1``
        where there are fewer than ``topk``.

        The first ``min(topk, visible)`` picks are valid, in any order, the rest -1. On a tie the
        lower row wins. ``topk <= rows``.
        """
        raise NotImplementedError

    @op(
        axes={"q": "tokens heads dim", "kv": "rows dim", "attn_sink": "heads", "topk_idxs": "tokens picks"},
        returns="tokens heads dim",
        dtypes={"q": "act", "kv": "act", "attn_sink": "float32", "topk_idxs": "int32", "return": "act"},
        narrower=("probabilities in bfloat16",),
        work={"act": "4*tokens*heads*picks*dim", "vector": "4*tokens*heads*picks"},
        reads={"kv": "min(1, tokens*picks/rows)"},
    )
    def sparse_attn(self, q: Array, kv: Array, attn_sink: Array, topk_idxs: Array, *, softmax_scale: float) -> Array:
        """Attend to selected rows, each key and value at once, with a sink in the denominator.

        ``s[t, h, j] = softmax_scale * sum_d q[t, h, d] kv[i, d]`` with ``i = topk_idxs[t, j]``, -1
        meaning no row; ``o[t, h] = sum_j exp(s) kv[i] / (sum_j exp(s) + exp(attn_sink[h]))``. A
        token with no row gives zeros. A row that is listed twice counts twice. Wide inside, rounded
        once. Source: sparse_attn of the published kernels.
        """
        raise NotImplementedError

    @op(
        axes={
            "q": "batch seq heads dim",
            "weights": "batch seq heads",
            "keys": "batch rows dim",
            "visible": "batch seq",
            "offset": "batch seq",
        },
        returns="batch seq topk",
        dtypes={"q": "act", "weights": "wide", "keys": "act", "visible": "int32", "offset": "int32", "return": "int32"},
        judged="discrete",
        fused=True,
    )
    def index_topk(
        self, q: Array, weights: Array, keys: Array, visible: Array, offset: Array, *, scale: float, topk: int
    ) -> Array:
        """``index_select`` of ``index_scores``, in blocks of tokens so that scores of a long
        context never exist at once.
        """
        batch, seq = visible.shape
        step = max(1, SCORES_AT_ONCE // (batch * keys.shape[1]))
        picks = [
            self.index_select(
                self.index_scores(q[:, i : i + step], weights[:, i : i + step], keys, scale=scale),
                visible[:, i : i + step],
                offset[:, i : i + step],
                topk=topk,
            )
            for i in range(0, max(seq, 1), step)
        ]
        return self.concat(picks, axis=1)

    @op(
        axes={
            "q": "batch seq heads dim", "weights": "batch seq heads", "cache": "slots layout.width", "index": "batch*rows",
            "visible": "batch seq", "offset": "batch seq",
        },
        returns="batch seq topk",
        dtypes={
            "q": "act", "weights": "wide", "cache": "cache", "index": "int32", "visible": "int32", "offset": "int32",
            "return": "int32",
        },
        judged="discrete",
        fused=True,
    )  # fmt: skip
    def cached_index_topk(
        self,
        q: Array,
        weights: Array,
        cache: Array,
        index: Array,
        visible: Array,
        offset: Array,
        *,
        layout: RowLayout,
        scale: float,
        topk: int,
    ) -> Array:
        """``index_topk`` over the cached keys ``cache[index]``, ``rows`` of them per sequence."""
        batch, seq, _, dim = q.shape
        rows = index.shape[0] // batch
        index = index.reshape((batch, rows))

        def keys(start: int, end: int) -> Array:
            part = index[:, start:end]
            return self.cache_read(cache, part.reshape((batch * part.shape[1],)), layout=layout).reshape(
                (batch, part.shape[1], dim)
            )

        if self.keys_at_once is None or rows <= self.keys_at_once:
            return self.index_topk(q, weights, keys(0, rows), visible, offset, scale=scale, topk=topk)
        starts = range(0, rows, self.keys_at_once)
        step, picks = max(1, SCORES_AT_ONCE // (batch * rows)), []
        for i in range(0, max(seq, 1), step):
            token = slice(i, i + step)
            scores = [
                self.index_scores(q[:, token], weights[:, token], keys(j, j + self.keys_at_once), scale=scale)
                for j in starts
            ]
            picks.append(self.index_select(self.concat(scores, axis=2), visible[:, token], offset[:, token], topk=topk))
        return self.concat(picks, axis=1)

    @op(
        axes={
            "q": "tokens heads dim", "kv": "tokens dim", "ring": "ring_slots layout.width", "ring_index": "recent",
            "rows": "row_slots layout.width ?", "row_index": "old ?", "attn_sink": "heads", "topk_idxs": "tokens picks",
        },
        returns="tokens heads dim",
        dtypes={
            "q": "act", "kv": "act", "ring": "cache", "ring_index": "int32", "rows": "cache", "row_index": "int32", "attn_sink": "float32",
            "topk_idxs": "int32", "return": "act",
        },
        narrower=("probabilities in bfloat16",),
        fused=True,
    )  # fmt: skip
    def cached_sparse_attn(
        self,
        q: Array,
        kv: Array,
        ring: Array,
        ring_index: Array,
        rows: Array | None,
        row_index: Array | None,
        attn_sink: Array,
        topk_idxs: Array,
        *,
        layout: RowLayout,
        softmax_scale: float,
    ) -> Array:
        """``sparse_attn`` over ``[ring[ring_index] | kv | rows[row_index]]``: window rows before
        this step, this step's own, compressed rows.

        ``topk_idxs`` counts in that concatenation. ``rows`` and ``row_index`` are None in a layer
        without compression.
        """
        parts = [self.cache_read(ring, ring_index, layout=layout), kv]
        if rows is not None and row_index is not None:
            parts.append(self.cache_read(rows, row_index, layout=layout))
        return self.sparse_attn(q, self.concat(parts, axis=0), attn_sink, topk_idxs, softmax_scale=softmax_scale)
