"""Compressed sparse attention: compressor, lightning indexer, attention over selected rows."""

from __future__ import annotations

from dsv4_core.contract.spec import Array, Case, Ops, op


def _compress_cases() -> tuple[Case, ...]:
    plain = Case("ratio=128", {"rows": 2, "ratio": 128}, {"dim": 64}, tier="smoke")
    overlapping = Case("ratio=4", {"rows": 5, "ratio": 4}, {"dim": 64}, tier="smoke")
    return (
        plain,
        overlapping,
        *overlapping.odd("rows"),
        overlapping.but("first_row", "smoke", data="first_row"),  # no previous window
        overlapping.but("padding", "smoke", data="padding"),  # rows without a token
        overlapping.but("outliers", data="outliers"),
        overlapping.but("peaked", data="peaked"),
        plain.but("peaked_128", data="peaked"),
        plain.but("padding_128", data="padding"),
        overlapping.but("views", views=True),
        overlapping.but("flash_ratio=4", rows=33, dim=512),
        overlapping.but("flash_indexer", rows=33, dim=128),
        plain.but("flash_ratio=128", rows=3, dim=512),
    )


def _index_scores_cases() -> tuple[Case, ...]:
    base = Case("small", {"batch": 2, "seq": 3, "heads": 4, "dim": 64, "rows": 20}, {"scale": 0.0625}, tier="smoke")
    return (
        base,
        *base.odd("rows"),
        *(odd.but(f"odd_{odd.name}", odd.tier) for odd in base.odd("seq", sizes=(0, 1, 17))),
        base.but("outliers", data="outliers"),
        base.but("on_grid", data="fp4"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", batch=1, heads=64, dim=128, rows=257, scale=0.011048543456039806),  # 128^-0.5 * 64^-0.5
        base.but("flash_long", "full", batch=1, heads=64, dim=128, rows=8193, scale=0.011048543456039806),
    )


def _index_select_cases() -> tuple[Case, ...]:
    base = Case("small", {"batch": 2, "seq": 3, "rows": 40}, {"topk": 8}, tier="smoke")
    return (
        base,
        base.but("ties", "smoke", data="ties"),
        base.but("all_equal", "smoke", data="equal"),
        base.but("few_visible", "smoke", data="few_visible"),
        base.but("near_ties", data="near_ties"),
        base.but("topk=rows", topk=40),
        base.but("negative", data="negative"),
        *base.odd("seq", sizes=(0, 1, 17, 65)),
        base.but("one_row", rows=1, topk=1),
        base.but("views", views=True),
        base.but("flash", rows=2049, topk=512),
        base.but("pro", "full", rows=8193, topk=1024, data="ties"),
    )


def _sparse_attn_cases() -> tuple[Case, ...]:
    base = Case(
        "small",
        {"tokens": 5, "heads": 4, "dim": 128, "rows": 40, "picks": 16},
        {"softmax_scale": 0.08838834764831845},
        tier="smoke",
    )
    return (
        base,
        *base.odd(),
        *base.odd("picks", sizes=(1, 17, 33)),
        base.but("padding", "smoke", data="padding"),
        base.but("all_masked", "smoke", data="all_masked"),
        base.but("strong_sink", "smoke", data="strong_sink"),
        base.but("peaked", "smoke", data="peaked"),  # scores far apart: exp must not overflow
        base.but("repeated", data="repeated"),
        base.but("outliers", data="outliers"),
        base.but("cancel", data="cancel"),
        base.but("zero_rows", data="zero_rows"),
        base.but("shared_rows", data="shared_rows", tokens=65, rows=80),  # neighbours list the same rows
        base.but("views", views=True),
        base.but("flash", tokens=3, heads=64, dim=512, rows=300, picks=192, softmax_scale=512**-0.5, data="padding"),
        base.but("flash_csa", "full", tokens=5, heads=64, dim=512, rows=1200, picks=640, softmax_scale=512**-0.5),
        base.but("pro_csa", "full", tokens=3, heads=128, dim=512, rows=2000, picks=1152, softmax_scale=512**-0.5),
    )


class AttentionOps(Ops):
    """Compression, indexing, attention."""

    @op(
        axes={"kv_score": "pool 2*width", "ape": "ratio width", "window_idxs": "rows span"},
        returns="rows dim",
        dtypes={"kv_score": "wide", "ape": "float32", "window_idxs": "int32", "return": "act"},
        work={"vector": "6*rows*span*dim"},
        cases=_compress_cases,
    )
    def compress(self, kv_score: Array, ape: Array, window_idxs: Array, *, dim: int) -> Array:
        """Mix windows of tokens into one row each, by a softmax per channel.

        ``kv_score[p]`` holds a token's kv (first half) and score (second half). Row r mixes the tokens ``window_idxs[r,
        j]`` (-1: none) with ``w[j, c] = softmax_j(score[j, c] + ape[j mod ratio, c])``. ``span = ratio`` (``width =
        dim``): ``y[r, c] = sum_j w[j, c] kv[j, c]``. ``span = 2 * ratio`` (overlapping, ``width = 2 dim``): the first
        ``ratio`` tokens are the previous window and use channels ``c`` of the first half of ``width``, the others the
        current window and ``dim + c``; one softmax over both. A row with no token is zero. Wide inside, rounded once.
        Source: Compressor of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"q": "batch seq heads dim", "weights": "batch seq heads", "keys": "batch rows dim"},
        returns="batch seq rows",
        dtypes={"q": "act", "weights": "wide", "keys": "act", "return": "wide"},
        work={"fp4": "2*batch*seq*heads*rows*dim", "vector": "3*batch*seq*heads*rows"},
        cases=_index_scores_cases,
    )
    def index_scores(self, q: Array, weights: Array, keys: Array, *, scale: float) -> Array:
        """``score[b, s, n] = sum_h scale * weights[b, s, h] * relu(sum_d q[b, s, h, d] * keys[b, n, d])``, all wide.

        Source: Indexer.
        """
        raise NotImplementedError

    @op(
        axes={"scores": "batch seq rows", "visible": "batch seq", "offset": "batch seq"},
        returns="batch seq topk",
        dtypes={"scores": "wide", "visible": "int32", "offset": "int32", "return": "int32"},
        judged="discrete",
        work={"vector": "batch*seq*rows"},
        cases=_index_select_cases,
    )
    def index_select(self, scores: Array, visible: Array, offset: Array, *, topk: int) -> Array:
        """Pick each token's best rows among its first ``visible`` ones: row + ``offset``, ``-1`` where there are fewer
        than ``topk``.

        The first ``min(topk, visible)`` picks are valid, in any order, the rest -1. On a tie the lower row wins. ``topk
        <= rows``.
        """
        raise NotImplementedError

    @op(
        axes={"q": "tokens heads dim", "kv": "rows dim", "attn_sink": "heads", "topk_idxs": "tokens picks"},
        returns="tokens heads dim",
        dtypes={"q": "act", "kv": "act", "attn_sink": "float32", "topk_idxs": "int32", "return": "act"},
        narrower=("probabilities in bfloat16",),
        work={"act": "4*tokens*heads*picks*dim", "vector": "4*tokens*heads*picks"},
        reads={"kv": "min(1, tokens*picks/rows)"},
        cases=_sparse_attn_cases,
    )
    def sparse_attn(self, q: Array, kv: Array, attn_sink: Array, topk_idxs: Array, *, softmax_scale: float) -> Array:
        """Attend to selected rows, each key and value at once, with a sink in the denominator.

        ``s[t, h, j] = softmax_scale * sum_d q[t, h, d] kv[i, d]`` with ``i = topk_idxs[t, j]``, -1 meaning no row;
        ``o[t, h] = sum_j exp(s) kv[i] / (sum_j exp(s) + exp(attn_sink[h]))``. A token with no row gives zeros. A row
        that is listed twice counts twice. Wide inside, rounded once. Source: sparse_attn of the published kernels.
        """
        raise NotImplementedError
