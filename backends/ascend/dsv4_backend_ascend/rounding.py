"""FP8 and FP4 rounding of activations in BF16 arithmetic: half of the launches of the portable way,
and half of the bytes.

A quotient in [-448, 448] has 8 bits. Adding 1.5 * 2^(7 - m) times its power of two leaves room for
m bits behind the first, so that the sum, rounded to BF16 to nearest even as every BF16 addition is,
lies on the grid; taking it away again is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_backend_ascend.chip import ChipBackend
from dsv4_core.contract.dtypes import AMAX_FLOOR, FORMAT_MAX, FP8_BLOCK, Format

EXPONENT, SIGN = 0x7F80, -0x8000  # of BF16 bits as int16


class Grid(NamedTuple):
    """``shift``: 1.5 * 2^(7 - mantissa bits). ``least``: the smallest normal number.
    ``least_scale``: what the floor under amax makes of a block of zeros.
    """

    shift: float
    least: float
    least_scale: float


GRIDS: dict[Format, Grid] = {"e4m3": Grid(24.0, 2.0**-6, 2.0**-22), "e2m1": Grid(96.0, 1.0, 2.0**-126)}
assert all(2 * AMAX_FLOOR[f] / FORMAT_MAX[f] > GRIDS[f].least_scale >= AMAX_FLOOR[f] / FORMAT_MAX[f] for f in GRIDS)
UNIT = (
    2.0**7
)  # scales that a product's operands are divided by: 448 is 3.5 of them, and they fit BF16 whatever the block holds
TO_UNIT = 0x1FFFFF - (
    1 << 23
)  # on float32 bits: one power up beyond a mantissa of 1.75, as 448 has it, and one power down


def largest(blocks: torch.Tensor) -> torch.Tensor:
    """Magnitudes [..., 1], float32."""
    return torch.linalg.vector_norm(blocks, torch.inf, -1, keepdim=True, dtype=torch.float32)


def exponents(numbers: torch.Tensor, add: int) -> torch.Tensor:
    """Float32 numbers plus ``add`` in their bits, as bare powers of two; overwrites them."""
    numbers.view(torch.int32).add_(add).bitwise_and_(0x7F800000)
    return numbers


def to_grid(quotient: torch.Tensor, fmt: Format, least: float) -> torch.Tensor:
    """Round BF16 numbers to the format's mantissa, and below ``least`` to multiples of what one has
    there. Zeros lose their sign.
    """
    power = (quotient.view(torch.int16) & EXPONENT).view(torch.bfloat16).clamp_(min=least)
    return torch.add(quotient, power, alpha=GRIDS[fmt].shift).sub_(power, alpha=GRIDS[fmt].shift)


def on_grid(blocks: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Quantise and dequantise BF16 blocks [..., block]: ``q * scale``, exactly, with the sign of
    zeros; NaN beside an infinity.
    """
    grid = GRIDS[fmt]
    scale = exponents(largest(blocks).mul_(1 / FORMAT_MAX[fmt]), 0x7FFFFF)
    scale = scale.clamp_(min=grid.least_scale).to(torch.bfloat16)
    quotient = blocks / scale
    rounded = to_grid(quotient, fmt, grid.least)
    rounded.view(torch.int16).bitwise_or_(quotient.view(torch.int16) & SIGN)
    return rounded.mul_(scale)


def multiplied(blocks: torch.Tensor) -> torch.Tensor:
    """``on_grid`` in E4M3 for a product, where neither the sign of a zero nor what stands beside an
    infinity shows.
    """
    unit = exponents(largest(blocks).clamp_(min=AMAX_FLOOR["e4m3"]), TO_UNIT).to(torch.bfloat16)
    return to_grid(blocks / unit, "e4m3", GRIDS["e4m3"].least / UNIT).mul_(unit)


class Rounding(ChipBackend):
    """``act_qdq`` and what linear layers multiply, of BF16 activations; the portable way in other
    dtypes.
    """

    def act_qdq(self, x: torch.Tensor, *, format: Format, block: int, channels: int) -> torch.Tensor:
        if x.dtype != torch.bfloat16 or not x.numel():
            return super().act_qdq(x, format=format, block=block, channels=channels)
        grid = on_grid(x[:, :channels].unflatten(1, (-1, block)), format).flatten(1)
        return grid if channels == x.shape[1] else torch.cat([grid, x[:, channels:]], 1)

    def quantised_activation(self, x: torch.Tensor, weight: Format = "e4m3") -> torch.Tensor:
        """As published, or (``activations=bf16``) as it is beside FP8 and FP4 weights; of the same
        rows once.
        """
        if self.activations == "bf16" and weight != "int8":
            return x
        rounded = super().quantised_activation
        if weight == "int8":
            return self.kept.once((x, "int8"), lambda: rounded(x, weight))  # type: ignore[no-any-return]
        if x.dtype != torch.bfloat16 or x.shape[1] % FP8_BLOCK or not x.numel():
            return self.kept.once((x, "e4m3"), lambda: rounded(x, weight))  # type: ignore[no-any-return]
        blocks = x.unflatten(1, (-1, FP8_BLOCK))
        return self.kept.once((x, "e4m3"), lambda: multiplied(blocks).flatten(1))  # type: ignore[no-any-return]
