"""Activation quantisation and the Hadamard rotation. Rounding is arithmetic on float bits, so that
it is the same on every device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4_backend_torch.numeric import Numeric
from dsv4_core.contract.dtypes import AMAX_FLOOR, FORMAT_MAX, FP4_GROUP, FP8_BLOCK, INT8_MAX, Format, ScaledArray
from dsv4_core.contract.ops.quant import QuantOps


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


def scale_bits(blocks: Tensor, fmt: Format) -> Tensor:
    """Float32 bits, as int32, of the smallest power-of-two scales that fit blocks [..., block] into
    the format: a bare exponent.
    """
    amax = blocks.abs().amax(-1).to(torch.float32)
    return (
        amax.clamp_(min=AMAX_FLOOR[fmt])
        .mul_(1 / FORMAT_MAX[fmt])
        .view(torch.int32)
        .add_(0x7FFFFF)
        .bitwise_and_(0x7F800000)
    )  # one up where any mantissa bit is set


def scale_bytes(bits: Tensor) -> Tensor:
    """E8M0 bytes of scales' bits."""
    return whole_part(bits, 23).to(torch.uint8)


def whole_part(x: Tensor, bits: int) -> Tensor:
    """``x >> bits``. On a device it is a division, which is exact and has kernels everywhere:
    shifts run on the host's or a chip's scalar cores in some (aclnnRightShift).
    """
    return x >> bits if x.device.type == "cpu" else x.div(1 << bits, rounding_mode="floor")


def grid_scale(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales [..., 1] of their bits: byte 0 (met only beside a NaN) is 2^-127, byte 255 (beside an
    infinity) is infinity.
    """
    return bits.view(torch.float32).clamp(min=2.0**-127).to(dtype)[..., None]


def nan_if_infinite(scale: Tensor) -> Tensor:
    """Scales that leave nothing but NaN beside an infinity: infinity less itself is NaN; any other
    scale stays.
    """
    return (scale - scale).add_(scale)


def round_to_grid(x: Tensor, fmt: Format) -> Tensor:
    """Clamp and round float32 or float64 to nearest even on the format's grid, in ``x``'s own
    dtype; the sign of zero is kept.

    Adding 1.5 * 2^(exponent - grid's mantissa bits + dtype's) leaves no room for finer bits: the
    addition itself rounds.
    """
    if fmt == "e4m3" and x.dtype == torch.float32 and has_e4m3(x):
        return to_e4m3(x).to(torch.float32)
    integer, mantissa, bias = _BITS[x.dtype]
    y = x.clamp(-FORMAT_MAX[fmt], FORMAT_MAX[fmt])
    exponent = y.view(integer) & (((1 << (x.element_size() * 8 - 1 - mantissa)) - 1) << mantissa)
    exponent.clamp_(min=(bias + _LEAST_EXPONENT[fmt]) << mantissa)
    shift = exponent.add_(((mantissa - _MANTISSA[fmt]) << mantissa) + (1 << (mantissa - 1))).view(x.dtype)
    return signed_like((y + shift).sub_(shift), y)


def has_e4m3(x: Tensor) -> bool:
    """Say whether torch's own cast rounds ``x``: on a CPU, in a torch that has the dtype. Proven
    equal to the arithmetic in the tests.
    """
    return x.device.type == "cpu" and hasattr(torch, "float8_e4m3fn")


def to_e4m3(x: Tensor) -> Tensor:
    """Float32 values, clamped and rounded once, in torch's E4M3."""
    return x.clamp(-FORMAT_MAX["e4m3"], FORMAT_MAX["e4m3"]).to(torch.float8_e4m3fn)


def signed_like(rounded: Tensor, y: Tensor, *, on_cpu: bool | None = None) -> Tensor:
    """Give rounded values the signs of ``y``, without ``copysign`` (which torch-npu has no kernel
    for) on a device: only zeros lose theirs in rounding, so that setting a bit is enough.
    """
    if y.device.type == "cpu" if on_cpu is None else on_cpu:
        return torch.copysign(rounded, y)
    integer = _BITS[y.dtype].integer
    return (rounded.view(integer) | (y.view(integer) & torch.iinfo(integer).min)).view(y.dtype)


def grid_codes(y: Tensor, fmt: Format) -> Tensor:
    """Codes, one a byte, of values that are on the format's grid (or NaN, in E4M3)."""
    if fmt == "e4m3" and has_e4m3(y):
        return y.to(torch.float8_e4m3fn).view(torch.uint8)
    bits = y.to(torch.float32).view(torch.int32)
    magnitude, mantissa = bits & 0x7FFFFFFF, _MANTISSA[fmt]
    least = (127 + _LEAST_EXPONENT[fmt]) << 23
    normal = whole_part(magnitude - least, 23 - mantissa) + (1 << mantissa)
    small = (y.abs() * 2.0 ** (mantissa - _LEAST_EXPONENT[fmt])).to(torch.int32)
    code = torch.where(magnitude < least, small, normal)
    if fmt == "e4m3":
        code = code.clamp(max=0x7F)  # NaN is 0x7F
    return torch.where(bits < 0, code + (0x80 if fmt == "e4m3" else 8), code).to(torch.uint8)


class TorchQuant(Numeric, QuantOps):
    """Contracts of ``ops/quant.py``, and the way back from codes to values."""

    def act_quant(self, x: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
        codes, scale = self.encode(x, "e4m3", block)
        return codes.reshape(x.shape), scale

    def encode(self, x: Tensor, fmt: Format, block: int) -> tuple[Tensor, Tensor]:
        """Codes [tokens, blocks, block], one a byte, and E8M0 scale bytes [tokens, blocks]."""
        blocks = self.widen(x).reshape(x.shape[0], x.shape[1] // block, block)
        bits = scale_bits(blocks, fmt)
        scaled = blocks / nan_if_infinite(grid_scale(bits, blocks.dtype))
        if fmt == "e4m3" and scaled.dtype == torch.float32 and has_e4m3(scaled):
            return to_e4m3(scaled).view(torch.uint8), scale_bytes(bits)
        return grid_codes(round_to_grid(scaled, fmt), fmt), scale_bytes(bits)

    def act_qdq(self, x: Tensor, *, format: Format, block: int, channels: int) -> Tensor:
        if self.numerics != "native":
            return x
        if self.compiled and (few := self.compiled.act_qdq(x, format, block, channels)) is not None:
            return few
        grid = self.rounded(self.blocks_on_grid(x[:, :channels], format, block))
        return grid if channels == x.shape[1] else torch.cat([grid, x[:, channels:]], 1)

    def blocks_on_grid(self, x: Tensor, fmt: Format, block: int) -> Tensor:
        """Quantise and dequantise rows in blocks, wide."""
        return self.on_grid(self.widen(x).reshape(x.shape[0], x.shape[1] // block, block), fmt).reshape(x.shape)

    def on_grid(self, blocks: Tensor, fmt: Format) -> Tensor:
        """Quantise and dequantise blocks [..., block]: exactly ``q * scale``, and NaN beside an
        infinity, which is 0 times the scale.
        """
        scale = grid_scale(scale_bits(blocks, fmt), blocks.dtype)
        return round_to_grid(blocks / scale, fmt).mul_(scale)

    def quantises(self, weight: Tensor | ScaledArray) -> bool:
        """Say whether what this weight multiplies is in FP8."""
        return self.numerics == "native" and isinstance(weight, ScaledArray) and weight.format != "int8"

    def quantised_activation(self, x: Tensor, weight: Format = "e4m3") -> Tensor:
        """What a linear layer with a scaled weight multiplies: in native mode FP8 in blocks of 128,
        exact in BF16, or int8 per token, in float32, beside an int8 weight; ``x`` in the exact
        modes.
        """
        if self.numerics != "native":
            return x
        if weight == "int8":
            return self.on_int8(x)
        if self.compiled and (few := self.compiled.act_qdq(x, "e4m3", FP8_BLOCK, x.shape[1])) is not None:
            return few
        return self.rounded(self.blocks_on_grid(x, "e4m3", FP8_BLOCK))

    def on_int8(self, x: Tensor) -> Tensor:
        """Quantise to int8 per token and dequantise, in float32: as ``dtypes.quantise_tokens``."""
        wide = x.to(torch.float32)
        if not wide.numel():
            return wide
        scale = wide.abs().amax(1, keepdim=True) / INT8_MAX
        scale = torch.where(scale > 0, scale, 1.0)
        return (wide / scale).round_().clamp_(-INT8_MAX, INT8_MAX).mul_(scale)

    def hadamard(self, x: Tensor) -> Tensor:
        if self.compiled and (few := self.compiled.hadamard(x)) is not None:
            return few
        dim = x.shape[1]
        return self.rounded((self.widen(x) @ hadamard_matrix(dim, self.wide_type, x.device)).mul_(dim**-0.5))

    def decode_e4m3(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of E4M3 codes, one a byte."""
        return self.lookup("E4M3_VALUES", codes, dtype)

    def decode_e2m1(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Values [..., n] of packed E2M1 bytes [..., n / 2]."""
        return self.lookup("E2M1_PAIRS", packed, dtype).view(dtype)

    def dequantise(self, weight: ScaledArray, dtype: torch.dtype) -> Tensor:
        """Codes times scales [..., out, in] (a stack or one matrix): exact in BF16 and wider; int8
        is rounded to ``dtype``.
        """
        *lead, out, cols = weight.shape
        if weight.format == "int8":
            return weight.data.to(dtype).mul_(weight.scale.to(dtype)[..., None])
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
