"""Linear layers over BF16, F32, FP8-block and FP4-group weights.

A ``weight`` is an array [out, in] or a ``ScaledArray``. Native mode, scaled weight: the activation
is quantised as by ``act_quant`` with blocks of 128, codes are multiplied, sums kept in float32,
both scales applied per block. Exact modes: the weight dequantised, the activation as it is. Scale
bytes are 1 to 232, 2^-126 to 2^105, of which published weights use the middle; from 233 on a
product leaves float32's range in one order of scaling and not in another, and 0 is a subnormal:
what a backend makes of those is not judged (the audit notes 0 and refuses 255).

W8A8 (int8 weights, optional: ``Backend.weight_formats``): native mode quantises the activation to
int8 per token (``dtypes.quantise_tokens``), sums codes, and applies the token's and the channel's
scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.contract.spec import Array, Ops, op

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Experts, ScaledArray

_NARROWER = ("fp8 products summed in less than float32 within 128 channels, promoted to float32 after each",)


class MatmulOps(Ops):
    """Dense, grouped and per-expert linear layers."""

    @op(
        axes={"x": "tokens in", "weight": "out in"},
        returns="tokens out",
        dtypes={"x": "act", "weight": "weight", "return": "out_dtype"},
        narrower=_NARROWER,
        work={"weight": "2*tokens*in*out"},
    )
    def linear(self, x: Array, weight: Array | ScaledArray, *, out_dtype: str) -> Array:
        """``y[t, o] = sum_i x[t, i] * weight[o, i]``, summed wide and rounded once to ``out_dtype``
        (the activation or the wide dtype).

        Scaled weights: native mode quantises ``x`` first (module docstring). Plain weights are
        multiplied as they are. Source: linear, fp8_gemm, fp4_gemm.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens groups in", "weight": "out in"},
        returns="tokens out",
        dtypes={"x": "act", "weight": "weight", "return": "act"},
        work={"act": "2*tokens*in*out"},
    )
    def grouped_linear(self, x: Array, weight: Array | ScaledArray) -> Array:
        """Multiply group g of ``x`` by block g of ``out / groups`` rows: ``y[t, o] = sum_i x[t,
        g(o), i] * weight[o, i]``.

        The output projection's first half (``wo_a``): a scaled weight is dequantised to BF16 in
        native mode (exact for E4M3 times a power of two), and the activation is *not* quantised.
        ``out`` is a multiple of ``groups``.
        """
        raise NotImplementedError

    @op(
        axes={"x": "rows in", "weight": "experts out in", "offsets": "experts+1"},
        returns="rows out",
        dtypes={"x": "act", "weight": "weight", "offsets": "int32", "return": "act"},
        narrower=_NARROWER,
        work={"weight": "2*rows*in*out"},
        reads={"weight": "distinct(rows, experts)/experts"},
    )
    def expert_linear(self, x: Array, weight: Experts, offsets: Array) -> Array:
        """Multiply rows ``offsets[e] .. offsets[e + 1] - 1`` by expert e's weight, as ``linear``
        does.

        Rows from ``offsets[experts]`` on belong to other ranks: zeros. Source: the loop over
        experts of the published MoE.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim", "weight": "vocab dim"},
        returns="tokens vocab",
        dtypes={"x": "act", "weight": "weight", "return": "wide"},
        fused=True,
    )
    def logits(self, x: Array, weight: Array) -> Array:
        """``y[t, v] = sum_d x[t, d] * weight[v, d]``, wide and not rounded."""
        return self.linear(x, weight, out_dtype=self.wide_dtype)
