"""Activation quantisation and the Hadamard rotation. Rounding is arithmetic on float bits, so that it is the same on every device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_backend_torch.numeric import Numeric
from dsv4_core.dtypes import AMAX_FLOOR, FORMAT_MAX, FP4_GROUP, FP8_BLOCK, Format, ScaledArray
from dsv4_core.ops.quant import QuantOps


class _Bits(NamedTuple):
    """Layout of an IEEE dtype: the integer type of its width, mantissa bits, exponent bias."""

    integer: torch.dtype
    mantissa: int
    bias: int


_BITS = {torch.float32: _Bits(torch.int32, 23, 127), torch.float64: _Bits(torch.int64, 52, 1023)}
_MANTISSA: dict[Format, int] = {"e4m3": 3, "e2m1": 1}
_LEAST_EXPONENT: dict[Format, int] = {"e4m3": -6, "e2m1": 0}  # of a normal number


@functools.cache
def hadamard_matrix(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of +-1, [dim, dim], ``dim`` a power of two."""
    matrix = torch.ones((1, 1), dtype=dtype, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def scale_bytes(blocks: Tensor, fmt: Format) -> Tensor:
    """E8M0 bytes [...], as int32, of the smallest power-of-two scales that fit blocks [..., block] into the format."""
    amax = blocks.abs().amax(-1).to(torch.float32).clamp(min=AMAX_FLOOR[fmt])
    bits = (amax * (1 / FORMAT_MAX[fmt])).view(torch.int32)
    return ((bits + 0x7FFFFF) >> 23) & 0xFF  # the exponent, plus one where any mantissa bit is set


def round_to_grid(x: Tensor, fmt: Format) -> Tensor:
    """Clamp and round float32 or float64 to nearest even on the format's grid, in ``x``'s own dtype; the sign of zero is kept."""
    integer, mantissa, bias = _BITS[x.dtype]
    y = x.clamp(-FORMAT_MAX[fmt], FORMAT_MAX[fmt])
    exponent = y.view(integer) & (((1 << (x.element_size() * 8 - 1 - mantissa)) - 1) << mantissa)
    exponent = exponent.clamp(min=(bias + _LEAST_EXPONENT[fmt]) << mantissa)
    unit = exponent - (_MANTISSA[fmt] << mantissa)
    inverse = ((2 * bias) << mantissa) - unit
    return (y * inverse.view(x.dtype)).round_().mul_(unit.view(x.dtype))


def grid_codes(y: Tensor, fmt: Format) -> Tensor:
    """Codes, one a byte, of values that are on the format's grid (or NaN, in E4M3)."""
    bits = y.to(torch.float32).view(torch.int32)
    sign = (bits >> 31) & 1
    magnitude, mantissa = bits & 0x7FFFFFFF, _MANTISSA[fmt]
    least = (127 + _LEAST_EXPONENT[fmt]) << 23
    normal = ((magnitude - least) >> (23 - mantissa)) + (1 << mantissa)
    small = (y.abs() * 2.0 ** (mantissa - _LEAST_EXPONENT[fmt])).to(torch.int32)
    code = torch.where(magnitude < least, small, normal)
    if fmt == "e4m3":
        code = code.clamp(max=0x7F)  # NaN
    return (code | (sign << (7 if fmt == "e4m3" else 3))).to(torch.uint8)


class TorchQuant(Numeric, QuantOps):
    """Contracts of ``ops/quant.py``, and the way back from codes to values."""

    def act_quant(self, x: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
        blocks = self.widen(x).reshape(x.shape[0], x.shape[1] // block, block)
        scale = scale_bytes(blocks, "e4m3")
        grid = round_to_grid(blocks / self.scale_values(scale, blocks.dtype)[..., None], "e4m3")
        return grid_codes(grid, "e4m3").reshape(x.shape), scale.to(torch.uint8)

    def act_qdq(self, x: Tensor, *, format: Format, block: int, channels: int) -> Tensor:  # noqa: A002  the contract's name
        if self.numerics != "native":
            return x
        grid = self.rounded(self.on_grid(x[:, :channels], format, block))
        return grid if channels == x.shape[1] else torch.cat([grid, x[:, channels:]], 1)

    def on_grid(self, x: Tensor, fmt: Format, block: int) -> Tensor:
        """Quantise and dequantise, wide: exactly ``q * scale``."""
        blocks = self.widen(x).reshape(x.shape[0], x.shape[1] // block, block)
        scale = self.scale_values(scale_bytes(blocks, fmt), blocks.dtype)[..., None]
        return round_to_grid(blocks / scale, fmt).mul_(scale).reshape(x.shape)

    def quantised_activation(self, x: Tensor) -> Tensor:
        """What a linear layer with a scaled weight multiplies: in native mode FP8 in blocks of 128, exact in BF16; ``x`` in the exact modes."""
        return self.rounded(self.on_grid(x, "e4m3", FP8_BLOCK)) if self.numerics == "native" else x

    def hadamard(self, x: Tensor) -> Tensor:
        dim = x.shape[1]
        return self.rounded((self.widen(x) @ hadamard_matrix(dim, self.wide_type, x.device)).mul_(dim**-0.5))

    def decode_e4m3(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of E4M3 codes, one a byte."""
        return self.lookup("E4M3_VALUES", codes, dtype)

    def decode_e2m1(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Values [..., n] of packed E2M1 bytes [..., n / 2]."""
        return self.lookup("E2M1_PAIRS", packed, dtype).view(dtype)

    def dequantise(self, weight: ScaledArray, dtype: torch.dtype) -> Tensor:
        """Codes times scales [..., out, in] (a stack or one matrix): exact in BF16 and wider."""
        *lead, out, cols = weight.shape
        if weight.format == "e2m1":
            values = self.decode_e2m1(weight.data, dtype).reshape(*lead, out, cols // FP4_GROUP, FP4_GROUP)
            return values.mul_(self.scale_values(weight.scale, dtype)[..., None]).reshape(weight.shape)
        values = self.decode_e4m3(weight.data, dtype)
        scale = self.scale_values(weight.scale, dtype)
        rows = scale.repeat_interleave(FP8_BLOCK, -2)[..., :out, :]
        if cols % FP8_BLOCK == 0:
            values.view(*lead, out, cols // FP8_BLOCK, FP8_BLOCK).mul_(rows[..., None])
            return values
        return values.mul_(rows.repeat_interleave(FP8_BLOCK, -1)[..., :cols])
