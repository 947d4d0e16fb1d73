"""Fused ops: optional.

Each body is the default, written in required ops; a backend that overrides one meets the same contract.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.contract.ops.attention import AttentionOps
from dsv4_core.contract.ops.cache import CacheOps
from dsv4_core.contract.ops.embed import EmbedOps
from dsv4_core.contract.ops.matmul import MatmulOps
from dsv4_core.contract.ops.mhc import MhcOps
from dsv4_core.contract.ops.moe import MoeOps
from dsv4_core.contract.ops.norm import NormOps
from dsv4_core.contract.ops.quant import QuantOps
from dsv4_core.contract.spec import Array, Case, op

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Experts, RowLayout, ScaledArray

SCORES_AT_ONCE = 1 << 24  # elements of indexer scores alive at a time in the default: 64 MB in float32


def _logits_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256, "vocab": 512}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("cancel", data="cancel"),
        base.but("views", views=True),
        base.but("flash", tokens=2, dim=4096, vocab=2048),
    )


def _hc_pre_norm_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "hc": 4, "dim": 64}, {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("slow", "smoke", data="slow"),
        base.but("near_eps", data="tiny"),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", dim=4096),
    )


def _ffn_cases() -> tuple[Case, ...]:
    fp8 = {"w1": "e4m3", "w3": "e4m3", "w2": "e4m3"}
    base = Case("fp8", {"tokens": 5, "dim": 256, "inter": 128}, {"limit": 10.0}, dtypes=fp8, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("clamped", "smoke", limit=0.5),
        base.but("clamped_tokens=1", "smoke", limit=0.5, tokens=1),
        base.but("bf16", dtypes=dict.fromkeys(fp8, "bfloat16")),
        base.but("bf16_tokens=1", dtypes=dict.fromkeys(fp8, "bfloat16"), tokens=1),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", tokens=2, dim=4096, inter=2048),
    )


def _moe_cases() -> tuple[Case, ...]:
    fp4 = {"w1": "e2m1", "w3": "e2m1", "w2": "e2m1"}
    base = Case(
        "fp4",
        {"tokens": 5, "dim": 128, "inter": 128, "experts": 6, "topk": 2},
        {"first_expert": 0, "limit": 10.0, "out_dtype": "act"},
        dtypes=fp4,
        tier="smoke",
    )
    return (
        base,
        base.but("fp8", dtypes=dict.fromkeys(fp4, "e4m3")),
        base.but("routed_alone", "smoke", dtypes={"shared": "none"}, out_dtype="wide"),
        *base.odd(),
        base.but("clamped", "smoke", limit=0.5),
        base.but("clamped_tokens=1", "smoke", limit=0.5, tokens=1),  # a decode step has code of its own
        base.but("bf16_tokens=1", dtypes=dict.fromkeys(fp4, "bfloat16"), tokens=1),
        base.but("one_expert", "smoke", data="one_expert"),
        base.but("other_ranks", "smoke", data="other_ranks", first_expert=2),
        base.but("other_ranks_tokens=1", "smoke", data="other_ranks", first_expert=2, tokens=1),
        base.but("nothing_here", data="nothing_here"),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", tokens=1, dim=4096, inter=2048, experts=4, topk=2),
        base.but("flash_three", "full", tokens=3, dim=4096, inter=2048, experts=8, topk=6),
    )


def _index_topk_cases() -> tuple[Case, ...]:
    base = Case(
        "small", {"batch": 2, "seq": 3, "heads": 4, "dim": 64, "rows": 40}, {"scale": 0.0625, "topk": 8}, tier="smoke"
    )
    return (
        base,
        base.but("ties", "smoke", data="ties"),
        base.but("few_visible", data="few_visible"),
        base.but("on_grid", data="fp4"),
        *base.odd("seq", sizes=(0, 1, 17)),
        base.but("topk=rows", topk=40),
        base.but("views", views=True),
        base.but("flash", batch=1, heads=64, dim=128, rows=600, topk=512, scale=0.011048543456039806),
    )


def _cached_index_topk_cases() -> tuple[Case, ...]:
    base = Case(
        "small",
        {"batch": 2, "seq": 3, "heads": 4, "dim": 64, "rows": 40, "slots": 100, "rope_dim": 0},
        {"layout": "key", "scale": 0.0625, "topk": 8},
        tier="smoke",
    )
    return (
        base,
        base.but("ties", "smoke", data="ties"),
        base.but("few_visible", data="few_visible"),
        *base.odd("seq", sizes=(0, 1, 17)),
        base.but("views", views=True),
        base.but("flash", batch=1, heads=64, dim=128, rows=600, slots=700, topk=512, scale=0.011048543456039806),
        base.but("past_2^31_bytes", "full", heads=16, dim=128, slots=32_000_000, data="sparse"),
    )


def _cached_sparse_attn_cases() -> tuple[Case, ...]:
    base = Case(
        "small",
        {
            "tokens": 5,
            "heads": 4,
            "dim": 128,
            "rope_dim": 64,
            "ring_slots": 24,
            "recent": 16,
            "row_slots": 40,
            "old": 20,
            "picks": 24,
        },
        {"layout": "kv", "softmax_scale": 0.08838834764831845},
        tier="smoke",
    )
    return (
        base,
        base.but("window_alone", "smoke", dtypes={"rows": "none"}),
        *base.odd(),
        base.but("padding", "smoke", data="padding"),
        base.but("all_masked", data="all_masked"),
        base.but("strong_sink", data="strong_sink"),
        base.but("no_recent_rows", recent=0),
        base.but("views", views=True),
        base.but("flash", tokens=2, heads=64, dim=512, recent=127, ring_slots=136, picks=148, softmax_scale=512**-0.5),
        base.but("past_2^31_bytes", "full", dim=512, row_slots=3_700_000, data="sparse", softmax_scale=512**-0.5),
    )


class FusedOps(EmbedOps, NormOps, QuantOps, MatmulOps, MoeOps, AttentionOps, MhcOps, CacheOps):
    """Required ops and the fused ones above them."""

    keys_at_once: int | None = None
    """Rows of a sequence that ``cached_index_topk`` unpacks and scores at a time, so that they stay in a core's cache: what is
    read from memory is the packed rows, once for a step's tokens. None: all, as a device would, where each call is a launch.
    """

    @op(
        axes={"x": "tokens dim", "weight": "vocab dim"},
        returns="tokens vocab",
        dtypes={"x": "act", "weight": "weight", "return": "wide"},
        fused=True,
        cases=_logits_cases,
    )
    def logits(self, x: Array, weight: Array) -> Array:
        """``y[t, v] = sum_d x[t, d] * weight[v, d]``, wide and not rounded."""
        return self.linear(x, weight, out_dtype=self.wide_dtype)

    @op(
        axes={"h": "tokens hc dim", "fn": "hc*(hc+2) hc*dim", "scale": "3", "base": "hc*(hc+2)", "weight": "dim"},
        returns=("tokens dim", "tokens hc", "tokens hc hc"),
        dtypes={
            "h": "act",
            "fn": "float32",
            "scale": "float32",
            "base": "float32",
            "weight": "weight",
            "return.0": "act",
            "return.1": "wide",
            "return.2": "wide",
        },
        fused=True,
        cases=_hc_pre_norm_cases,
    )
    def hc_pre_norm(
        self, h: Array, fn: Array, scale: Array, base: Array, weight: Array, *, norm_eps: float, eps: float, iters: int
    ) -> tuple[Array, Array, Array]:
        """``hc_pre``, then ``rms_norm`` of its first result."""
        x, post, comb = self.hc_pre(h, fn, scale, base, norm_eps=norm_eps, eps=eps, iters=iters)
        return self.rms_norm(x, weight, eps=norm_eps), post, comb

    @op(
        axes={"x": "tokens dim", "w1": "inter dim", "w3": "inter dim", "w2": "dim inter"},
        returns="tokens dim",
        dtypes={"x": "act", "w1": "weight", "w3": "weight", "w2": "weight", "return": "act"},
        fused=True,
        cases=_ffn_cases,
    )
    def ffn(self, x: Array, w1: ScaledArray, w3: ScaledArray, w2: ScaledArray, *, limit: float) -> Array:
        """The shared expert: ``w2 . swiglu(w1 . x, w3 . x)``."""
        gate = self.linear(x, w1, out_dtype=self.activation_dtype)
        up = self.linear(x, w3, out_dtype=self.activation_dtype)
        return self.linear(self.swiglu(gate, up, None, limit=limit), w2, out_dtype=self.activation_dtype)

    @op(
        axes={
            "x": "tokens dim",
            "weights": "tokens topk",
            "indices": "tokens topk",
            "shared": "tokens dim ?",
            "w1": "experts inter dim",
            "w3": "experts inter dim",
            "w2": "experts dim inter",
        },
        returns="tokens dim",
        dtypes={
            "x": "act", "weights": "wide", "indices": "int32", "shared": "act", "w1": "weight", "w3": "weight", "w2": "weight",
            "return": "out_dtype",
        },
        fused=True,
        cases=_moe_cases,
    )  # fmt: skip
    def moe(
        self,
        x: Array,
        weights: Array,
        indices: Array,
        shared: Array | None,
        w1: Experts,
        w3: Experts,
        w2: Experts,
        *,
        first_expert: int,
        limit: float,
        out_dtype: str,
    ) -> Array:
        """Routed experts ``first_expert ..`` of a layer, plus ``shared``: dispatch, w1 and w3, SwiGLU, w2, combine."""
        rows, row_weights, order, offsets = self.dispatch(
            x, weights, indices, first_expert=first_expert, n_experts=w1.shape[0]
        )
        gate, up = self.expert_linear(rows, w1, offsets), self.expert_linear(rows, w3, offsets)
        rows = self.expert_linear(self.swiglu(gate, up, row_weights, limit=limit), w2, offsets)
        return self.combine(rows, order, offsets, shared, topk=indices.shape[1], out_dtype=out_dtype)

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
        cases=_index_topk_cases,
    )
    def index_topk(
        self, q: Array, weights: Array, keys: Array, visible: Array, offset: Array, *, scale: float, topk: int
    ) -> Array:
        """``index_select`` of ``index_scores``, in blocks of tokens so that scores of a long context never exist at
        once.
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
        cases=_cached_index_topk_cases,
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
        cases=_cached_sparse_attn_cases,
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
        """``sparse_attn`` over ``[ring[ring_index] | kv | rows[row_index]]``: window rows before this step, this step's
        own, compressed rows.

        ``topk_idxs`` counts in that concatenation. ``rows`` and ``row_index`` are None in a layer without compression.
        """
        parts = [self.cache_read(ring, ring_index, layout=layout), kv]
        if rows is not None and row_index is not None:
            parts.append(self.cache_read(rows, row_index, layout=layout))
        return self.sparse_attn(q, self.concat(parts, axis=0), attn_sink, topk_idxs, softmax_scale=softmax_scale)
