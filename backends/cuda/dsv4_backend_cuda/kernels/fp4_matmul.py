"""FP8 activations x FP4 weights where tensor cores do not mix the formats: weights are widened eight codes at a time to E4M3, or to FP16.

The 1 x 32 scales do not factor out of a block of 128, so every group of 32 is a product of its own and is scaled as it is added up. Activations, the
narrow side, come in the order in which the words of a group unpack: FP8 codes are stored so by their quantiser (``words.paired_place``), so that they go from
memory to the tensor cores without passing through registers; FP16 ones are brought into it here.
"""

import triton
import triton.language as tl

from dsv4_backend_cuda.kernels.tiles import following, locate
from dsv4_backend_cuda.kernels.words import group_e4m3, group_half, half_of_e4m3


@triton.jit
def power_of_two(exponent):
    """2^(exponent - 127) as float32 for int32 exponents; 0 is the subnormal 2^-127, whose bits exceed 0 << 23."""
    return tl.maximum(exponent << 23, 0x00400000).to(tl.float32, bitcast=True)


@triton.jit
def half_group_order(x):
    """[n, 32] in ``half_of_e4m3``'s order -> ``group_half``'s: channel 4 u + j to place 8 j + u."""
    words = tl.permute(tl.reshape(x, (x.shape[0], 8, 2, 2)), (0, 3, 2, 1))  # [n, word, even or odd, half] -> [n, half, even or odd, word]
    return tl.reshape(words, (x.shape[0], 32))


@triton.jit
def fp4_tile(
    tile, part, piece, x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N2, stride, stride2, K, span,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, FP8: tl.constexpr, TWO: tl.constexpr, TOPK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Outputs of rows, EXPERTS, TWO, TOPK, SPLIT: as in ``scaled_tile``. FP8: products in E4M3, else in FP16."""
    if TWO:
        tile, w, ws, y, N, stride = following(tile, tl.cdiv(N, BLOCK_N), w, ws, y, N, stride, w2, ws2, y2, N2, stride2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, first, end = 0, part * BLOCK_T, rows
    if EXPERTS > 0:
        expert, first, end = locate(part, offsets, rows, EXPERTS, SLOTS, BLOCK_T)
    t = first + tl.arange(0, BLOCK_T)
    live_t, live_n = t < end, n < N
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    row, column = t.to(tl.int64), n.to(tl.int64)
    source = row
    if TOPK > 0:
        source = (tl.load(order + t, mask=live_t, other=0) // TOPK).to(tl.int64)
    blocks = K // 128
    begin, stop = 0, blocks
    if SPLIT:
        begin = piece * span
        stop = tl.minimum(begin + span, blocks)
        y += tl.cast(piece, tl.int64) * rows * stride
    if expert < EXPERTS or EXPERTS == 0:
        codes = w.to(tl.pointer_type(tl.uint32), bitcast=True) + tl.cast(expert, tl.int64) * N * (K // 8)  # eight codes
        scales = ws.to(tl.pointer_type(tl.uint32), bitcast=True) + tl.cast(expert, tl.int64) * N * blocks  # a block's four scales
        fours = x.to(tl.pointer_type(tl.uint32), bitcast=True)
        if FP8:
            eighths = x.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        word, channel = tl.arange(0, 4), tl.arange(0, 32)
        for block in range(begin, stop):
            scale_x = power_of_two(tl.load(xs + source * blocks + block, mask=live_t, other=127).to(tl.int32))
            scale_w = tl.load(scales + column * blocks + block, mask=live_n, other=0)
            sums = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
            for group in tl.static_range(4):
                wide = tl.load(codes + column[:, None] * (K // 8) + block * 16 + group * 4 + word[None, :], mask=live_n[:, None], other=0)
                if FP8:
                    narrow = tl.load(eighths + source[None, :] * K + block * 128 + group * 32 + channel[:, None], mask=live_t[None, :], other=0.0)
                    product = tl.dot(group_e4m3(wide), narrow)
                else:
                    narrow = tl.load(fours + source[:, None] * (K // 4) + block * 32 + group * 8 + tl.arange(0, 8)[None, :], mask=live_t[:, None], other=0)
                    product = tl.dot(group_half(wide), tl.trans(half_group_order(half_of_e4m3(narrow))))
                scale = power_of_two(((scale_w >> (8 * group)) & 255).to(tl.int32))
                sums = tl.fma(product, tl.broadcast_to(scale[:, None], BLOCK_N, BLOCK_T), sums)  # a power of two: no rounding but the sum's
            acc = tl.fma(sums, tl.broadcast_to(scale_x[None, :], BLOCK_N, BLOCK_T), acc)
    out = tl.trans(acc * (64.0 if FP8 else 4194304.0)).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * stride + column[None, :], out, mask=live_t[:, None] & live_n[None, :])


@triton.jit(do_not_specialize=["rows", "span"])
def fp4_matmul_kernel(
    x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N2, stride, stride2, K, span,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, FP8: tl.constexpr, TWO: tl.constexpr, TOPK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A program computes an ``fp4_tile``."""
    fp4_tile(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N2, stride, stride2, K, span,
        EXPERTS, SLOTS, FP8, TWO, TOPK, SPLIT, BLOCK_N, BLOCK_T,
    )  # fmt: skip
