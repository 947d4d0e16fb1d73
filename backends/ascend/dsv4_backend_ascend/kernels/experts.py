"""A decode step's experts: gathered and expanded from FP4 to BF16, ``swiglu`` with its rounding, and the sum of what they give."""

import triton
import triton.language as tl

from dsv4_backend_ascend.kernels.rounding import rounded_row


@triton.jit
def bf16_bits(code, power):
    """E2M1 codes times powers of two, as the bits of float32: those of BF16 with zeros behind."""
    magnitude = code & 7
    normal = (magnitude << 22) + (126 << 23)
    bits = tl.where(magnitude == 0, 0, tl.where(magnitude == 1, 126 << 23, normal))
    scaled = (bits.to(tl.float32, bitcast=True) * power).to(tl.int32, bitcast=True)
    return scaled | ((code & 8) << 28)


@triton.jit
def expand_stack(codes, scales, own, out, first, count, parts, GROUPS: tl.constexpr):
    """A unit is one of an expert's ``parts`` of GROUPS groups of 32 weights, 16 bytes each; ``out`` has two BF16 numbers an int32."""
    group = tl.arange(0, GROUPS)
    byte = tl.arange(0, 16)
    for unit in range(tl.program_id(0), count, tl.num_programs(0)):
        expert = tl.cast(tl.load(own + unit // parts), tl.int64)
        part = unit % parts
        at = (expert * parts + part) * (GROUPS * 16)
        packed = tl.load(codes + at + group[:, None] * 16 + byte[None, :]).to(tl.int32)
        scale = tl.load(scales + (expert * parts + part) * GROUPS + group).to(tl.int32)
        power = (scale << 23).to(tl.float32, bitcast=True)[:, None]
        low = (bf16_bits(packed & 15, power) >> 16) & 0xFFFF
        high = bf16_bits(packed >> 4, power)
        to = tl.cast(first + unit, tl.int64) * (GROUPS * 16)
        tl.store(out + to + group[:, None] * 16 + byte[None, :], low | high)


@triton.jit(do_not_specialize=["count", "parts"])
def expand_kernel(codes1, scales1, codes3, scales3, codes2, scales2, own, out, count, parts, GROUPS: tl.constexpr):
    """Three stacks of as many weights an expert, ``count`` units of each."""
    expand_stack(codes1, scales1, own, out, 0, count, parts, GROUPS)
    expand_stack(codes3, scales3, own, out, count, count, parts, GROUPS)
    expand_stack(codes2, scales2, own, out, 2 * count, count, parts, GROUPS)


@triton.jit(do_not_specialize=["units", "parts", "gate_stride", "up_stride", "channels"])
def gated_kernel(
    gate, up, weights, y, rounded, units, parts, gate_stride, up_stride, channels, limit,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A unit is one of a row's ``parts`` of BLOCK channels: silu(min(gate, limit)) * clamp(up) * weight."""
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row = tl.cast(unit // parts, tl.int64)
        column = (unit % parts) * BLOCK + tl.arange(0, BLOCK)
        inside = column < channels
        g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        value = g / (1.0 + tl.exp(-g)) * u
        if WEIGHTED:
            value = value * tl.load(weights + row)
        done = value.to(y.dtype.element_ty)
        at = row * channels + column
        tl.store(y + at, done, mask=inside)
        if ROUND:
            tl.store(rounded + at, rounded_row(done, BLOCK), mask=inside)


@triton.jit(do_not_specialize=["units", "parts", "dim"])
def combine_kernel(rows, shared, y, units, parts, dim, TOPK: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """A unit is one of a token's ``parts`` of BLOCK channels: the sum of its TOPK rows and the shared expert's."""
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        token = tl.cast(unit // parts, tl.int64)
        column = (unit % parts) * BLOCK + tl.arange(0, BLOCK)
        inside = column < dim
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(TOPK):
            total += tl.load(rows + (token * TOPK + k) * dim + column, mask=inside, other=0.0).to(tl.float32)
        if SHARED:
            total += tl.load(shared + token * dim + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + token * dim + column, total.to(y.dtype.element_ty), mask=inside)
