"""How a tensor that is stored in another dtype is read as the published one: never with loss, never
by guessing.

A reading is exact for every value (a wider dtype, the same bytes under another name), or it is
checked value by value when the tensor is read, and refused where it is not exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4_core.contract.dtypes import BFLOAT16

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from dsv4_core.contract.dtypes import Host


class ReadingError(ValueError):
    """Values that the published dtype cannot hold: how many, and the first one."""


class Reading(NamedTuple):
    """``what`` says it to people; ``same_bytes``: only the name of the dtype differs."""

    what: str
    convert: Callable[[Host], Host]
    same_bytes: bool = False


def _widened(dtype: np.dtype[np.generic] | type[np.generic]) -> Callable[[Host], Host]:
    return lambda array: array.astype(dtype)


def _narrowed_to(dtype: npt.DTypeLike, name: str) -> Callable[[Host], Host]:
    def narrowed(array: Host) -> Host:
        with np.errstate(over="ignore"):  # what does not fit is found by the comparison
            narrow = array.astype(dtype)
        same = (narrow.astype(array.dtype) == array) | np.isnan(array)
        if not same.all():
            lost = np.argwhere(~same)
            first = tuple(int(i) for i in lost[0])
            raise ReadingError(
                f"{len(lost)} of {array.size} values are no {name} numbers (first: {array[first]!s} at {list(first)})"
            )
        return narrow

    return narrowed


def exponents(array: Host) -> Host:
    """Give the E8M0 bytes of float scales; raise ``ReadingError`` where one is no power of two from
    2^-127 to 2^127.
    """
    values = np.asarray(array, np.float64)
    mantissa, exponent = np.frexp(values)
    exact = (mantissa == 0.5) & (exponent >= -126) & (exponent <= 128)
    if not exact.all():
        lost = np.argwhere(~exact)
        first = tuple(int(i) for i in lost[0])
        raise ReadingError(
            f"{len(lost)} of {array.size} scales are no powers of two (first: {values[first]:g} at {list(first)})"
        )
    return (exponent + 126).astype(np.uint8)  # mantissa 0.5: the value is 2^(exponent - 1), the byte its exponent + 127


def _unchanged(array: Host) -> Host:
    return array


SQUEEZED = Reading("dimensions of 1 that the published have not", _unchanged, same_bytes=True)
COLUMN = Reading("scales as a column [out, 1]", _unchanged, same_bytes=True)
"""Of int8 weights."""
READINGS: dict[tuple[str, str], Reading] = {
    ("F32", "BF16"): Reading("BF16 widened to F32", _widened(np.float32)),
    ("F32", "F16"): Reading("F16 widened to F32", _widened(np.float32)),
    ("BF16", "F32"): Reading("F32 whose every value is a BF16 number", _narrowed_to(BFLOAT16, "BF16")),
    ("F32", "F64"): Reading("F64 whose every value is an F32 number", _narrowed_to(np.float32, "F32")),
    ("BF16", "F64"): Reading("F64 whose every value is a BF16 number", _narrowed_to(BFLOAT16, "BF16")),
    ("BF16", "F16"): Reading("F16 whose every value is a BF16 number", _narrowed_to(BFLOAT16, "BF16")),
    **{
        ("I64", dtype): Reading(f"{dtype} widened to I64", _widened(np.int64))
        for dtype in ("I32", "I16", "I8", "U32", "U16", "U8")
    },
    ("F8_E8M0", "U8"): Reading("U8 that holds E8M0 bytes", _unchanged, same_bytes=True),
    ("F8_E8M0", "F32"): Reading("F32 scales that are powers of two", exponents),
    ("F8_E8M0", "BF16"): Reading("BF16 scales that are powers of two", exponents),
    ("I8", "U8"): Reading("U8 that holds packed FP4", _unchanged, same_bytes=True),
}
"""By (published dtype, stored dtype)."""
