"""What the repaired interpreter must compute, checked against ml_dtypes and torch: every value, tie
and neighbour.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl

SMALL = {
    "bfloat16": (torch.bfloat16, ml_dtypes.bfloat16, np.uint16),
    "float8_e4m3fn": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, np.uint8),
    "float8_e5m2": (torch.float8_e5m2, ml_dtypes.float8_e5m2, np.uint8),
}
RANDOM = 400_000
BLOCK = 1 << 16


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def arithmetic_kernel(a, b, c, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z = tl.load(a + i, mask=i < n), tl.load(b + i, mask=i < n), tl.load(c + i, mask=i < n)
    tl.store(out + i, x + y, mask=i < n)
    tl.store(out + n + i, x - y, mask=i < n)
    tl.store(out + 2 * n + i, x * y, mask=i < n)
    tl.store(out + 3 * n + i, tl.fma(x, y, z), mask=i < n)
    tl.store(out + 4 * n + i, tl.maximum(x, y), mask=i < n)
    tl.store(out + 5 * n + i, tl.where(x < y, -x, tl.abs(y)), mask=i < n)
    tl.store(out + 6 * n + i, (x / y).to(out.dtype.element_ty), mask=i < n)
    tl.store(out + 7 * n + i, tl.clamp(x, y, z), mask=i < n)


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def dot_scaled_kernel(a, sa, b, sb, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[None, :] * K + k[:, None])
    scale_x = tl.load(sa + m[:, None] * (K // 32) + g[None, :])
    scale_y = tl.load(sb + n[:, None] * (K // 32) + g[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot_scaled(x, scale_x, "e4m3", y, scale_y, "e4m3"))


@triton.jit
def reduce_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    block = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(out + m, tl.sum(block.to(tl.float32), axis=1))
    tl.store(out + M + m, tl.max(block, axis=1).to(tl.float32))
    tl.store(out + 2 * M + m, tl.min(block, axis=1).to(tl.float32))
    tl.store(out + 3 * M + m, tl.sum(block, axis=1).to(tl.float32))


def bits(array: np.ndarray) -> np.ndarray:
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def as_torch(codes: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(codes.view({1: np.uint8, 2: np.int16, 4: np.int32}[codes.dtype.itemsize])).view(dtype)


def as_numpy(tensor: torch.Tensor, dtype: type) -> np.ndarray:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy().view(dtype)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(len(x), BLOCK),)](x, y, len(x), BLOCK=BLOCK)
    return y


def saturate(x: np.ndarray, name: str) -> np.ndarray:
    kind = SMALL[name][1]
    top = np.float32(np.inf) if name == "bfloat16" else np.float32(ml_dtypes.finfo(kind).max)
    with np.errstate(all="ignore"):
        return np.clip(x, -top, top).astype(kind)


def same(got: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Equal bits, any NaN being as good as another."""
    nan = np.isnan(got.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    wrong = (bits(got) != bits(expected)) & ~nan
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} differ, first {got[wrong][:3]} for {expected[wrong][:3]}"
    )


def interesting_float32(name: str) -> np.ndarray:
    """Every finite value of the format, every tie, one ulp to either side, overflow, infinities,
    NaN, random bits.
    """
    _, kind, width = SMALL[name]
    values = np.arange(1 << (8 * np.dtype(width).itemsize)).astype(width).view(kind).astype(np.float32)
    values = np.sort(values[np.isfinite(values)]).astype(np.float64)
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    grid = np.concatenate([values.astype(np.float32), ties])
    top = values[-1] + (values[-1] - values[-2]) / 2  # the first number that rounds up to what does not exist
    edges = np.array([np.inf, np.nan, top, min(values[-1] * 1.01, 3.4e38), 3.4e38, 1e-45, 1e-40, 0.0], np.float32)
    random = np.random.default_rng(0).integers(0, 1 << 32, RANDOM, dtype=np.uint64).astype(np.uint32).view(np.float32)
    up, down = np.nextafter(grid, np.float32(np.inf)), np.nextafter(grid, np.float32(-np.inf))
    return np.concatenate([grid, up, down, edges, -edges, random])


def every_code_widens() -> None:
    for name, (dtype, kind, width) in SMALL.items():
        codes = np.arange(1 << (8 * np.dtype(width).itemsize)).astype(width)
        got = cast(as_torch(codes, dtype), torch.float32).numpy()
        same(got, codes.view(kind).astype(np.float32), f"{name} to float32, ml_dtypes")
        same(got, as_torch(codes, dtype).float().numpy(), f"{name} to float32, torch")


def every_tie_and_neighbour_rounds() -> None:
    for name, (dtype, kind, _) in SMALL.items():
        x = interesting_float32(name)
        got = as_numpy(cast(torch.from_numpy(x), dtype), kind)
        same(got, saturate(x, name), f"float32 to {name}, ml_dtypes")
        limit = torch.finfo(dtype).max if name != "bfloat16" else torch.inf
        same(got, as_numpy(torch.from_numpy(x).clamp(-limit, limit).to(dtype), kind), f"float32 to {name}, torch")


def small_formats_convert_into_each_other() -> None:
    for source, (from_dtype, from_kind, width) in SMALL.items():
        codes = np.arange(1 << (8 * np.dtype(width).itemsize)).astype(width)
        for target, (to_dtype, to_kind, _) in SMALL.items():
            if source != target:
                got = as_numpy(cast(as_torch(codes, from_dtype), to_dtype), to_kind)
                same(got, saturate(codes.view(from_kind).astype(np.float32), target), f"{source} to {target}")


def float64_rounds_once() -> None:
    one_and_a_bit = np.array(
        [1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 - 2.0**-40, 1 + 2.0**-8, -(1 + 3 * 2.0**-8 - 2.0**-45)]
    )
    got = as_numpy(cast(torch.from_numpy(one_and_a_bit), torch.bfloat16), ml_dtypes.bfloat16).astype(np.float64)
    assert got.tolist() == [1 + 2.0**-7, 1, 1, -(1 + 2.0**-7)]


def arithmetic_rounds_once() -> None:
    rng = np.random.default_rng(1)
    dtype, kind, _ = SMALL["bfloat16"]
    special = np.array([0, 0x8000, 0x3F80, 0x7F80, 0xFF80, 0x7FC0, 1, 0x7F7F, 0x0080], np.uint16)
    pairs = np.stack([a.ravel() for a in np.meshgrid(special, special, special)])
    near = (0x3F80 + rng.integers(-600, 600, (3, 100_000))).astype(np.uint16) | (
        rng.integers(0, 2, (3, 100_000)) << 15
    ).astype(np.uint16)
    a, b, c = np.concatenate([pairs, rng.integers(0, 1 << 16, (3, 100_000)).astype(np.uint16), near], axis=1)
    n = len(a)
    out = torch.empty(8, n, dtype=dtype)
    arithmetic_kernel[(triton.cdiv(n, BLOCK),)](
        *(as_torch(np.ascontiguousarray(v), dtype) for v in (a, b, c)), out, n, BLOCK=BLOCK
    )
    got = as_numpy(out, kind)
    with np.errstate(all="ignore"):
        x, y, z = (v.view(kind).astype(np.float64) for v in (a, b, c))
        product = x * y  # exact: 8 x 8 bits
        total = product.astype(np.longdouble) + z.astype(
            np.longdouble
        )  # 64 bits: a tie of 9 bits cannot be made by rounding unless far apart
        close = (np.abs(z) < np.abs(product) * 2.0**45) & (np.abs(product) < np.abs(z) * 2.0**45)
        expected = {0: x + y, 1: x - y, 2: product, 4: np.fmax(x, y), 5: np.where(x < y, -x, np.abs(y)), 6: x / y}
        expected[7] = np.fmin(np.fmax(x, y), z)
        for row, exact in expected.items():
            finite = (
                slice(None)
                if row not in (4, 7)
                else ~(np.isnan(x) | np.isnan(y) | np.isnan(z) | (x == 0) | (y == 0) | (z == 0))
            )
            same(got[row][finite], exact.astype(np.float32).astype(kind)[finite], f"bfloat16 arithmetic, row {row}")
        low = total.astype(np.float32)
        odd = (low != total) & np.isfinite(low) & (low.view(np.uint32) & 1 == 0)
        low = np.where(odd, np.nextafter(low, np.where(total > low, np.float32(np.inf), np.float32(-np.inf))), low)
        same(got[3][close], low.astype(kind)[close], "bfloat16 fma")


def dots_are_sums_of_exact_products() -> None:
    rng = np.random.default_rng(2)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16):
        a = torch.from_numpy(rng.standard_normal((16, 64)).astype(np.float32)).to(dtype)
        b = torch.from_numpy(rng.standard_normal((64, 32)).astype(np.float32)).to(dtype)
        out = torch.empty(16, 32)
        dot_kernel[(1,)](a, b, out, M=16, N=32, K=64, PRECISION="tf32")
        torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    a, b = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((16, 64), (64, 32)))
    exact = a.double() @ b.double()
    errors = {}
    for precision in ("ieee", "tf32"):
        out = torch.empty(16, 32)
        dot_kernel[(1,)](a, b, out, M=16, N=32, K=64, PRECISION=precision)
        errors[precision] = (out.double() - exact).abs().max().item()
    assert errors["ieee"] < 1e-5
    assert 1e-4 < errors["tf32"] < 5e-2, f"a TF32 product has 10 bits of mantissa; error {errors['tf32']}"


def scaled_dots_apply_e8m0() -> None:
    rng = np.random.default_rng(3)
    a = torch.from_numpy(rng.standard_normal((16, 64)).astype(np.float32)).to(torch.float8_e4m3fn)
    b = torch.from_numpy(rng.standard_normal((32, 64)).astype(np.float32)).to(torch.float8_e4m3fn)
    a.view(torch.uint8)[0, 0] = 0x01  # a subnormal
    sa, sb = (torch.from_numpy(rng.integers(115, 140, (n, 2)).astype(np.uint8)) for n in (16, 32))
    out = torch.empty(16, 32)
    dot_scaled_kernel[(1,)](a, sa, b, sb, out, M=16, N=32, K=64)
    wide_a, wide_b = (x.double() * torch.exp2(s.double() - 127).repeat_interleave(32, 1) for x, s in ((a, sa), (b, sb)))
    torch.testing.assert_close(out.double(), wide_a @ wide_b.T, rtol=1e-4, atol=1e-4)


def reductions_widen() -> None:
    x = torch.from_numpy(np.random.default_rng(4).standard_normal((8, 2048)).astype(np.float32)).to(torch.bfloat16)
    x[0] = 1  # in BF16 steps this sums to 256
    out = torch.empty(4, 8)
    reduce_kernel[(1,)](x, out, M=8, N=2048)
    wide = x.double()
    torch.testing.assert_close(out[0].double(), wide.sum(1), rtol=1e-5, atol=1e-3)
    assert torch.equal(out[1].double(), wide.max(1).values)
    assert torch.equal(out[2].double(), wide.min(1).values)
    torch.testing.assert_close(out[3].double(), wide.sum(1), rtol=2**-8, atol=1e-3)
    assert out[3, 0] == 2048


PROOFS = (
    every_code_widens,
    every_tie_and_neighbour_rounds,
    small_formats_convert_into_each_other,
    float64_rounds_once,
    arithmetic_rounds_once,
    dots_are_sums_of_exact_products,
    scaled_dots_apply_e8m0,
    reductions_widen,
)
