"""Compressed sparse attention: compressor, lightning indexer, attention over selected rows."""

from __future__ import annotations

from dsv4_core.spec import Array, Ops, op


class AttentionOps(Ops):
    """Compression, indexing, attention."""

    @op(
        axes={"kv_score": "pool 2*width", "ape": "ratio width", "window_idxs": "rows span"},
        returns="rows dim",
        dtypes={"kv_score": "wide", "ape": "float32", "window_idxs": "int32", "return": "act"},
    )
    def compress(self, kv_score: Array, ape: Array, window_idxs: Array, *, dim: int) -> Array:
        """Mix windows of tokens into one row each, by a softmax per channel.

        ``kv_score[p]`` holds a token's kv (first half) and score (second half). Row r mixes the tokens ``window_idxs[r, j]`` (-1: none) with
        ``w[j, c] = softmax_j(score[j, c] + ape[j mod ratio, c])``. ``span = ratio`` (``width = dim``): ``y[r, c] = sum_j w[j, c] kv[j, c]``. ``span = 2 * ratio`` (overlapping, ``width = 2 dim``): the first ``ratio``
        tokens are the previous window and use channels ``c`` of the first half of ``width``, the others the current window and ``dim + c``; one softmax over both. A row
        with no token is zero. Wide inside, rounded once. Source: Compressor of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"q": "batch seq heads dim", "weights": "batch seq heads", "keys": "batch rows dim"},
        returns="batch seq rows",
        dtypes={"q": "act", "weights": "wide", "keys": "act", "return": "wide"},
    )
    def index_scores(self, q: Array, weights: Array, keys: Array, *, scale: float) -> Array:
        """``score[b, s, n] = sum_h scale * weights[b, s, h] * relu(sum_d q[b, s, h, d] * keys[b, n, d])``, all wide. Source: Indexer."""
        raise NotImplementedError

    @op(
        axes={"scores": "batch seq rows", "visible": "batch seq", "offset": "batch seq"},
        returns="batch seq topk",
        dtypes={"scores": "wide", "visible": "int32", "offset": "int32", "return": "int32"},
        judged="discrete",
    )
    def index_select(self, scores: Array, visible: Array, offset: Array, *, topk: int) -> Array:
        """Pick each token's best rows among its first ``visible`` ones: row + ``offset``, ``-1`` where there are fewer than ``topk``.

        The first ``min(topk, visible)`` picks are valid, in any order, the rest -1. On a tie the lower row wins. ``topk <= rows``.
        """
        raise NotImplementedError

    @op(
        axes={"q": "tokens heads dim", "kv": "rows dim", "attn_sink": "heads", "topk_idxs": "tokens picks"},
        returns="tokens heads dim",
        dtypes={"q": "act", "kv": "act", "attn_sink": "float32", "topk_idxs": "int32", "return": "act"},
        narrower=("probabilities in bfloat16",),
    )
    def sparse_attn(self, q: Array, kv: Array, attn_sink: Array, topk_idxs: Array, *, softmax_scale: float) -> Array:
        """Attend to selected rows, each key and value at once, with a sink in the denominator.

        ``s[t, h, j] = softmax_scale * sum_d q[t, h, d] kv[i, d]`` with ``i = topk_idxs[t, j]``, -1 meaning no row; ``o[t, h] = sum_j exp(s) kv[i] / (sum_j exp(s) + exp(attn_sink[h]))``. A token with no
        row gives zeros. A row that is listed twice counts twice. Wide inside, rounded once. Source: sparse_attn of the published kernels.
        """
        raise NotImplementedError
