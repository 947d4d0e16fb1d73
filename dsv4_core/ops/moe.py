"""Mixture of experts: routing, dispatch, activation, combination."""

from __future__ import annotations

from dsv4_core.spec import Array, Ops, op


class MoeOps(Ops):
    """Gate, dispatch, SwiGLU, combine."""

    @op(
        axes={"x": "tokens dim", "weight": "experts dim", "bias": "experts"},
        returns=("tokens topk", "tokens topk"),
        dtypes={"x": "act", "weight": "weight", "bias": "float32", "return.0": "wide", "return.1": "int32"},
        judged=("rounded", "discrete"),
    )
    def gate(self, x: Array, weight: Array, bias: Array, *, topk: int, route_scale: float) -> tuple[Array, Array]:
        """Route by score; give weights and expert ids.

        ``s[t, e] = sqrt(softplus(sum_d x[t, d] * weight[e, d]))``, wide; the ``topk`` experts with the largest ``s + bias`` (ties: lower id), best first; weights are
        their *unbiased* scores divided by their sum, times ``route_scale``. Source: Gate of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim", "weight": "experts dim", "tid2eid": "vocab topk", "ids": "tokens"},
        returns=("tokens topk", "tokens topk"),
        dtypes={"x": "act", "weight": "weight", "tid2eid": "int64", "ids": "int32", "return.0": "wide", "return.1": "int32"},
        judged=("rounded", "exact"),
    )
    def gate_hash(self, x: Array, weight: Array, tid2eid: Array, ids: Array, *, route_scale: float) -> tuple[Array, Array]:
        """Route by token id: experts ``tid2eid[ids[t]]`` in the table's order, weights as in ``gate``."""
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim", "weights": "tokens topk", "indices": "tokens topk"},
        returns=("tokens*topk dim", "tokens*topk", "tokens*topk", "n_experts+1"),
        dtypes={"x": "act", "weights": "wide", "indices": "int32", "return.0": "act", "return.1": "wide", "return.2": "int32", "return.3": "int32"},
        judged="exact",
    )
    def dispatch(self, x: Array, weights: Array, indices: Array, *, first_expert: int, n_experts: int) -> tuple[Array, Array, Array, Array]:
        """Sort token copies by expert; give rows, their routing weights, their order and the experts' offsets.

        Row i is copy ``order[i] = t * topk + j`` of token t for expert ``indices[t, j]``: ``rows[i] = x[t]``, ``row_weights[i] = weights[t, j]``. Rows are sorted stably by
        expert over ``first_expert .. first_expert + n_experts - 1``; expert e's are ``offsets[e - first_expert] ..``. Copies for other ranks' experts follow at the end, in order.
        """
        raise NotImplementedError

    @op(
        axes={"gate": "rows inter", "up": "rows inter", "weights": "rows ?"},
        returns="rows inter",
        dtypes={"gate": "act", "up": "act", "weights": "wide", "return": "act"},
    )
    def swiglu(self, gate: Array, up: Array, weights: Array | None, *, limit: float) -> Array:
        """``g = min(gate, limit); u = clamp(up, -limit, limit); y[i] = g / (1 + exp(-g)) * u * weights[i]``, wide, rounded once.

        The routing weight is applied here, before ``w2``; None for the shared expert. Source: Expert of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"rows": "tokens*topk dim", "order": "tokens*topk", "offsets": "n_experts+1", "shared": "tokens dim ?"},
        returns="tokens dim",
        dtypes={"rows": "act", "order": "int32", "offsets": "int32", "shared": "act", "return": "out_dtype"},
    )
    def combine(self, rows: Array, order: Array, offsets: Array, shared: Array | None, *, topk: int, out_dtype: str) -> Array:
        """Sum each token's expert rows: ``y[t] = sum_j rows[i(t, j)] + shared[t]`` where ``order[i(t, j)] = t * topk + j``.

        Rows from ``offsets[-1]`` on (other ranks') count as zero. Wide sum, rounded once to ``out_dtype``.
        """
        raise NotImplementedError
