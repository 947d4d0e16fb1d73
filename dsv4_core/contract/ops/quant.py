"""Activation quantisation and the Hadamard rotation. Quantised data is uint8: E4M3 codes, E8M0
scales, E2M1 pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.contract.spec import Array, Ops, op

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Format


class QuantOps(Ops):
    """Casts to the model's small formats."""

    @op(
        axes={"x": "tokens dim"},
        returns=("tokens dim", "tokens dim//block"),
        dtypes={"x": "act", "return": "uint8"},
        judged="exact",
        work={"vector": "4*tokens*dim"},
    )
    def act_quant(self, x: Array, *, block: int) -> tuple[Array, Array]:
        """Quantise to E4M3 per token and per ``block`` channels; give codes and E8M0 scale bytes.

        ``amax = max(|x|, 1e-4)`` over the block; ``scale = 2^ceil(log2(amax * float32(1/448)))``
        from float32 bits; ``q = e4m3(clamp(x / scale, -448, 448))``, to nearest even. ``dim`` is a
        multiple of ``block``. Source: act_quant of the published kernels.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim"},
        returns="tokens dim",
        dtypes={"x": "act", "return": "act"},
        judged="exact",
        work={"vector": "6*tokens*channels"},
    )
    def act_qdq(self, x: Array, *, format: Format, block: int, channels: int) -> Array:
        """Round the first ``channels`` channels to ``format`` and back, in blocks of ``block``
        channels; the others pass through.

        As ``act_quant`` for ``e4m3``; for ``e2m1``: ``amax = max(|x|, 6 * 2^-126)``, ``scale =
        2^ceil(log2(amax * float32(1/6)))``. ``y = q * scale``, exactly. In the exact modes ``y =
        x``. ``channels`` is a multiple of ``block``.
        """
        raise NotImplementedError

    @op(
        axes={"x": "tokens dim"},
        returns="tokens dim",
        dtypes={"x": "act", "return": "act"},
        work={"vector": "tokens*dim*dim.bit_length()"},  # butterflies: log2(dim) additions a channel, and the scale
    )
    def hadamard(self, x: Array) -> Array:
        """Rotate by the Sylvester-ordered Hadamard matrix: ``y[t, j] = dim^-0.5 * sum_i
        (-1)^popcount(i & j) x[t, i]``.

        ``dim`` is a power of two. Wide inside, rounded once. Source: rotate_activation of the
        published code.
        """
        raise NotImplementedError
