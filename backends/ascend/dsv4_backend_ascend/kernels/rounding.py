"""``act_qdq``: rounding to the grids of FP8 and FP4, in one launch."""

import triton
import triton.language as tl


@triton.jit
def on_grid(wide, FP4: tl.constexpr):
    """float32 [groups, channels] -> the nearest numbers of the format times each group's scale.

    Nothing is divided: a scale is a power of two, and so is its inverse. Adding 1.5 * 2^(exponent + 23 - m) leaves m bits of a mantissa.
    Beside an infinity there are no numbers.
    """
    amax = tl.max(tl.abs(wide), axis=1)
    if FP4:
        bits = (tl.maximum(amax, 6 * 2.0**-126) * (1.0 / 6)).to(tl.int32, bitcast=True)
    else:
        bits = (tl.maximum(amax, 1e-4) * (1.0 / 448)).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFFF) & 0x7F800000  # one up where any mantissa bit is set
    scale = bits.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    y = wide * inverse[:, None]
    MOST: tl.constexpr = 6.0 if FP4 else 448.0
    LEAST: tl.constexpr = (127 if FP4 else 121) << 23  # exponent of the smallest normal number
    MANTISSA: tl.constexpr = 1 if FP4 else 3
    y = tl.where(y > MOST, MOST, tl.where(y < -MOST, -MOST, y))
    exponent = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, LEAST)
    shift = (exponent + (((23 - MANTISSA) << 23) + (1 << 22))).to(tl.float32, bitcast=True)
    return ((y + shift) - shift) * ((scale - scale) + scale)[:, None]


@triton.jit
def rounded_row(row, BLOCK: tl.constexpr):
    """BF16 [channels] on the FP8 grid in groups of 128, as a product with FP8 weights takes them."""
    groups = tl.reshape(row.to(tl.float32), (BLOCK // 128, 128))
    return tl.reshape(on_grid(groups, False), (BLOCK,)).to(row.dtype)


@triton.jit(do_not_specialize=["units", "total"])
def round_kernel(
    x,
    y,
    units,
    total,
    SPAN: tl.constexpr,
    PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    FP4: tl.constexpr,
):
    """A unit is SPAN neighbouring elements; of each the first CHANNELS are rounded in groups of BLOCK, the others copied."""
    column = tl.arange(0, PADDED)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        at = tl.cast(unit, tl.int64) * SPAN + column
        inside = (column < SPAN) & (at < total)
        raw = tl.load(x + at, mask=inside, other=0.0)
        groups = on_grid(tl.reshape(raw.to(tl.float32), (PADDED // BLOCK, BLOCK)), FP4)
        tl.store(y + at, tl.where(column < CHANNELS, tl.reshape(groups, (PADDED,)).to(raw.dtype), raw), mask=inside)
