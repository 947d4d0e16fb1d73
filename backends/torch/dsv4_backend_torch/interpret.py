"""Triton's interpreter with BF16 and FP8 arithmetic that is right, for backends whose kernels are
Triton's.

Out of the box the interpreter adds, multiplies and contracts BF16 and FP8 as raw integers,
truncates float32 to BF16 and rounds float32 to E4M3 wrongly on ties, subnormals and overflow. The
replacements here widen to float32, compute, and round once to nearest even, FP8 saturating: what
the emitted ``cvt.rn.satfinite.e4m3x2.f32`` does. They hook into Triton's internals, so only
versions that the exhaustive tests ran on are accepted.
"""

import functools
import os
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import ml_dtypes
import numpy as np

from dsv4_backend_torch import lockstep, playback

TESTED_TRITON = ("3.9.0",)

_active = False


class InterpreterError(RuntimeError):
    """The interpreter cannot be used here, or does not compute what the hardware computes."""


def active() -> bool:
    """Whether this process runs kernels in the repaired interpreter."""
    return _active


def activate() -> None:
    """Make every kernel imported from now on run in the repaired interpreter, on CPU tensors.

    Raises ``InterpreterError`` for a Triton version without proof, if Triton was imported before,
    or if the quick self-check fails.
    """
    global _active  # noqa: PLW0603 - mirrors Triton's own process-wide switch
    if _active:
        return
    found = version("triton")
    if found not in TESTED_TRITON:
        raise InterpreterError(
            f"triton {found}: the interpreter repair is proven for {', '.join(TESTED_TRITON)} only; "
            f"install triton=={TESTED_TRITON[-1]}, or run tests/cuda/test_interpret.py on {found} and add it to TESTED_TRITON"
        )
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise InterpreterError(
            "triton was imported before the interpreter was chosen, so its kernels are already compiled functions; "
            "call dsv4_backend_torch.interpret.activate() first, or start with TRITON_INTERPRET=1"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    _repair()
    self_check()
    _active = True


@functools.cache
def _small_types() -> dict[Any, Any]:
    import triton.language as tl

    return {
        tl.bfloat16: ml_dtypes.bfloat16,
        tl.float8e4nv: ml_dtypes.float8_e4m3fn,
        tl.float8e5: ml_dtypes.float8_e5m2,
    }


def widen(data: np.ndarray, dtype: Any, to: Any = np.float32) -> np.ndarray:
    """Bits of a small float -> ``to``, a wider one; anything else as it is."""
    small = _small_types().get(dtype.scalar)
    if small is None or data.dtype.kind == "f":
        return data
    return np.ascontiguousarray(data).view(small).reshape(data.shape).astype(to)


def narrow(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Floats -> the bits of a small float, to nearest even, FP8 clamped to its largest finite
    value.
    """
    small = _small_types()[dtype.scalar]
    wide = np.asarray(data)
    values = wide.astype(np.float32)
    if wide.dtype == np.float64:  # round to odd first, so that two roundings give what one would
        bits = values.view(np.uint32)
        inexact = (values != wide) & np.isfinite(wide) & np.isfinite(values) & (bits & 1 == 0)
        toward = np.where(wide > values, np.float32(np.inf), np.float32(-np.inf))
        values = np.where(inexact, np.nextafter(values, toward), values)
    if small is not ml_dtypes.bfloat16:
        top = np.float32(ml_dtypes.finfo(small).max)
        values = np.clip(values, -top, top)
    out = values.astype(small).view(np.uint16 if small is ml_dtypes.bfloat16 else np.uint8)
    if small is ml_dtypes.bfloat16:
        return np.where(np.isnan(values), np.uint16(0x7FFF), out)  # the one NaN that cvt.rn.bf16.f32 writes
    return np.where(np.isnan(values), np.uint8(0x7F), out)


def _tf32(data: np.ndarray) -> np.ndarray:
    """float32 as a TF32 tensor core reads it when nothing rounded it before: low 13 bits
    dropped.
    """
    return (np.ascontiguousarray(data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _single_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray | None:
    """X * y + z of float32, rounded once, where y are powers of two, as scales are, and no product
    leaves float32's normal numbers. None elsewhere; then one element at a time has to do it.
    """
    own = y[tuple(slice(None) if step else slice(1) for step in y.strides)]  # what was broadcast, once
    if (own.view(np.uint32) & np.uint32(0x007FFFFF)).any():
        return None
    product = x * y
    size = np.abs(product)
    limits = np.finfo(np.float32)
    held = (size >= limits.tiny) & (size <= limits.max) | (x == 0) | (y == 0)
    return product + z if held.all() else None


def _exact_fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """X * y + z of small floats in float64, rounded to odd: correct after any later rounding to 8
    bits or fewer.
    """
    product = x.astype(np.float64) * y.astype(np.float64)  # exact: 16 bits
    other = z.astype(np.float64)
    total = product + other
    back = total - product
    error = (product - (total - back)) + (other - back)
    even = total.view(np.int64) & 1 == 0
    nudge = np.isfinite(total) & (error != 0) & even
    return np.where(nudge, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def _repair() -> None:
    """Replace the interpreter's arithmetic on small floats."""
    import triton.language as tl
    from triton.runtime import interpreter as it

    builder, handle = it.InterpreterBuilder, it.TensorHandle
    small = _small_types()

    def is_small(dtype: Any) -> bool:
        return not dtype.is_ptr() and dtype in small  # a pointer type has no hash

    plain: dict[str, Callable[..., Any]] = {
        n: getattr(builder, n) for n in ("cast_impl", "binary_op", "unary_op", "ternary_op", "create_fma", "create_dot")
    }

    def rewrap(result: np.ndarray, dtype: Any) -> Any:
        """A result computed in float32, back in ``dtype``; comparisons give booleans, which
        stay.
        """
        return handle(result, tl.int1) if result.dtype == np.bool_ else handle(narrow(result, dtype), dtype)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source not in small and target not in small:
            return plain["cast_impl"](self, src, dst_type)
        data = widen(src.data, source)
        return handle(narrow(data, target) if target in small else data.astype(it._get_np_dtype(target)), target)

    def casting(_: Any, src: Any, dst_type: Any, *__: Any) -> Callable[..., np.ndarray] | None:
        source, target = src.dtype.scalar, dst_type.scalar
        if target in small:
            return lambda a: narrow(widen(a, source), target)
        kind = it._get_np_dtype(target)
        return (lambda a: widen(a, source).astype(kind, copy=False)) if source in small else None

    @playback.on_arrays(casting)
    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        return self.cast_impl(src, dst_type)

    @playback.on_arrays(casting)
    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode not in (None, it._ir.ROUNDING_MODE.RTNE):
            raise InterpreterError(f"rounding mode {rounding_mode} is not repaired; use the default, to nearest even")
        return self.cast_impl(src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        dtype = lhs.dtype.scalar
        if not is_small(dtype) or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            result = plain["binary_op"](self, lhs, rhs, op)
            return (
                handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result
            )  # a comparison's type is not its operands'
        return rewrap(op(widen(lhs.data, dtype), widen(rhs.data, rhs.dtype)), dtype)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        dtype = arg.dtype.scalar
        return rewrap(op(widen(arg.data, dtype)), dtype) if dtype in small else plain["unary_op"](self, arg, op)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        dtype = other.dtype.scalar
        if op is np.where or not is_small(dtype):  # a selection moves bits
            return plain["ternary_op"](self, lhs, rhs, other, op)
        return rewrap(op(*(widen(h.data, h.dtype) for h in (lhs, rhs, other))), dtype)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        dtype = z.dtype.scalar
        if dtype not in small:
            single = _single_fma(x.data, y.data, z.data) if dtype == tl.float32 else None
            return plain["create_fma"](self, x, y, z) if single is None else handle(single, dtype)
        return handle(narrow(_exact_fma(*(widen(h.data, h.dtype) for h in (x, y, z))), dtype), dtype)

    def rsqrt(self: Any, arg: Any) -> Any:
        data = widen(arg.data, arg.dtype)
        result = (1 / np.sqrt(data.astype(np.float64))).astype(data.dtype)
        return handle(narrow(result, arg.dtype) if arg.dtype.scalar in small else result, arg.dtype.scalar)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if not a.dtype.is_floating():
            return plain["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)
        # of small floats the sum of products is exact in float64: its order, which BLAS picks by
        # shape, does not matter
        kind = np.float64 if a.dtype.scalar in small else np.float32
        left, right = (widen(h.data, h.dtype, kind) for h in (a, b))
        if a.dtype.scalar == tl.float32 and input_precision == it._ir.INPUT_PRECISION.TF32:
            left, right = _tf32(left), _tf32(right)
        total = np.matmul(left, right, dtype=np.promote_types(left.dtype, np.float32)) + widen(d.data, d.dtype)
        out = d.dtype.scalar
        return handle(narrow(total, out) if out in small else total.astype(d.data.dtype), out)

    def widened(function: Callable[..., Any]) -> Callable[..., Any]:
        """A reduction or scan over small floats: combined and rounded in float32, as Triton
        promotes before summing.
        """

        @functools.wraps(function)
        def run(self: Any, arg: Any, *how: Any) -> Any:
            dtype = arg.dtype.scalar
            if dtype not in small:
                return function(self, arg, *how)
            return rewrap(function(self, handle(widen(arg.data, dtype), tl.float32), *how).data, dtype)

        return run

    def scaled_values(value: Any) -> np.ndarray:
        if value.dtype == tl.uint8:
            return it._e2m1_to_f32(value.data)
        return widen(value.data, value.dtype).astype(np.float32)

    for name, function in {
        "cast_impl": cast_impl, "create_fp_to_fp": fp_to_fp, "binary_op": binary_op, "unary_op": unary_op,
        "ternary_op": ternary_op, "create_fma": fma, "create_rsqrt": rsqrt, "create_dot": dot,
        "create_fp_ext": cast, "create_fp_trunc": cast,
    }.items():  # fmt: skip
        setattr(builder, name, function)
    _patch_once(it)
    lockstep.install(it)
    for name in ("create_reduce", "create_scan"):
        setattr(builder, name, widened(getattr(builder, name)))
    playback.watch(it)
    it._mxfp_value_handle_to_float32 = scaled_values


def _patch_once(it: Any) -> None:
    """Put the interpreted functions into Triton's modules once, not at each call of each device
    function: a third of the time.
    """
    import triton.language as tl

    def both() -> None:
        """Stand for a kernel that sees all of the language; only its globals are looked at."""

    it._patch_lang(types.FunctionType(both.__code__, {"tl": tl, "core": tl.core}))
    it._patch_lang = lambda _: it._LangPatchScope()
    plain, known = it._get_np_dtype, {}

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.is_ptr():
            return np.dtype(np.uint64)
        if scalar.name not in known:
            known[scalar.name] = plain(scalar)
        return known[scalar.name]

    it._get_np_dtype = np_dtype


def decode_table(name: str) -> np.ndarray:
    """Values of the non-negative finite codes of a format, from its definition and nothing else, as
    float64.
    """
    mantissa, bias, codes = {"bfloat16": (7, 127, 0x7F80), "float8_e4m3fn": (3, 7, 0x7F), "float8_e5m2": (2, 15, 0x7C)}[
        name
    ]
    code = np.arange(codes, dtype=np.int64)
    exponent, fraction = code >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
    return np.where(exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, exponent - bias))


@np.errstate(all="ignore")
def self_check() -> None:
    """Compare the repaired conversions with tables made from the formats' definitions;
    milliseconds, every code.
    """
    import triton.language as tl
    from triton.runtime import interpreter as it

    b = it.interpreter_builder
    for dtype, name in ((tl.bfloat16, "bfloat16"), (tl.float8e4nv, "float8_e4m3fn"), (tl.float8e5, "float8_e5m2")):
        table = decode_table(name)
        width = np.uint16 if name == "bfloat16" else np.uint8
        codes = np.arange(len(table)).astype(width)
        wide = b.create_fp_ext(it.TensorHandle(codes, dtype), tl.float32).data
        if not np.array_equal(wide, table.astype(np.float32)):
            raise InterpreterError(f"self-check: {name} decodes wrongly; the interpreter's results mean nothing")
        tie = ((table[:-1] + table[1:]) / 2).astype(np.float32)  # exact: one bit more than the format
        even = codes[:-1] + (codes[:-1] & 1)
        for source, expected in (
            (table.astype(np.float32), codes),
            (tie, even),
            (np.nextafter(tie, np.float32(0)), codes[:-1]),
            (np.nextafter(tie, np.float32(np.inf)), codes[1:]),
        ):
            sign = width(1 << (8 * np.dtype(width).itemsize - 1))
            for signed, code in ((source, expected), (-source, expected | sign)):
                got = b.create_fp_to_fp(it.TensorHandle(signed, tl.float32), dtype, None).data
                if not np.array_equal(got, code):
                    raise InterpreterError(
                        f"self-check: float32 to {name} rounds wrongly; the interpreter's results mean nothing"
                    )
    one = it.TensorHandle(np.full((4, 4), 0x3FC0, np.uint16), tl.bfloat16)  # 1.5
    zero = it.TensorHandle(np.zeros((4, 4), np.float32), tl.float32)
    if not np.all(b.create_dot(one, one, zero, None, 0).data == 9.0) or not np.all(
        b.create_fadd(one, one).data == 0x4040
    ):
        raise InterpreterError("self-check: BF16 arithmetic is wrong; the interpreter's results mean nothing")
