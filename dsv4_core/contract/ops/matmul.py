"""Linear layers over BF16, F32, FP8-block and FP4-group weights.

A ``weight`` is an array [out, in] or a ``ScaledArray``. Native mode, scaled weight: the activation is quantised as by
``act_quant`` with blocks of 128, codes are multiplied, sums kept in float32, both scales applied per block. Exact
modes: the weight dequantised, the activation as it is. Scale bytes are 1 to 232, 2^-126 to 2^105, of which published
weights use the middle; from 233 on a product leaves float32's range in one order of scaling and not in another, and 0
is a subnormal: what a backend makes of those is not judged (the audit notes 0 and refuses 255).

W8A8 (int8 weights, optional: ``Backend.weight_formats``): native mode quantises the activation to int8 per token
(``dtypes.quantise_tokens``), sums codes, and applies the token's and the channel's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_core.contract.spec import Array, Case, Ops, op

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Experts, ScaledArray

_NARROWER = ("fp8 products summed in less than float32 within 128 channels, promoted to float32 after each",)


def _in(size: int, **others: int) -> dict[str, Any]:
    """Sizes with the axis ``in``, which Python reserves."""
    return {"in": size, **others}


def _linear_cases() -> tuple[Case, ...]:
    base = Case("bf16", {"tokens": 5, "in": 256, "out": 192}, {"out_dtype": "act"}, tier="smoke")
    fp8, fp4 = {"weight": "e4m3"}, {"weight": "e2m1"}
    return (
        base,
        base.but("wide", "smoke", out_dtype="wide"),
        base.but("float32", dtypes={"weight": "float32"}, out_dtype="wide"),
        base.but("fp8", "smoke", dtypes=fp8),
        base.but("fp4", "smoke", dtypes=fp4),
        *(odd.but(f"fp8_{odd.name}", odd.tier, dtypes=fp8) for odd in base.odd()),
        *(odd.but(f"fp4_{odd.name}", odd.tier, dtypes=fp4) for odd in base.odd(sizes=(0, 1, 17, 65))),
        *(odd.but(f"bf16_{odd.name}", odd.tier) for odd in base.odd(sizes=(0, 1, 17))),
        base.but("fp8_out=129", dtypes=fp8, out=129),  # one row past a scale block
        base.but("fp8_out=1", dtypes=fp8, out=1),
        base.but("fp4_out=33", dtypes=fp4, out=33),
        *(
            base.but(f"{name}_{data}", "smoke" if data == "cancel" else "standard", dtypes=dtypes, data=data)
            for name, dtypes in (("fp8", fp8), ("fp4", fp4), ("bf16", {}))
            for data in ("outliers", "zero_rows", "cancel", "positive")
        ),
        *(
            base.but(f"{name}_scale_ends", "smoke", dtypes=dtypes, data="scale_ends")
            for name, dtypes in (("fp8", fp8), ("fp4", fp4))
        ),
        base.but("fp8_every_code", "smoke", dtypes=fp8, data="one_hot", tokens=256, out=256),
        base.but("fp4_every_code", "smoke", dtypes=fp4, data="one_hot", tokens=256, out=256),  # and every scale
        base.but("fp8_every_scale", dtypes=fp8, data="one_hot", **_in(1024, tokens=8, out=3712)),
        base.but("fp4_last_byte", dtypes=fp4, data="last_byte"),
        base.but("fp8_subnormal", dtypes=fp8, data="subnormal"),
        base.but("fp8_views", views=True, dtypes=fp8),
        base.but("fp4_views", views=True, dtypes=fp4),
        base.but("bf16_views", views=True),
        base.but("bf16_nan", data="nan"),
        *(odd.but(f"int8_{odd.name}", odd.tier, dtypes={"weight": "int8"}) for odd in base.odd(sizes=(0, 1, 17, 65))),
        base.but("int8", "smoke", dtypes={"weight": "int8"}),
        base.but("int8_outliers", dtypes={"weight": "int8"}, data="outliers"),
        base.but("int8_zero_rows", dtypes={"weight": "int8"}, data="zero_rows"),
        base.but("int8_long_sums", dtypes={"weight": "int8"}, data="positive", **_in(4096, tokens=3, out=128)),
        base.but("flash_wkv", dtypes=fp8, **_in(4096, tokens=7, out=512)),
        base.but("flash_long_sums", dtypes=fp4, data="positive", **_in(4096, tokens=3, out=128)),
        base.but("flash_compressor", out_dtype="wide", **_in(4096, tokens=7, out=512)),
        base.but("flash_wq_b", "full", dtypes=fp8, **_in(1024, tokens=3, out=32768)),
        base.but("flash_wo_b", "full", dtypes=fp8, **_in(8192, tokens=17, out=4096)),
        base.but("pro_wq_a", "full", dtypes=fp8, **_in(7168, tokens=17, out=1536)),
        base.but("pro_w1", "full", dtypes=fp4, **_in(7168, tokens=17, out=3072)),
    )


def _grouped_linear_cases() -> tuple[Case, ...]:
    base = Case("bf16", {"tokens": 5, "groups": 2, "in": 256, "out": 128}, tier="smoke")
    fp8 = {"weight": "e4m3"}
    return (
        base,
        base.but("fp8", "smoke", dtypes=fp8),
        *(odd.but(f"fp8_{odd.name}", odd.tier, dtypes=fp8) for odd in base.odd()),
        base.but("fp8_out=320", dtypes=fp8, out=320),  # a group's rows begin inside a scale block
        base.but("fp8_outliers", "smoke", dtypes=fp8, data="outliers"),
        base.but("fp8_cancel", dtypes=fp8, data="cancel"),
        base.but("fp8_views", views=True, dtypes=fp8),
        base.but("fp8_every_code", "smoke", dtypes=fp8, data="one_hot", tokens=256, groups=1, out=256),
        base.but("fp8_every_scale", dtypes=fp8, data="one_hot", groups=1, **_in(1024, tokens=8, out=3712)),
        base.but("flash", dtypes=fp8, groups=8, out=1024, **_in(4096)),
        base.but("pro", "full", dtypes=fp8, groups=16, out=16384, **_in(4096)),
    )


def _expert_linear_cases() -> tuple[Case, ...]:
    base = Case("fp4", {"rows": 24, "experts": 6, "in": 128, "out": 96}, dtypes={"weight": "e2m1"}, tier="smoke")
    return (
        base,
        base.but("fp8", "smoke", dtypes={"weight": "e4m3"}, out=160),
        base.but("bf16", dtypes={"weight": "bfloat16"}),
        base.but("int8", "smoke", dtypes={"weight": "int8"}, out=160),
        base.but("int8_one_expert", dtypes={"weight": "int8"}, data="one_expert"),
        base.but("int8_other_ranks", dtypes={"weight": "int8"}, data="other_ranks"),
        *base.odd("rows"),
        base.but("one_expert", "smoke", data="one_expert"),
        base.but("other_ranks", "smoke", data="other_ranks"),
        base.but("nothing_here", data="nothing_here"),
        base.but("last_byte", data="last_byte"),
        base.but("outliers", data="outliers"),
        base.but("scale_ends", data="scale_ends"),
        base.but("every_scale", data="one_hot", **_in(256, experts=3, out=96)),
        base.but("views", views=True),
        base.but("flash", experts=3, out=512, **_in(4096)),
        base.but("flash_w1", "full", rows=48, experts=8, out=2048, **_in(4096)),
        base.but("pro_w2", "full", rows=48, experts=8, out=7168, **_in(3072)),
    )


class MatmulOps(Ops):
    """Dense, grouped and per-expert linear layers."""

    @op(
        axes={"x": "tokens in", "weight": "out in"},
        returns="tokens out",
        dtypes={"x": "act", "weight": "weight", "return": "out_dtype"},
        narrower=_NARROWER,
        work={"weight": "2*tokens*in*out"},
        cases=_linear_cases,
    )
    def linear(self, x: Array, weight: Array | ScaledArray, *, out_dtype: str) -> Array:
        """``y[t, o] = sum_i x[t, i] * weight[o, i]``, summed wide and rounded once to ``out_dtype`` (the activation or
        the wide dtype).

        Scaled weights: native mode quantises ``x`` first (module docstring). Plain weights are multiplied as they are.
        Source: linear, fp8_gemm, fp4_gemm.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens groups in", "weight": "out in"},
        returns="tokens out",
        dtypes={"x": "act", "weight": "weight", "return": "act"},
        work={"act": "2*tokens*in*out"},
        cases=_grouped_linear_cases,
    )
    def grouped_linear(self, x: Array, weight: Array | ScaledArray) -> Array:
        """Multiply group g of ``x`` by block g of ``out / groups`` rows: ``y[t, o] = sum_i x[t, g(o), i] * weight[o,
        i]``.

        The output projection's first half (``wo_a``): a scaled weight is dequantised to BF16 in native mode (exact for
        E4M3 times a power of two), and the activation is *not* quantised. ``out`` is a multiple of ``groups``.
        """
        raise NotImplementedError

    @op(
        axes={"x": "rows in", "weight": "experts out in", "offsets": "experts+1"},
        returns="rows out",
        dtypes={"x": "act", "weight": "weight", "offsets": "int32", "return": "act"},
        narrower=_NARROWER,
        work={"weight": "2*rows*in*out"},
        reads={"weight": "distinct(rows, experts)/experts"},
        cases=_expert_linear_cases,
    )
    def expert_linear(self, x: Array, weight: Experts, offsets: Array) -> Array:
        """Multiply rows ``offsets[e] .. offsets[e + 1] - 1`` by expert e's weight, as ``linear`` does.

        Rows from ``offsets[experts]`` on belong to other ranks: zeros. Source: the loop over experts of the published
        MoE.
        """
        raise NotImplementedError
