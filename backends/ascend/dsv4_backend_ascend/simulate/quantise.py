"""npu_dynamic_quant and npu_dynamic_mx_quant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.simulate.library import simulated
from dsv4_backend_ascend.simulate.numerics import E4M3_MAX, e8m0

if TYPE_CHECKING:
    from types import SimpleNamespace

INT8_MAX = 127.0
E4M3_EMAX = 8  # exponent of 448


def _int8_shapes(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(a.input, dtype=torch.int8), a.input.new_empty(a.input.shape[:-1], dtype=torch.float32)


@simulated("npu_dynamic_quant", shapes=_int8_shapes)
def dynamic_quant(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: ``scale = max |x| / 127``, ``y = round(x / scale)``. A token of zeros gives zeros
    (the documents do not say).
    """
    x = a.input.float()
    scale = x.abs().amax(-1) / INT8_MAX
    codes = (x / scale.where(scale > 0, 1.0).unsqueeze(-1)).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def _mx_shapes(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = -(-a.input.shape[-1] // a.block_size) + 1 >> 1
    return torch.empty_like(a.input, dtype=torch.float8_e4m3fn), a.input.new_empty(
        [*a.input.shape[:-1], pairs, 2], dtype=torch.uint8
    )


@simulated("npu_dynamic_mx_quant", shapes=_mx_shapes)
def dynamic_mx_quant(a: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes in blocks along the last axis, and E8M0 scales [..., blocks / 2, 2], an odd count
    padded with 0.

    ``scale_alg`` 0: the exponent of the largest value less 8, so that values above 448 saturate. 1:
    the power of two at or above ``amax / 448``.
    """
    x = a.input.float()
    length = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -length % a.block_size)).unflatten(-1, (-1, a.block_size))
    amax = blocks.abs().amax(-1)
    byte = _exponent_up(amax / E4M3_MAX) if a.scale_alg else ((amax.view(torch.int32) >> 23) - E4M3_EMAX).clamp(0, 254)
    scaled = blocks * (1 / e8m0(byte.to(torch.uint8))).unsqueeze(-1)
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).flatten(-2)[..., :length].to(torch.float8_e4m3fn)
    return codes.contiguous(), torch.nn.functional.pad(byte, (0, byte.shape[-1] % 2)).to(torch.uint8).unflatten(
        -1, (-1, 2)
    )


def _exponent_up(scale: torch.Tensor) -> torch.Tensor:
    """Biased exponent of a float32, plus one where the mantissa is not zero (a subnormal's: above a
    half), below 255.
    """
    bits = scale.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = torch.where(exponent > 0, (mantissa > 0) & (exponent < 254), mantissa > 0x400000)
    return exponent + up
