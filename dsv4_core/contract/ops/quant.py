"""Activation quantisation and the Hadamard rotation. Quantised data is uint8: E4M3 codes, E8M0 scales, E2M1 pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.contract.spec import Array, Case, Ops, op

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Format


def _act_quant_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256}, {"block": 128}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("midpoints", "smoke", data="midpoints", tokens=16),
        base.but("scale_edges", "smoke", data="scale_edges", tokens=384),
        base.but("all_codes", data="all_codes", tokens=4),
        base.but("zero_rows", data="zero_rows"),
        base.but("outliers", data="outliers"),
        base.but("near_floor", data="floor"),
        base.but("limits", data="limits"),
        base.but("subnormal", data="subnormal"),
        base.but("views", views=True),
        base.but("block=64", block=64),
        base.but("flash", dim=4096),
        base.but("pro", "full", tokens=65, dim=7168),
    )


def _act_qdq_cases() -> tuple[Case, ...]:
    kv = Case("kv", {"tokens": 5, "dim": 128}, {"format": "e4m3", "block": 64, "channels": 64}, tier="smoke")
    key = Case("key", {"tokens": 5, "dim": 128}, {"format": "e2m1", "block": 32, "channels": 128}, tier="smoke")
    return (
        *tuple(
            case
            for base in (kv, key)
            for case in (
                base,
                *(odd.but(f"{base.name}_{odd.name}", odd.tier) for odd in base.odd()),
                base.but(f"{base.name}_midpoints", "smoke", data="midpoints", tokens=17),
                base.but(f"{base.name}_scale_edges", "smoke", data="scale_edges", tokens=768),
                base.but(f"{base.name}_zero_rows", data="zero_rows"),
                base.but(f"{base.name}_outliers", data="outliers"),
                base.but(f"{base.name}_near_floor", data="floor"),
                base.but(f"{base.name}_limits", data="limits"),
                base.but(f"{base.name}_subnormal", data="subnormal"),
                base.but(f"{base.name}_views", views=True),
            )
        ),
        kv.but("kv_all_codes", data="all_codes", tokens=8),
        kv.but("flash_kv", tokens=33, dim=512, channels=448),
        key.but("flash_key", tokens=640),
    )


def _hadamard_cases() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 64}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("dim=32", dim=32),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", tokens=320, dim=128),
    )


class QuantOps(Ops):
    """Casts to the model's small formats."""

    @op(
        axes={"x": "tokens dim"},
        returns=("tokens dim", "tokens dim//block"),
        dtypes={"x": "act", "return": "uint8"},
        judged="exact",
        work={"vector": "4*tokens*dim"},
        cases=_act_quant_cases,
    )
    def act_quant(self, x: Array, *, block: int) -> tuple[Array, Array]:
        """Quantise to E4M3 per token and per ``block`` channels; give codes and E8M0 scale bytes.

        ``amax = max(|x|, 1e-4)`` over the block; ``scale = 2^ceil(log2(amax * float32(1/448)))`` from float32 bits; ``q
        = e4m3(clamp(x / scale, -448, 448))``, to nearest even. ``dim`` is a multiple of ``block``. Source: act_quant of
        the published kernels.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim"},
        returns="tokens dim",
        dtypes={"x": "act", "return": "act"},
        judged="exact",
        work={"vector": "6*tokens*channels"},
        cases=_act_qdq_cases,
    )
    def act_qdq(self, x: Array, *, format: Format, block: int, channels: int) -> Array:
        """Round the first ``channels`` channels to ``format`` and back, in blocks of ``block`` channels; the others
        pass through.

        As ``act_quant`` for ``e4m3``; for ``e2m1``: ``amax = max(|x|, 6 * 2^-126)``, ``scale = 2^ceil(log2(amax *
        float32(1/6)))``. ``y = q * scale``, exactly. In the exact modes ``y = x``. ``channels`` is a multiple of
        ``block``.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim"},
        returns="tokens dim",
        dtypes={"x": "act", "return": "act"},
        work={"vector": "tokens*dim*dim.bit_length()"},  # butterflies: log2(dim) additions a channel, and the scale
        cases=_hadamard_cases,
    )
    def hadamard(self, x: Array) -> Array:
        """Rotate by the Sylvester-ordered Hadamard matrix: ``y[t, j] = dim^-0.5 * sum_i (-1)^popcount(i & j) x[t, i]``.

        ``dim`` is a power of two. Wide inside, rounded once. Source: rotate_activation of the published code.
        """
        raise NotImplementedError
