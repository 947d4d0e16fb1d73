"""Mixture of experts: routing, dispatch, activation, combination."""

from __future__ import annotations

from dsv4_core.contract.spec import Array, Case, Ops, op


def _gate_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256, "experts": 16}, {"topk": 3, "route_scale": 1.5}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("ties", "smoke", data="ties", experts=64, topk=6),
        base.but(
            "ties_tokens=1", "smoke", data="ties", experts=64, topk=6, tokens=1
        ),  # a decode step has code of its own
        base.but("near_ties", "smoke", data="near_ties", experts=64, topk=6),
        base.but("strong_bias", "smoke", data="strong_bias"),
        base.but("all_experts", topk=16),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("experts=10", experts=10),
        base.but("flash", dim=4096, experts=256, topk=6),
        base.but("pro", "full", dim=7168, experts=384, topk=6, route_scale=2.5),
    )


def _gate_hash_cases() -> tuple[Case, ...]:
    base = Case(
        "small", {"tokens": 5, "dim": 256, "experts": 16, "vocab": 64, "topk": 3}, {"route_scale": 1.5}, tier="smoke"
    )
    return (
        base,
        *base.odd(),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", dim=4096, experts=256, topk=6),
        base.but("pro", "full", dim=7168, experts=384, topk=6, route_scale=2.5),
    )


def _dispatch_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 64, "topk": 3}, {"first_expert": 0, "n_experts": 8}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("one_expert", "smoke", data="one_expert"),
        base.but("other_ranks", "smoke", first_expert=3, n_experts=2),
        base.but("nothing_here", data="nothing_here"),
        base.but("topk=1", topk=1),
        base.but("views", views=True),
        base.but("flash", tokens=33, dim=4096, topk=6, n_experts=256),
        base.but("flash_rank", "full", tokens=129, dim=4096, topk=6, first_expert=32, n_experts=32),
    )


def _swiglu_cases() -> tuple[Case, ...]:
    base = Case("routed", {"rows": 5, "inter": 128}, {"limit": 10.0}, tier="smoke")
    shared = {"weights": "none"}
    return (
        base,
        base.but("shared", "smoke", dtypes=shared),
        *base.odd("rows"),
        base.but("at_the_clamp", "smoke", data="clamp"),
        base.but("shared_at_the_clamp", "smoke", data="clamp", dtypes=shared),
        base.but("limit=2", data="clamp", limit=2.0),
        base.but("nan", "smoke", data="nan"),
        base.but("zero_rows", data="zero_rows"),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", rows=33, inter=2048),
        base.but("pro", "full", rows=129, inter=3072),
    )


def _combine_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 64, "experts": 8}, {"topk": 3, "out_dtype": "act"}, tier="smoke")
    return (
        base,
        base.but("routed_alone", "smoke", dtypes={"shared": "none"}),
        base.but("wide", out_dtype="wide", dtypes={"shared": "none"}),
        *base.odd(),
        base.but("other_ranks", "smoke", data="other_ranks"),
        base.but("nothing_here", data="nothing_here"),
        base.but("cancel", data="cancel"),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", tokens=17, dim=4096, topk=6, experts=256),
        base.but("pro", "full", tokens=65, dim=7168, topk=6, experts=384),
    )


class MoeOps(Ops):
    """Gate, dispatch, SwiGLU, combine."""

    @op(
        axes={"x": "tokens dim", "weight": "experts dim", "bias": "experts"},
        returns=("tokens topk", "tokens topk"),
        dtypes={"x": "act", "weight": "weight", "bias": "float32", "return.0": "wide", "return.1": "int32"},
        judged=("rounded", "discrete"),
        work={"weight": "2*tokens*experts*dim", "vector": "8*tokens*experts"},
        cases=_gate_cases,
    )
    def gate(self, x: Array, weight: Array, bias: Array, *, topk: int, route_scale: float) -> tuple[Array, Array]:
        """Route by score; give weights and expert ids.

        ``s[t, e] = sqrt(softplus(sum_d x[t, d] * weight[e, d]))``, wide; the ``topk`` experts with the largest ``s +
        bias`` (ties: lower id), best first; weights are their *unbiased* scores divided by their sum, times
        ``route_scale``. Source: Gate of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim", "weight": "experts dim", "tid2eid": "vocab topk", "ids": "tokens"},
        returns=("tokens topk", "tokens topk"),
        dtypes={
            "x": "act",
            "weight": "weight",
            "tid2eid": "int64",
            "ids": "int32",
            "return.0": "wide",
            "return.1": "int32",
        },
        judged=("rounded", "exact"),
        work={"weight": "2*tokens*experts*dim", "vector": "8*tokens*experts"},
        reads={"tid2eid": "min(1, tokens/vocab)"},
        cases=_gate_hash_cases,
    )
    def gate_hash(
        self, x: Array, weight: Array, tid2eid: Array, ids: Array, *, route_scale: float
    ) -> tuple[Array, Array]:
        """Route by token id: experts ``tid2eid[ids[t]]`` in the table's order, weights as in ``gate``."""
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim", "weights": "tokens topk", "indices": "tokens topk"},
        returns=("tokens*topk dim", "tokens*topk", "tokens*topk", "n_experts+1"),
        dtypes={
            "x": "act",
            "weights": "wide",
            "indices": "int32",
            "return.0": "act",
            "return.1": "wide",
            "return.2": "int32",
            "return.3": "int32",
        },
        judged="exact",
        cases=_dispatch_cases,
    )
    def dispatch(
        self, x: Array, weights: Array, indices: Array, *, first_expert: int, n_experts: int
    ) -> tuple[Array, Array, Array, Array]:
        """Sort token copies by expert; give rows, their routing weights, their order and the experts' offsets.

        Row i is copy ``order[i] = t * topk + j`` of token t for expert ``indices[t, j]``: ``rows[i] = x[t]``,
        ``row_weights[i] = weights[t, j]``. Rows are sorted stably by expert over ``first_expert .. first_expert +
        n_experts - 1``; expert e's are ``offsets[e - first_expert] ..``. Copies for other ranks' experts follow at the
        end, in order.
        """
        raise NotImplementedError

    @op(
        axes={"gate": "rows inter", "up": "rows inter", "weights": "rows ?"},
        returns="rows inter",
        dtypes={"gate": "act", "up": "act", "weights": "wide", "return": "act"},
        work={"vector": "8*rows*inter"},
        cases=_swiglu_cases,
    )
    def swiglu(self, gate: Array, up: Array, weights: Array | None, *, limit: float) -> Array:
        """``g = min(gate, limit); u = clamp(up, -limit, limit); y[i] = g / (1 + exp(-g)) * u * weights[i]``, wide,
        rounded once.

        The routing weight is applied here, before ``w2``; None for the shared expert. Source: Expert of the published
        code.
        """
        raise NotImplementedError

    @op(
        axes={"rows": "tokens*topk dim", "order": "tokens*topk", "offsets": "n_experts+1", "shared": "tokens dim ?"},
        returns="tokens dim",
        dtypes={"rows": "act", "order": "int32", "offsets": "int32", "shared": "act", "return": "out_dtype"},
        work={"vector": "tokens*topk*dim"},
        cases=_combine_cases,
    )
    def combine(
        self, rows: Array, order: Array, offsets: Array, shared: Array | None, *, topk: int, out_dtype: str
    ) -> Array:
        """Sum each token's expert rows: ``y[t] = sum_j rows[i(t, j)] + shared[t]`` where ``order[i(t, j)] = t * topk +
        j``.

        Rows from ``offsets[-1]`` on (other ranks') count as zero. Wide sum, rounded once to ``out_dtype``.
        """
        raise NotImplementedError
