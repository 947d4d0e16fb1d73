"""Activation quantisation and the Hadamard rotation in NumPy."""

from __future__ import annotations

import functools

import numpy as np

from dsv4_backend_reference.numeric import Numeric
from dsv4_core.contract.dtypes import (
    E8M0_VALUES,
    FP8_BLOCK,
    Format,
    Host,
    encode,
    power_of_two_scale,
    quantise_tokens,
    round_to_grid,
)
from dsv4_core.contract.ops.quant import QuantOps


def scale_bytes(blocks: Host, fmt: Format) -> Host:
    """E8M0 scale bytes [...] of blocks [..., block]."""
    return power_of_two_scale(np.abs(blocks).max(-1, initial=0), fmt)


@functools.cache
def hadamard_matrix(dim: int) -> Host:
    """Sylvester's matrix of +-1 in float64, [dim, dim], ``dim`` a power of two."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


class ReferenceQuant(Numeric, QuantOps):
    """Contracts of ``ops/quant.py``."""

    def act_quant(self, x: Host, *, block: int) -> tuple[Host, Host]:
        blocks = self.widen(x).reshape(x.shape[0], x.shape[1] // block, block)
        scale = scale_bytes(blocks, "e4m3")
        return encode(blocks / E8M0_VALUES[scale][..., None], "e4m3").reshape(x.shape), scale

    def act_qdq(self, x: Host, *, format: Format, block: int, channels: int) -> Host:
        if self.numerics != "native":
            return x
        y = x.copy()
        y[:, :channels] = self.rounded(self.on_grid(x[:, :channels], format, block))
        return y

    def on_grid(self, x: Host, fmt: Format, block: int) -> Host:
        """Quantise and dequantise, wide: exactly ``q * scale``."""
        blocks = self.widen(x).reshape(x.shape[0], x.shape[1] // block, block)
        scale = E8M0_VALUES[scale_bytes(blocks, fmt)][..., None].astype(blocks.dtype, copy=False)
        return (round_to_grid(blocks / scale, fmt) * scale).reshape(x.shape)

    def quantised_activation(self, x: Host, weight: Format) -> Host:
        """What a linear layer with a scaled weight multiplies: in native mode FP8 in blocks of 128,
        or int8 per token beside an int8 weight; ``x`` in the exact modes.
        """
        if self.numerics != "native":
            return self.widen(x)
        return self.on_int8(x) if weight == "int8" else self.on_grid(x, "e4m3", FP8_BLOCK)

    def on_int8(self, x: Host) -> Host:
        """Quantise to int8 per token and dequantise, wide."""
        codes, scale = quantise_tokens(self.widen(x))
        return codes.astype(self.wide_type, copy=False) * scale[:, None]

    def hadamard(self, x: Host) -> Host:
        dim = x.shape[1]
        return self.rounded(
            self.dot(self.widen(x), hadamard_matrix(dim).astype(self.wide_type)) * self.wide_type.type(dim**-0.5)
        )
