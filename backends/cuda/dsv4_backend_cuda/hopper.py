"""The interpreter with the rounding of sm_90's own units, which are coarser than float32's:
exponentials, quotients, sums of tensor cores.

What is imitated, and from where: ``ex2.approx`` and ``div.full`` err by up to two units in the last
place (the PTX manual; here by a number that follows from the operand's bits, so that a run can be
repeated); an HGMMA adds 16 products of BF16 or FP16 to its sum and cuts the rest below float32 off;
a QGMMA aligns 32 products of FP8 and its sum to the largest of them and keeps 13 bits behind the
point, so that FP8 sums are the coarsest there are (DeepSeek-V3's report, section 3.3.2, measured
it). A model of the units, not a measurement of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dsv4_backend_torch import interpret, playback

FP8_BITS, FP8_STEP, STEP = 13, 32, 16
LOG2_E = np.float32(1.4426950408889634)
WORST = 2
"""Units in the last place."""

_installed = False


def installed() -> bool:
    """Whether this process imitates sm_90."""
    return _installed


def install() -> None:
    """Imitate sm_90 in this process from now on, for good; ``interpret.activate`` came first."""
    global _installed  # noqa: PLW0603 - as the interpreter itself, process-wide
    if _installed:
        return
    import triton.language as tl
    from triton.runtime import interpreter as it

    builder, handle = it.InterpreterBuilder, it.TensorHandle
    plain = {name: getattr(builder, name) for name in ("create_exp", "create_exp2", "create_fdiv", "create_dot")}
    eights, halves = (tl.float8e4nv, tl.float8e5), (tl.bfloat16, tl.float16)

    def exp(self: Any, arg: Any) -> Any:
        if arg.dtype.scalar != tl.float32:
            return plain["create_exp"](self, arg)
        with np.errstate(all="ignore"):
            return handle(exp2(arg.data * LOG2_E), tl.float32)

    def exp2_of(self: Any, arg: Any) -> Any:
        if arg.dtype.scalar != tl.float32:
            return plain["create_exp2"](self, arg)
        with np.errstate(all="ignore"):
            return handle(exp2(arg.data), tl.float32)

    def fdiv(self: Any, lhs: Any, rhs: Any) -> Any:
        result = plain["create_fdiv"](self, lhs, rhs)
        if lhs.dtype.scalar != tl.float32:
            return result
        exact = np.frexp(rhs.data)[0]
        return handle(np.where(np.abs(exact) == 0.5, result.data, off(result.data)), tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        kind = a.dtype.scalar
        if kind not in (*eights, *halves) or d.dtype.scalar != tl.float32:
            return plain["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
        left, right = (interpret.widen(h.data, h.dtype).astype(np.float64) for h in (a, b))
        sums = aligned if kind in eights else cut
        with np.errstate(all="ignore"):
            return handle(sums(left, right, d.data), tl.float32)

    for name, function in {"create_exp": exp, "create_exp2": exp2_of, "create_fdiv": fdiv, "create_dot": dot}.items():
        setattr(builder, name, function)
    playback.watch(it)
    playback.forget()
    _installed = True


def off(values: np.ndarray) -> np.ndarray:
    """float32 values up to ``WORST`` units from where they are, by a number that follows from their
    bits; zero, infinity and NaN as they are.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    by = ((bits * np.uint32(2654435761)) >> 16) % np.uint32(2 * WORST + 1)
    moved = (bits.astype(np.int64) + by - WORST).astype(np.uint32).view(np.float32)
    magnitude = np.abs(values)
    return np.where((magnitude > 2.0**-125) & (magnitude < 2.0**127), moved, values)


def exp2(x: np.ndarray) -> np.ndarray:
    """``ex2.approx`` of float32: right for whole numbers."""
    right = np.exp2(x.astype(np.float64)).astype(np.float32)
    return np.where(x == np.trunc(x), right, off(right))


def cut(left: np.ndarray, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """``start + left @ right`` of [..., m, k] and [..., k, n], float32: after every ``STEP``
    products what float32 does not hold is cut off.
    """
    total = start.astype(np.float32)
    for k in range(0, left.shape[-1], STEP):
        wide = np.matmul(left[..., k : k + STEP], right[..., k : k + STEP, :]) + total
        total = toward_zero(wide)
    return total


def toward_zero(wide: np.ndarray) -> np.ndarray:
    """float64 to float32, the rest cut off."""
    near = wide.astype(np.float32)
    past = np.isfinite(near) & (np.abs(near.astype(np.float64)) > np.abs(wide))
    return np.where(past, np.nextafter(near, np.float32(0)), near)


def aligned(left: np.ndarray, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The same of FP8: every ``FP8_STEP`` products and the sum so far are cut to ``FP8_BITS`` bits
    behind the point of the largest, then added.
    """
    total = start.astype(np.float64)
    for k in range(0, left.shape[-1], FP8_STEP):
        some, other = left[..., k : k + FP8_STEP], right[..., k : k + FP8_STEP, :]
        largest = np.abs(total)
        for j in range(some.shape[-1]):
            largest = np.maximum(largest, np.abs(some[..., j, None] * other[..., j, None, :]))
        unit = np.ldexp(1.0, np.frexp(largest)[1] - 1 - FP8_BITS)
        total = np.trunc(total / unit)
        for j in range(some.shape[-1]):
            total = total + np.trunc(some[..., j, None] * other[..., j, None, :] / unit)
        total = total * unit
    return total.astype(np.float32)
