"""Codes that stay together in 32-bit words: sign and magnitude bits moved to their place in a wider format are the value times a power of two.

Subnormals included, so that widening is shifts and masks, two or four codes an instruction, without a multiplication; whoever sums the products gives
the power back once. A group keeps its words in one lane: channels come in an order that follows from the words, not in their own.
"""

import triton
import triton.language as tl


@triton.jit
def bytes_of(word):
    """uint32 [n, words] -> uint8 [n, 4 words]."""
    pairs = tl.join(word.to(tl.uint8), (word >> 16).to(tl.uint8)), tl.join((word >> 8).to(tl.uint8), (word >> 24).to(tl.uint8))
    return tl.reshape(tl.join(pairs[0], pairs[1]), (word.shape[0], 4 * word.shape[1]))


@triton.jit
def halves_of(word):
    """uint32 [n, words] -> uint16 [n, words, 2]."""
    return tl.join(word.to(tl.uint16), (word >> 16).to(tl.uint16))


@triton.jit
def paired_place(channel):
    """Place of a channel in the order of ``group_e4m3``: of every 32 the even ones, then the odd ones."""
    return (channel & -32) | ((channel & 1) << 4) | ((channel & 31) >> 1)


@triton.jit
def group_e4m3(word):
    """uint32 [n, 4] -> E4M3 [n, 32], value / 64: the words' even channels, then the odd ones."""
    even = ((word << 4) & 0x80808080) | ((word << 2) & 0x1C1C1C1C)
    odd = (word & 0x80808080) | ((word >> 2) & 0x1C1C1C1C)
    both = tl.permute(tl.join(bytes_of(even), bytes_of(odd)), (0, 2, 1))
    return tl.reshape(both, (word.shape[0], 32)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def group_half(word):
    """uint32 [n, 4] -> FP16 [n, 32], value / 2^14: channel 8 c + 4 b + j at place 8 j + 2 c + b, c the word."""
    a = halves_of(((word << 12) & 0x80008000) | ((word << 9) & 0x0E000E00))
    b = halves_of(((word << 8) & 0x80008000) | ((word << 5) & 0x0E000E00))
    c = halves_of(((word << 4) & 0x80008000) | ((word << 1) & 0x0E000E00))
    d = halves_of((word & 0x80008000) | ((word >> 3) & 0x0E000E00))
    four = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 3, 4, 1, 2))  # [n, word, half, c or d, b or d]
    return tl.reshape(four, (word.shape[0], 32)).to(tl.float16, bitcast=True)


@triton.jit
def half_of_e4m3(word):
    """uint32 [n, words] -> FP16 [n, 4 words], value / 2^8, channels 0, 2, 1, 3 of every word. A NaN makes its word NaN: every sum it enters is NaN anyway."""
    even = ((word << 8) & 0x80008000) | ((word << 7) & 0x3F803F80)
    odd = (word & 0x80008000) | ((word >> 1) & 0x3F803F80)
    nan = (((word & 0x7F7F7F7F) + 0x01010101) & 0x80808080) != 0
    four = tl.join(halves_of(tl.where(nan, 0x7E007E00, even)), halves_of(tl.where(nan, 0x7E007E00, odd)))  # [n, word, half, even or odd]
    return tl.reshape(tl.permute(four, (0, 1, 3, 2)), (word.shape[0], 4 * word.shape[1])).to(tl.float16, bitcast=True)


@triton.jit
def bf16_of_e4m3(word):
    """uint32 [n, words] -> BF16 [n, 4 words], exactly, channels in their order. A NaN makes its word NaN."""
    low = ((word & 0xFF) << 8) | ((word & 0xFF00) << 16)
    high = ((word >> 8) & 0xFF00) | (word & 0xFF000000)
    nan = (((word & 0x7F7F7F7F) + 0x01010101) & 0x80808080) != 0
    low = tl.where(nan, 0x7FC07FC0, (low & 0x80008000) | ((low >> 4) & 0x07F007F0))
    high = tl.where(nan, 0x7FC07FC0, (high & 0x80008000) | ((high >> 4) & 0x07F007F0))
    four = tl.permute(tl.join(halves_of(low), halves_of(high)), (0, 1, 3, 2))  # [n, word, low or high, half]
    return (tl.reshape(four, (word.shape[0], 4 * word.shape[1])).to(tl.bfloat16, bitcast=True) * 1.329227995784916e36).to(tl.bfloat16)  # 2^120
