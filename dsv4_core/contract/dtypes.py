"""Number formats: names, rounding, power-of-two scales, packed FP4 and block-scaled weights.

A dtype is a name, ml_dtypes' own (``"bfloat16"``, ``"float8_e4m3fn"`` ...), because every library
has an object of its own for each and old ones lack some. Quantised data is *bytes*: E4M3 codes,
E8M0 scales and packed pairs of E2M1 are ``uint8`` arrays, and the contract that takes them says
which they are.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Sequence

Format = Literal["e4m3", "e2m1", "int8"]
"""Of quantised weights: the published FP8 and FP4, and W8A8, which `dsv4 convert --to w8a8-int8`
makes.
"""
Host = npt.NDArray[Any]
"""An array in host memory: what core computes addresses and tables with, before a backend takes it
over.
"""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMAT_MAX: dict[Format, float] = {"e4m3": 448.0, "e2m1": 6.0}
AMAX_FLOOR: dict[Format, float] = {"e4m3": 1e-4, "e2m1": 6 * 2.0**-126}  # the published kernels' own
FP8_BLOCK = 128  # an FP8 weight has one scale per 128 x 128 block; an activation one per 128 channels
FP4_GROUP = 32  # an FP4 weight has one scale per 32 channels of a row
INT8_MAX = 127.0  # W8A8 is symmetric: -128 is not used
WEIGHT_DTYPES: dict[Format, str] = {"e4m3": "float8_e4m3fn@128x128", "e2m1": "float4_e2m1fn@1x32", "int8": "int8@1xin"}
"""Names of quantised weights' dtypes: codes and the grid of their scales."""
KV_BLOCK = 64  # key/value rows are quantised in blocks of 64 channels

E4M3_VALUES: npt.NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E8M0_VALUES: npt.NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
E2M1_VALUES: npt.NDArray[np.float32] = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)
E2M1_PAIRS: npt.NDArray[np.float32] = np.stack([np.tile(E2M1_VALUES, 16), np.repeat(E2M1_VALUES, 16)], axis=1)
"""Values of both nibbles of a byte, the low nibble (the even column) first: [256, 2]."""


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """Give NumPy's dtype object for a dtype name; raise ``ValueError`` for a name that neither
    NumPy nor ml_dtypes knows.
    """
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ValueError(
            f"dtype {name!r} is unknown to NumPy and ml_dtypes; names are those of ml_dtypes, e.g. 'bfloat16'"
        ) from None


def dtype_name(array: Any) -> str:
    """Name the dtype of any library's array: ``torch.bfloat16`` and ml_dtypes' ``bfloat16`` are
    both ``"bfloat16"``.
    """
    return str(array.dtype).removeprefix("torch.")


def power_of_two_scale(amax: Host, fmt: Format) -> npt.NDArray[np.uint8]:
    """Give the E8M0 byte of the smallest power of two s with ``amax / s <= max`` of the format,
    from float32 bits.

    ``s = 2 ** ceil(log2(amax * float32(1 / max)))``: the biased exponent, plus one where any
    mantissa bit is set. ``amax`` is raised to the format's floor first. Source: the published
    quantisation kernels' rounding of scales.
    """
    amax32 = np.maximum(amax.astype(np.float32), np.float32(AMAX_FLOOR[fmt]))
    bits = (amax32 * np.float32(1 / FORMAT_MAX[fmt])).view(np.uint32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).astype(np.uint8)


def encode(x: Host, fmt: Format) -> npt.NDArray[np.uint8]:
    """Clamp to the format's largest value and round to nearest even: one code a byte (FP4
    unpacked).

    NaN stays NaN in E4M3.
    """
    if x.dtype == np.float64:  # ml_dtypes casts by way of float32, which would round twice
        x = round_to_grid(x, fmt)
    top = np.asarray(FORMAT_MAX[fmt], x.dtype)
    kind = ml_dtypes.float8_e4m3fn if fmt == "e4m3" else ml_dtypes.float4_e2m1fn
    return np.clip(x, -top, top).astype(kind).view(np.uint8)


def round_to_grid(x: Host, fmt: Format) -> Host:
    """``decode(encode(x))`` in ``x``'s own dtype (float32 or float64), by arithmetic alone: clamp,
    then to nearest even on the format's grid.
    """
    top = x.dtype.type(FORMAT_MAX[fmt])
    mantissa, smallest = (3, 2.0**-6) if fmt == "e4m3" else (1, 1.0)  # bits; least normal number
    y = np.clip(x, -top, top)
    _, exponent = np.frexp(np.maximum(np.abs(y), x.dtype.type(smallest)))
    unit = np.ldexp(x.dtype.type(1), exponent - 1 - mantissa)
    return np.rint(y / unit) * unit


def decode(codes: Host, fmt: Format) -> npt.NDArray[np.float32]:
    """Values of codes, one a byte, in float32."""
    return np.take(E4M3_VALUES if fmt == "e4m3" else E2M1_VALUES, codes)


def pack_fp4(codes: Host) -> npt.NDArray[np.uint8]:
    """Pack E2M1 codes [..., n] two a byte [..., n / 2], the even column in the low nibble."""
    return ((codes[..., 0::2] & 0xF) | (codes[..., 1::2] << 4)).astype(np.uint8)


@functools.cache
def _two_bytes(fmt: Format) -> Host:
    """Values of every pair of bytes, as one element of 8 (two E4M3) or 16 bytes (four E2M1): halves
    the look-ups.
    """
    one = E4M3_VALUES[:, None] if fmt == "e4m3" else E2M1_PAIRS
    both = np.concatenate(
        [np.tile(one, (256, 1)), np.repeat(one, 256, axis=0)], axis=1
    )  # little-endian: the first byte is the low one
    return np.ascontiguousarray(both).view(np.uint64 if fmt == "e4m3" else np.complex128)[:, 0]


def unpack(stored: Host, fmt: Format) -> npt.NDArray[np.float32]:
    """Values [..., n] in float32 of codes as they are stored: E4M3 one a byte [..., n], E2M1 two a
    byte [..., n / 2].
    """
    if stored.shape[-1] % 2 or sys.byteorder != "little":
        return decode(stored, fmt) if fmt == "e4m3" else E2M1_PAIRS[stored].reshape(*stored.shape[:-1], -1)
    return np.take(_two_bytes(fmt), np.ascontiguousarray(stored).view(np.uint16)).view(np.float32)


@dataclass(frozen=True)
class ScaledArray:
    """A quantised weight, packed as in the checkpoint: codes and their scales.

    ``data``: uint8, E4M3 codes [..., out, in] or E2M1 pairs [..., out, in / 2]; int8 [..., out,
    in]. ``scale``: uint8 E8M0, [..., ceil(out / 128), ceil(in / 128)] for E4M3, [..., out, in / 32]
    for E2M1; float32 [..., out], one per output channel, for int8. Either may be any backend's
    array.
    """

    data: Any
    scale: Any
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, [..., out, in]."""
        *lead, last = tuple(self.data.shape)
        return (*lead, last * 2 if self.format == "e2m1" else last)

    @property
    def dtype(self) -> str:
        """As ``WEIGHT_DTYPES`` names it."""
        return WEIGHT_DTYPES[self.format]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return int(np.prod(self.data.shape)) + int(np.prod(self.scale.shape)) * (4 if self.format == "int8" else 1)

    def __getitem__(self, index: int) -> ScaledArray:
        """One expert of a stack."""
        return ScaledArray(self.data[index], self.scale[index], self.format)

    def rows(self, start: int, stop: int) -> ScaledArray:
        """Rows ``start .. stop - 1`` of [out, in]; ``start`` is a multiple of the scale grid's
        height.
        """
        height = FP8_BLOCK if self.format == "e4m3" else 1
        return ScaledArray(self.data[start:stop], self.scale[start // height : -(-stop // height)], self.format)

    def dequantise(self, dtype: str = "float32") -> Host:
        """Multiply codes by scales, exactly (a product of two powers-of-two grids; int8: rounded to
        ``dtype``): [out, in]. Host arrays only.
        """
        out, cols = self.shape
        if self.format == "int8":
            wide = numpy_dtype(dtype)
            return np.multiply(self.data, self.scale[:, None].astype(wide), dtype=wide)
        values = unpack(self.data, self.format).astype(numpy_dtype(dtype), copy=False)
        scale = E8M0_VALUES[self.scale].astype(values.dtype, copy=False)
        if self.format == "e2m1":
            return np.multiply(values, np.repeat(scale, FP4_GROUP, axis=1), out=values)
        for row in range(0, out, FP8_BLOCK):  # over scale rows: 1/128 of the rows
            values[row : row + FP8_BLOCK] *= np.repeat(scale[row // FP8_BLOCK], FP8_BLOCK)[:cols]
        return values


def quantise_weight(weight: Host, fmt: Format) -> ScaledArray:
    """Quantise [out, in] (in a multiple of 32) in the checkpoint's own grids: FP8 in 128 x 128
    blocks, FP4 in groups of 32.
    """
    out, cols = weight.shape
    wide = weight.astype(np.float32)
    if fmt == "e2m1":
        groups = wide.reshape(out, cols // FP4_GROUP, FP4_GROUP)
        scale = power_of_two_scale(np.abs(groups).max(-1), fmt)
        codes = encode(groups / E8M0_VALUES[scale][..., None], fmt)
        return ScaledArray(pack_fp4(codes.reshape(out, cols)), scale, fmt)
    rows, columns = -(-out // FP8_BLOCK), -(-cols // FP8_BLOCK)
    padded = np.pad(wide, ((0, rows * FP8_BLOCK - out), (0, columns * FP8_BLOCK - cols)))
    blocks = padded.reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
    scale = power_of_two_scale(np.abs(blocks).max((1, 3)), fmt)
    codes = encode(blocks / E8M0_VALUES[scale][:, None, :, None], fmt).reshape(padded.shape)
    return ScaledArray(np.ascontiguousarray(codes[:out, :cols]), scale, fmt)


def quantise_int8(weight: Host) -> ScaledArray:
    """Quantise [out, in] to int8, symmetric, one scale per output channel: lossy.

    A scale is the least BF16 number at or above ``max |row| / 127`` (1 for a row of zeros), stored
    as float32: kernels that return BF16 take their scales in BF16, and so nobody rounds them again.
    """
    wide = weight.astype(np.float32)
    least = np.abs(wide).max(1) / np.float32(INT8_MAX)
    scale = ((least.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    scale = np.where(least > 0, scale, np.float32(1))
    return ScaledArray(np.rint(wide / scale[:, None]).astype(np.int8), scale, "int8")


def quantise_tokens(x: Host) -> tuple[Host, npt.NDArray[np.float32]]:
    """Activations of W8A8, [tokens, in]: whole numbers in float32 and a scale per token, ``max
    |row| / 127`` (1 for zeros).

    Both divisions in float32 and the quotient to nearest even, whatever the mode: a value at half a
    step has to fall the same way everywhere.
    """
    wide = x.astype(np.float32)
    scale = np.abs(wide).max(1, initial=0) / np.float32(INT8_MAX)
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(wide / scale[:, None]), -INT8_MAX, INT8_MAX), scale


@functools.cache
def format_of(dtype: str) -> Format | None:
    """Give the format of a weight's dtype name; None for a plain one."""
    return next((fmt for fmt, name in WEIGHT_DTYPES.items() if name == dtype), None)


class Experts:
    """The weights of one projection of all routed experts: item e is expert e's [out, in], read
    when it is first used.
    """

    def __init__(self, experts: Sequence[Any]) -> None:
        self.experts = experts

    @functools.cached_property
    def shape(self) -> tuple[int, int, int]:
        """[experts, out, in]."""
        out, cols = self.experts[0].shape
        return (len(self.experts), out, cols)

    @functools.cached_property
    def dtype(self) -> str:
        """The dtype of each expert's weight, as ``ScaledArray.dtype`` or an array's dtype name."""
        return dtype_name(self.experts[0])

    def __getitem__(self, index: int) -> Any:
        return self.experts[index]


@dataclass(frozen=True)
class RowLayout:
    """How a row is stored in the cache.

    ``kv``: key/value row of ``dim`` channels, the last ``rope_dim`` as BF16, the others as E4M3 in
    blocks of 64: codes, then E8M0 scales padded to 8 bytes, then the BF16 channels. ``key``:
    indexer key of ``dim`` channels: E2M1 pairs, then one E8M0 scale per 32. ``plain``: the array's
    own dtype, nothing packed (exact modes, and the compressor's float32 state). ``run``: an index
    of ``cached_index_topk`` names a sequence's rows in runs of so many neighbours, each from a
    multiple of it and the last one perhaps cut short, so that keys may be read where they lie; 1
    says nothing.
    """

    kind: Literal["kv", "key", "plain"]
    dim: int
    rope_dim: int = 0
    run: int = 1

    @property
    def width(self) -> int:
        """Elements of a stored row: bytes if packed, ``dim`` if plain. 584 for kv 512/64, 68 for a
        key of 128.
        """
        if self.kind == "plain":
            return self.dim
        if self.kind == "key":
            return self.dim // 2 + self.dim // FP4_GROUP
        blocks = -(-(self.dim - self.rope_dim) // KV_BLOCK)
        return (self.dim - self.rope_dim) + 8 * -(-blocks // 8) + 2 * self.rope_dim
