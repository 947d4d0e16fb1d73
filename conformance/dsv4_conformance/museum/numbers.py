"""Faults of number formats: scales, codes, rounding, accumulation."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import (
    AMAX_FLOOR,
    BFLOAT16,
    E8M0_VALUES,
    FORMAT_MAX,
    Experts,
    Host,
    ScaledArray,
    decode,
    encode,
    power_of_two_scale,
)


def truncated(x: Host) -> Host:
    """To bfloat16 by dropping bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits & 0xFFFF0000).view(np.float32).astype(BFLOAT16)


def bf16(x: Host) -> Host:
    """Round to bfloat16 and widen again."""
    return x.astype(BFLOAT16).astype(np.float32)


def activation(backend: Any, x: Host) -> Host:
    """What a linear layer with a quantised weight multiplies, as a plain array."""
    if backend.numerics != "native":
        return x
    codes, scale = backend.act_quant(x, block=128)
    return (decode(codes, "e4m3") * np.repeat(E8M0_VALUES[scale], 128, axis=1)).astype(x.dtype)


def rescaled(weight: Any, change: Any) -> Any:
    """A quantised weight, or experts of them, with other scales."""
    if isinstance(weight, Experts):
        return Experts([rescaled(weight[e], change) for e in range(weight.shape[0])])
    return change(weight) if isinstance(weight, ScaledArray) else weight


@mutant(
    "linear",
    "expert_linear",
    seen="a byte viewed as uint8 and converted: 2^-7 becomes 120; shipped in a public port of this model",
)
def e8m0_read_as_a_number(be: Any, right: Op, x: Host, weight: Any, *rest: Any, **kw: Any) -> Any:
    def numbers(w: ScaledArray) -> Host:
        unit = ScaledArray(w.data, np.full_like(w.scale, 127), w.format).dequantise()
        grid = w.scale.astype(np.float32)
        spread = np.repeat(grid, 32, 1) if w.format == "e2m1" else np.repeat(np.repeat(grid, 128, 0), 128, 1)
        return unit * spread[: unit.shape[0], : unit.shape[1]]

    quantised = isinstance(weight, ScaledArray) or "@" in str(weight.dtype)
    return right(activation(be, x) if quantised else x, rescaled(weight, numbers), *rest, **kw)


@mutant(
    "linear",
    "expert_linear",
    seen="scales registered as an empty buffer that the loader never fills; shipped in a public port",
)
def scales_all_zero(be: Any, right: Op, x: Host, weight: Any, *rest: Any, **kw: Any) -> Any:
    y = right(x, weight, *rest, **kw)
    return y * 0 if isinstance(weight, ScaledArray) or "@" in str(weight.dtype) else y


@mutant("linear", "expert_linear", seen="the even column is the low nibble here, the high one in other FP4 layouts")
def fp4_nibbles_swapped(be: Any, right: Op, x: Host, weight: Any, *rest: Any, **kw: Any) -> Any:
    def swap(w: ScaledArray) -> ScaledArray:
        return ScaledArray((w.data >> 4) | (w.data << 4), w.scale, w.format) if w.format == "e2m1" else w

    return right(x, rescaled(weight, swap), *rest, **kw)


@mutant("linear", "expert_linear", seen="a packed row read in 16-byte vectors whose last one is cut off")
def last_byte_of_a_packed_row_lost(be: Any, right: Op, x: Host, weight: Any, *rest: Any, **kw: Any) -> Any:
    def cut(w: ScaledArray) -> ScaledArray:
        if w.format != "e2m1":
            return w
        data = w.data.copy()
        data[..., -1] = 0
        return ScaledArray(data, w.scale, w.format)

    return right(x, rescaled(weight, cut), *rest, **kw)


def quantised(x: Host, block: int, scale: Host, fmt: str = "e4m3", *, saturate: bool = True) -> tuple[Host, Host]:
    """Codes by given scale bytes."""
    blocks = x.astype(np.float32).reshape(len(x), x.shape[1] // block, block) / E8M0_VALUES[scale][..., None]
    codes = encode(blocks, fmt)  # type: ignore[arg-type]
    if not saturate:
        codes = np.where(np.abs(blocks) > FORMAT_MAX[fmt], 0x7F, codes)  # type: ignore[index]
    return codes.reshape(x.shape), scale


def maxima(x: Host, block: int) -> Host:
    """Largest magnitude of each block, float32."""
    return np.abs(x.astype(np.float32)).reshape(len(x), x.shape[1] // block, block).max(-1)


@mutant("act_quant", seen="floor instead of ceil of the exponent: the largest values saturate")
def scale_rounded_down(be: Any, right: Op, x: Host, *, block: int) -> Any:
    return quantised(x, block, power_of_two_scale(maxima(x, block), "e4m3") - 1)


@mutant("act_quant", seen="a library's cast to E8M0 rounds to nearest where the model rounds up")
def scale_rounded_to_nearest(be: Any, right: Op, x: Host, *, block: int) -> Any:
    ratio = np.maximum(maxima(x, block), AMAX_FLOOR["e4m3"]) / 448
    return quantised(x, block, (127 + np.rint(np.log2(ratio))).astype(np.uint8))


@mutant("act_quant", seen="zero rows give scale 2^-127 and other codes than the published kernel's")
def amax_floor_missing(be: Any, right: Op, x: Host, *, block: int) -> Any:
    ratio = np.maximum(maxima(x, block), 2.0**-120) / 448
    return quantised(x, block, np.clip(127 + np.ceil(np.log2(ratio)), 0, 254).astype(np.uint8))


@mutant("act_quant", seen="a maximum over half of the lanes, and a cast that does not clamp: beyond 448 lies NaN")
def no_saturation(be: Any, right: Op, x: Host, *, block: int) -> Any:
    half = x.reshape(len(x), x.shape[1] // block, block)[:, :, : block // 2]
    amax = np.abs(half.astype(np.float32)).max(-1)
    return quantised(x, block, power_of_two_scale(amax, "e4m3"), saturate=False)


@mutant(
    "act_quant",
    seen="one scale for all tokens: right for a batch of one, and what a token gets depends on its neighbours",
)
def scale_shared_by_the_batch(be: Any, right: Op, x: Host, *, block: int) -> Any:
    amax = maxima(x, block)
    return quantised(
        x, block, power_of_two_scale(np.broadcast_to(amax.max(0, keepdims=True, initial=0), amax.shape), "e4m3")
    )


@mutant("act_qdq", seen="the RoPE channels stay BF16 in the published model; quantising the whole row is simpler")
def rope_channels_quantised(be: Any, right: Op, x: Host, *, format: str, block: int, channels: int) -> Any:
    return right(x, format=format, block=block, channels=x.shape[1] // block * block)


@mutant("act_qdq", seen="codes rounded half away from zero, as a cast written with +0.5 does")
def ties_away_from_zero(be: Any, right: Op, x: Host, *, format: str, block: int, channels: int) -> Any:
    if be.numerics != "native" or not x.size:
        return right(x, format=format, block=block, channels=channels)
    blocks = x[:, :channels].astype(np.float64).reshape(len(x), -1, block)
    scale = E8M0_VALUES[power_of_two_scale(np.abs(blocks).max(-1), format)][..., None]  # type: ignore[arg-type]
    mantissa, smallest = (3, 2.0**-6) if format == "e4m3" else (1, 1.0)
    scaled = np.minimum(np.abs(blocks) / scale, FORMAT_MAX[format])  # type: ignore[index]
    unit = np.ldexp(1.0, np.frexp(np.maximum(scaled, smallest))[1] - 1 - mantissa)
    y = x.copy()
    y[:, :channels] = (np.sign(blocks) * np.floor(scaled / unit + 0.5) * unit * scale).reshape(len(x), channels)
    return y


@mutant("linear", seen="matrix units that accumulate in the operands' format; a small test does not see it")
def bf16_accumulation(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    if isinstance(weight, ScaledArray):
        wide, matrix = activation(be, x).astype(np.float32), weight.dequantise()
    else:
        wide, matrix = x.astype(np.float32), weight.astype(np.float32)
    total = np.zeros((len(x), matrix.shape[0]), np.float32)
    for k in range(0, wide.shape[1], 64):
        total = bf16(total + wide[:, k : k + 64] @ matrix[:, k : k + 64].T)
    return total.astype(right(x, weight, out_dtype=out_dtype).dtype)


@mutant("linear", seen="sums of a whole row kept in the 14 bits of an FP8 tensor core, never promoted")
def fp8_sums_never_promoted(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    if not isinstance(weight, ScaledArray):
        return right(x, weight, out_dtype=out_dtype)
    wide, matrix = activation(be, x).astype(np.float64), weight.dequantise("float64")
    total = np.zeros((len(x), matrix.shape[0]))
    for k in range(0, wide.shape[1], 32):
        total = total + wide[:, k : k + 32] @ matrix[:, k : k + 32].T
        _, exponent = np.frexp(total)
        total = np.trunc(np.ldexp(total, 14 - exponent)) * np.ldexp(1.0, exponent - 14)
    return total.astype(right(x, weight, out_dtype=out_dtype).dtype)


@mutant("linear", seen="an activation kernel that writes BF16 by dropping the low 16 bits: results lean towards zero")
def truncated_output(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    return truncated(right(x, weight, out_dtype=be.wide_dtype)) if out_dtype == "bfloat16" else y


@mutant("rms_norm", seen="the same in the norm's store")
def truncated_norm(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    if be.numerics != "native":
        return right(x, weight, eps=eps) * x.dtype.type(1 - 2.0**-20)
    wide = x.astype(np.float64)
    y = wide / np.sqrt((wide * wide).mean(1, keepdims=True) + eps)
    return truncated(y if weight is None else y * weight.astype(np.float64))


@mutant("grouped_linear", seen="wo_a is FP8 like its neighbours, but its activation is not quantised")
def wo_a_quantised(be: Any, right: Op, x: Host, weight: Any) -> Any:
    flat = x.reshape(-1, x.shape[-1])
    codes, scale = be.act_quant(flat, block=128)
    y = decode(codes, "e4m3") * np.repeat(E8M0_VALUES[scale], 128, axis=1)
    return right(y.astype(x.dtype).reshape(x.shape), weight)


@mutant("hadamard", seen="the transform without its dim^-0.5; the FP4 scale that follows hides it")
def hadamard_not_normalised(be: Any, right: Op, x: Host) -> Any:
    return right(x) * x.dtype.type(2)


@mutant("logits", "linear", seen="logits returned in the activations' format: ties at the top")
def wide_results_in_bf16(be: Any, right: Op, x: Host, weight: Any, **kw: Any) -> Any:
    y = right(x, weight, **kw)
    return y.astype(BFLOAT16).astype(y.dtype)
