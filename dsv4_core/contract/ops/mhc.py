"""Manifold-constrained hyper-connections: several residual streams, mixed before and after every
sub-layer.
"""

from __future__ import annotations

from dsv4_core.contract.ops.norm import NormOps
from dsv4_core.contract.spec import Array, op


class MhcOps(NormOps):
    """Streams: split, reduce, mix."""

    @op(
        axes={"x": "tokens dim"},
        returns="tokens hc dim",
        dtypes={"x": "act", "return": "act"},
        judged="exact",
    )
    def hc_expand(self, x: Array, *, hc: int) -> Array:
        """Copy a row into ``hc`` streams."""
        raise NotImplementedError

    @op(
        axes={"h": "tokens hc dim", "x": "tokens dim"},
        returns="tokens hc dim",
        dtypes={"h": "act", "x": "act", "return": "act"},
        work={"vector": "tokens*hc*dim"},
    )
    def hc_add(self, h: Array, x: Array) -> Array:
        """Add ``x`` to every stream, rounded once (the MTP block's input)."""
        raise NotImplementedError

    @op(
        axes={"mixes": "tokens hc*(hc+2)", "scale": "3", "base": "hc*(hc+2)"},
        returns=("tokens hc", "tokens hc", "tokens hc hc"),
        dtypes={"mixes": "wide", "scale": "float32", "base": "float32", "return": "wide"},
        work={"vector": "tokens*(4*iters*hc*hc + 4*hc*(hc+2))"},
    )
    def hc_split_sinkhorn(
        self, mixes: Array, scale: Array, base: Array, *, hc: int, eps: float, iters: int
    ) -> tuple[Array, Array, Array]:
        """Split mixes into ``pre``, ``post`` and the nearly doubly stochastic ``comb``.

        ``pre = sigmoid(mixes[:hc] * scale[0] + base[:hc]) + eps``; ``post = 2 sigmoid(mixes[hc:2hc]
        * scale[1] + base[hc:2hc])``; ``comb = softmax(mixes[2hc:] * scale[2] + base[2hc:]) + eps``
        as [hc, hc], over the last axis; divided by (column sums + eps); then ``iters - 1`` times by
        (row sums + eps) and by (column sums + eps). Column sums run over the first of the two axes.
        Source: hc_split_sinkhorn of the published kernels.
        """
        raise NotImplementedError

    @op(
        axes={"h": "tokens hc dim", "fn": "hc*(hc+2) hc*dim", "scale": "3", "base": "hc*(hc+2)"},
        returns=("tokens dim", "tokens hc", "tokens hc hc"),
        dtypes={
            "h": "act",
            "fn": "float32",
            "scale": "float32",
            "base": "float32",
            "return.0": "act",
            "return.1": "wide",
            "return.2": "wide",
        },
        work={"fn": "2*tokens*hc*dim*hc*(hc+2)", "vector": "tokens*(4*hc*dim + 4*iters*hc*hc + 4*hc*(hc+2))"},
    )
    def hc_pre(
        self, h: Array, fn: Array, scale: Array, base: Array, *, norm_eps: float, eps: float, iters: int
    ) -> tuple[Array, Array, Array]:
        """Reduce the streams to a sub-layer's input; give it with ``post`` and ``comb``.

        ``x = flatten(h)``; ``mixes = (fn @ x) / sqrt(mean(x^2) + norm_eps)``; ``pre, post, comb =
        hc_split_sinkhorn(mixes, ...)``; ``y[d] = sum_j pre[j] h[j, d]``, wide, rounded once.
        """
        raise NotImplementedError

    @op(
        axes={"y": "tokens dim", "h": "tokens hc dim", "post": "tokens hc", "comb": "tokens hc hc"},
        returns="tokens hc dim",
        dtypes={"y": "act", "h": "act", "post": "wide", "comb": "wide", "return": "act"},
        work={"vector": "2*tokens*hc*(hc+1)*dim"},
    )
    def hc_post(self, y: Array, h: Array, post: Array, comb: Array) -> Array:
        """Give a sub-layer's output back to the streams: ``h'[n] = post[n] * y + sum_j comb[j, n] *
        h[j]``, wide, rounded once.

        Mind the index order: ``comb`` is used transposed.
        """
        raise NotImplementedError

    @op(
        axes={"h": "tokens hc dim", "fn": "hc hc*dim", "scale": "1", "base": "hc"},
        returns="tokens dim",
        dtypes={"h": "act", "fn": "float32", "scale": "float32", "base": "float32", "return": "act"},
        work={"fn": "2*tokens*hc*dim*hc", "vector": "tokens*(4*hc*dim + 4*hc)"},
    )
    def hc_head(self, h: Array, fn: Array, scale: Array, base: Array, *, norm_eps: float, eps: float) -> Array:
        """Reduce the streams before the final norm: ``mixes`` as in ``hc_pre``, ``pre =
        sigmoid(mixes * scale[0] + base) + eps``, ``y = sum_j pre[j] h[j]``.
        """
        raise NotImplementedError

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
    )
    def hc_pre_norm(
        self, h: Array, fn: Array, scale: Array, base: Array, weight: Array, *, norm_eps: float, eps: float, iters: int
    ) -> tuple[Array, Array, Array]:
        """``hc_pre``, then ``rms_norm`` of its first result."""
        x, post, comb = self.hc_pre(h, fn, scale, base, norm_eps=norm_eps, eps=eps, iters=iters)
        return self.rms_norm(x, weight, eps=norm_eps), post, comb
