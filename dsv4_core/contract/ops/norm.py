"""RMS norm and rotary embedding."""

from __future__ import annotations

from dsv4_core.contract.spec import Array, Ops, op


class NormOps(Ops):
    """Norm and RoPE."""

    @op(
        axes={"x": "tokens dim", "weight": "dim ?"},
        returns="tokens dim",
        dtypes={"x": "act", "weight": "weight", "return": "act"},
        work={"vector": "4*tokens*dim"},
    )
    def rms_norm(self, x: Array, weight: Array | None, *, eps: float) -> Array:
        """Scale each row to unit root-mean-square, then by ``weight`` (None: by nothing, as for the
        query heads).

        ``y[t, d] = x[t, d] / sqrt(mean_d(x[t, d]^2) + eps) * weight[d]``, wide inside, rounded once
        to ``x``'s dtype. Source: RMSNorm of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens heads dim", "positions": "tokens", "freqs": "half"},
        returns="tokens heads dim",
        dtypes={"x": "act", "positions": "int32", "freqs": "float32", "return": "act"},
        work={"vector": "6*tokens*heads*half"},
    )
    def apply_rope(self, x: Array, positions: Array, freqs: Array, *, inverse: bool) -> Array:
        """Rotate the last ``2 * half`` channels of each head, in interleaved pairs (2i, 2i + 1);
        the others pass through.

        ``angle[t, i] = float32(positions[t]) * freqs[i]`` as a float32 product in every mode; ``(a,
        b) -> (a cos - b sin, a sin + b cos)``, with ``-angle`` where ``inverse``. Wide inside,
        rounded once. Source: apply_rotary_emb of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens heads dim", "weight": "dim ?", "positions": "tokens", "freqs": "half"},
        returns="tokens heads dim",
        dtypes={"x": "act", "weight": "weight", "positions": "int32", "freqs": "float32", "return": "act"},
        fused=True,
    )
    def rms_norm_rope(self, x: Array, weight: Array | None, positions: Array, freqs: Array, *, eps: float) -> Array:
        """``rms_norm`` of every head, then ``apply_rope``: queries, key/value rows, compressed
        rows.
        """
        rows = x.reshape((x.shape[0] * x.shape[1], x.shape[2]))
        normed = self.rms_norm(rows, weight, eps=eps).reshape(x.shape)
        return self.apply_rope(normed, positions, freqs, inverse=False)
