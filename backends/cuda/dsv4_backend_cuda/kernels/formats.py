"""Small formats inside kernels: E4M3 and E2M1 codes, E8M0 scales. Codes are uint8 in memory on every architecture."""

import triton
import triton.language as tl


@triton.jit
def e8m0_of(amax, inverse_max: tl.constexpr):
    """Biased exponent of the smallest power of two s with amax / s <= max, from float32 bits (int32)."""
    bits = (amax * inverse_max).to(tl.int32, bitcast=True)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)


@triton.jit
def e8m0_value(exponent):
    """2^(exponent - 127) as float32. An exponent of 0 is the subnormal 2^-127."""
    e = exponent.to(tl.int32)
    return tl.where(e == 0, 0x00400000, e << 23).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_reciprocal(exponent):
    """2^(127 - exponent) as float32, exactly, for exponents 1 to 253; 0 for 255, the scale beside an infinity, so that infinity becomes NaN."""
    return tl.where(exponent == 255, 0, (254 - exponent.to(tl.int32)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_encode(x, NATIVE: tl.constexpr):
    """float32 -> E4M3 code (uint8): clamped to 448, to nearest even; NaN stays NaN."""
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # rounds the 20 bits below a 3-bit mantissa
    tiny = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 2^14 has ulp 2^-9, the subnormal step
    code = tl.where(magnitude < 0x3C800000, tiny, normal)  # below 2^-6
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_half(code):
    """E4M3 code -> float16, exactly, without FP8 instructions: the code's bits as a half number, times 2^8."""
    c = code.to(tl.uint16)
    half = (((c & 0x80) << 8) | ((c & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((c & 0x7F) == 0x7F, float("nan"), half)


@triton.jit
def e4m3_value(code, NATIVE: tl.constexpr):
    """E4M3 code -> float32."""
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return e4m3_half(code).to(tl.float32)


@triton.jit
def e2m1_encode(x):
    """float32 -> E2M1 code (int32, 0 to 15): clamped to 6, to nearest even. Each tie belongs to the neighbour with an even code."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_half(code):
    """E2M1 code (low four bits) -> float16, exactly: the code's bits as a half number, times 2^14."""
    c = code.to(tl.uint16)
    return (((c & 8) << 12) | ((c & 7) << 9)).to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def bf16_of_e2m1(code, scale):
    """E2M1 codes [rows, n] (uint16, four bits) times E8M0 scales [rows, n] (uint8) -> BF16, exactly: code bits, 2^126, 2^(scale - 127)."""
    bits = ((code & 8) << 12) | ((code & 7) << 6)
    s = scale.to(tl.uint16)
    factor = tl.where(s == 0, 0x40, s << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return (bits.to(tl.bfloat16, bitcast=True) * 8.507059173023462e37).to(tl.bfloat16) * factor


@triton.jit
def e2m1_value(code):
    """E2M1 code -> float32."""
    return e2m1_half(code).to(tl.float32)


@triton.jit
def quantise_e4m3(x, NATIVE: tl.constexpr):
    """float32 [rows, groups, block] -> codes (uint8), scale exponents [rows, groups] (int32), as the published act_quant."""
    exponent = e8m0_of(tl.maximum(tl.max(tl.abs(x), axis=2), 1e-4), 1.0 / 448.0)
    return e4m3_encode(x * e8m0_reciprocal(exponent)[:, :, None], NATIVE), exponent
