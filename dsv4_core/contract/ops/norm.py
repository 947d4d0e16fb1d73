"""RMS norm and rotary embedding."""

from __future__ import annotations

from dsv4_core.contract.spec import Array, Case, Ops, op


def _rms_norm_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256}, {"eps": 1e-6}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("dim=72", dim=72),  # no power of two
        base.but("unweighted", "smoke", dtypes={"weight": "none"}, dim=128),
        base.but("near_eps", "smoke", data="tiny"),  # mean(x^2) is of the size of eps
        base.but("zero_rows", data="zero_rows"),
        base.but("outliers", data="outliers"),
        base.but("large", data="large"),
        base.but("nan", data="nan"),
        base.but("subnormal", data="subnormal"),
        base.but("views", views=True),
        base.but("unweighted_views", views=True, dtypes={"weight": "none"}),
        base.but("flash", dim=4096),
        base.but("flash_heads", "full", tokens=640, dim=512, dtypes={"weight": "none"}),
        base.but("flash_q_lora", "full", tokens=33, dim=1024),
        base.but("pro", "full", tokens=33, dim=7168),
    )


def _apply_rope_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "heads": 2, "dim": 128, "half": 32}, {"inverse": False}, tier="smoke")
    return (
        base,
        base.but("inverse", "smoke", inverse=True),
        *base.odd(),
        base.but("whole_head", dim=64),
        base.but("half=16", half=16),
        base.but("far", "smoke", data="far"),  # positions up to 2^20: float32 angles
        base.but("far_inverse", data="far", inverse=True),
        base.but("yarn", data="yarn"),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", heads=64, dim=512, data="yarn"),
        base.but("pro", "full", heads=128, dim=512, data="far"),
    )


class NormOps(Ops):
    """Norm and RoPE."""

    @op(
        axes={"x": "tokens dim", "weight": "dim ?"},
        returns="tokens dim",
        dtypes={"x": "act", "weight": "weight", "return": "act"},
        work={"vector": "4*tokens*dim"},
        cases=_rms_norm_cases,
    )
    def rms_norm(self, x: Array, weight: Array | None, *, eps: float) -> Array:
        """Scale each row to unit root-mean-square, then by ``weight`` (None: by nothing, as for the query heads).

        ``y[t, d] = x[t, d] / sqrt(mean_d(x[t, d]^2) + eps) * weight[d]``, wide inside, rounded once to ``x``'s dtype.
        Source: RMSNorm of the published code.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens heads dim", "positions": "tokens", "freqs": "half"},
        returns="tokens heads dim",
        dtypes={"x": "act", "positions": "int32", "freqs": "float32", "return": "act"},
        work={"vector": "6*tokens*heads*half"},
        cases=_apply_rope_cases,
    )
    def apply_rope(self, x: Array, positions: Array, freqs: Array, *, inverse: bool) -> Array:
        """Rotate the last ``2 * half`` channels of each head, in interleaved pairs (2i, 2i + 1); the others pass
        through.

        ``angle[t, i] = float32(positions[t]) * freqs[i]`` as a float32 product in every mode; ``(a, b) -> (a cos - b
        sin, a sin + b cos)``, with ``-angle`` where ``inverse``. Wide inside, rounded once. Source: apply_rotary_emb of
        the published code.
        """
        raise NotImplementedError
