"""Mixture of experts: routing, dispatch, activation, combination."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.contract.ops.matmul import MatmulOps
from dsv4_core.contract.spec import Array, op

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Experts, ScaledArray


class MoeOps(MatmulOps):
    """Gate, dispatch, SwiGLU, combine; fused: the shared expert, a whole layer's experts."""

    @op(
        axes={"x": "tokens dim", "weight": "experts dim", "bias": "experts"},
        returns=("tokens topk", "tokens topk"),
        dtypes={"x": "act", "weight": "weight", "bias": "float32", "return.0": "wide", "return.1": "int32"},
        judged=("rounded", "discrete"),
        work={"weight": "2*tokens*experts*dim", "vector": "8*tokens*experts"},
    )
    def gate(self, x: Array, weight: Array, bias: Array, *, topk: int, route_scale: float) -> tuple[Array, Array]:
        """Route by score; give weights and expert ids.

        ``s[t, e] = sqrt(softplus(sum_d x[t, d] * weight[e, d]))``, wide; the ``topk`` experts with
        the largest ``s + bias`` (ties: lower id), in any order; weights are their *unbiased* scores
        divided by their sum, times ``route_scale``. Source: Gate of the published code.
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
    )
    def gate_hash(
        self, x: Array, weight: Array, tid2eid: Array, ids: Array, *, route_scale: float
    ) -> tuple[Array, Array]:
        """Route by token id: experts ``tid2eid[ids[t]]`` in the table's order, weights as in
        ``gate``.
        """
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
    )
    def dispatch(
        self, x: Array, weights: Array, indices: Array, *, first_expert: int, n_experts: int
    ) -> tuple[Array, Array, Array, Array]:
        """Sort token copies by expert; give rows, their routing weights, their order and the
        experts' offsets.

        Row i is copy ``order[i] = t * topk + j`` of token t for expert ``indices[t, j]``: ``rows[i]
        = x[t]``, ``row_weights[i] = weights[t, j]``. Rows are sorted stably by expert over
        ``first_expert .. first_expert + n_experts - 1``; expert e's are ``offsets[e - first_expert]
        ..``. Copies for other ranks' experts follow at the end, in order.
        """
        raise NotImplementedError

    @op(
        axes={"gate": "rows inter", "up": "rows inter", "weights": "rows ?"},
        returns="rows inter",
        dtypes={"gate": "act", "up": "act", "weights": "wide", "return": "act"},
        work={"vector": "8*rows*inter"},
    )
    def swiglu(self, gate: Array, up: Array, weights: Array | None, *, limit: float) -> Array:
        """``g = min(gate, limit); u = clamp(up, -limit, limit); y[i] = g / (1 + exp(-g)) * u *
        weights[i]``, wide, rounded once.

        The routing weight is applied here, before ``w2``; None for the shared expert. Source:
        Expert of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"rows": "tokens*topk dim", "order": "tokens*topk", "offsets": "n_experts+1", "shared": "tokens dim ?"},
        returns="tokens dim",
        dtypes={"rows": "act", "order": "int32", "offsets": "int32", "shared": "act", "return": "out_dtype"},
        work={"vector": "tokens*topk*dim"},
    )
    def combine(
        self, rows: Array, order: Array, offsets: Array, shared: Array | None, *, topk: int, out_dtype: str
    ) -> Array:
        """Sum each token's expert rows: ``y[t] = sum_j rows[i(t, j)] + shared[t]`` where
        ``order[i(t, j)] = t * topk + j``.

        Rows from ``offsets[-1]`` on (other ranks') count as zero. Wide sum, rounded once to
        ``out_dtype``.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim", "w1": "inter dim", "w3": "inter dim", "w2": "dim inter"},
        returns="tokens dim",
        dtypes={"x": "act", "w1": "weight", "w3": "weight", "w2": "weight", "return": "act"},
        fused=True,
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
        """Routed experts ``first_expert ..`` of a layer, plus ``shared``: dispatch, w1 and w3,
        SwiGLU, w2, combine.
        """
        rows, row_weights, order, offsets = self.dispatch(
            x, weights, indices, first_expert=first_expert, n_experts=w1.shape[0]
        )
        gate, up = self.expert_linear(rows, w1, offsets), self.expert_linear(rows, w3, offsets)
        rows = self.expert_linear(self.swiglu(gate, up, row_weights, limit=limit), w2, offsets)
        return self.combine(rows, order, offsets, shared, topk=indices.shape[1], out_dtype=out_dtype)
