"""FP8 and FP4 rounding of activations in BF16 arithmetic: half of the launches of the portable way,
and half of the bytes.

Blocks are divided by a power of two that leaves the format's largest number below 4, so that
nothing overflows. A quotient has 8 bits. Adding 1.5 * 2^(7 - m) times its power of two leaves room
for m bits behind the first, so that the sum, rounded to BF16 to nearest even as every BF16 addition
is, lies on the grid; taking it away again is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsv4_backend_ascend.chip import ChipBackend
from dsv4_core.contract.dtypes import AMAX_FLOOR, FP8_BLOCK, Format

EXPONENT = 0x7F80  # of BF16 bits as int16


class Grid(NamedTuple):
    """``floor``: under a block's largest magnitude; any number that asks for the same scale will
    do. ``part``: what is taken off that magnitude, as a part of it: what remains lies above the
    magnitude's own power of two where its mantissa is larger than the format's largest number's,
    else below. A test tries every magnitude, with the part rounded before it is taken off and not.
    ``shift``: 1.5 * 2^(7 - mantissa bits). ``least``: the smallest normal number's quotient.
    """

    floor: float
    part: float
    shift: float
    least: float


GRIDS: dict[Format, Grid] = {
    "e4m3": Grid(1.5 * 2.0**-14, 221 / 512, 24.0, 2.0**-13),  # 448 is 1.75 * 2^8; 3.5 as a quotient
    "e2m1": Grid(AMAX_FLOOR["e2m1"], 172 / 512, 96.0, 0.5),  # 6 is 1.5 * 2^2; 3 as a quotient
}


def power_of_two(numbers: torch.Tensor) -> torch.Tensor:
    """BF16 numbers without their mantissa and sign, in place."""
    numbers.view(torch.int16).bitwise_and_(EXPONENT)
    return numbers


def on_grid(blocks: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Quantise and dequantise BF16 blocks [..., block]: ``q * scale``, exactly. Zeros lose their
    sign; beside an infinity or a NaN there are no numbers.
    """
    grid = GRIDS[fmt]
    amax = torch.linalg.vector_norm(blocks, torch.inf, -1, keepdim=True).clamp_(min=grid.floor)
    unit = power_of_two(amax.sub_(amax, alpha=grid.part))
    quotient = blocks / unit
    power = (quotient.view(torch.int16) & EXPONENT).view(torch.bfloat16).clamp_(min=grid.least)
    return quotient.add_(power, alpha=grid.shift).sub_(power, alpha=grid.shift).mul_(unit)


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
        own = type(self).act_qdq  # not what may watch the op
        return self.kept.once(  # type: ignore[no-any-return]
            (x, "e4m3"), lambda: own(self, x, format="e4m3", block=FP8_BLOCK, channels=x.shape[1])
        )
