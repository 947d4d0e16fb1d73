"""Activation quantisation to FP8, quantise-dequantise on the FP8 and FP4 grids, and the Hadamard rotation before FP4."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Normed, Rotated, Turned, awaited, waiting
from dsv4_backend_cuda.kernels.formats import (
    e2m1_encode,
    e2m1_value,
    e4m3_value,
    e8m0_of,
    e8m0_reciprocal,
    e8m0_value,
    quantise_e4m3,
)
from dsv4_backend_cuda.kernels.words import paired_place
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv


@triton.jit(do_not_specialize=["groups"])
def act_quant_kernel(x, codes, scales, groups, GROUP: tl.constexpr, PAIRED: tl.constexpr, NATIVE: tl.constexpr, GROUPS: tl.constexpr):
    """A program takes GROUPS groups of GROUP channels, wherever in the rows they lie: a row is a whole number of groups. PAIRED: codes as ``words.paired_place``."""
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    channel = tl.arange(0, GROUP)
    inside = (group < groups)[:, None]
    wide = tl.load(x + group[:, None] * GROUP + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    code, exponent = quantise_e4m3(tl.reshape(wide, (GROUPS, 1, GROUP)), NATIVE)
    place = paired_place(channel) if PAIRED else channel
    tl.store(codes + group[:, None] * GROUP + place[None, :], tl.reshape(code, (GROUPS, GROUP)), mask=inside)
    tl.store(scales + group, tl.reshape(exponent, (GROUPS,)).to(tl.uint8), mask=group < groups)


@triton.jit
def qdq(wide, FP4: tl.constexpr, NATIVE: tl.constexpr):
    """float32 [groups, channels] -> the nearest values on the format's grid, float32."""
    amax = tl.max(tl.abs(wide), axis=1)
    if FP4:
        exponent = e8m0_of(tl.maximum(amax, 6 * 2.0**-126), 1.0 / 6.0)
        wide = wide * e8m0_reciprocal(exponent)[:, None]
        value = tl.where(wide != wide, wide, e2m1_value(e2m1_encode(wide)))  # the format has no NaN, the result has
    else:
        code, exponents = quantise_e4m3(wide[:, None, :], NATIVE)
        exponent = tl.reshape(exponents, (wide.shape[0],))
        value = e4m3_value(tl.reshape(code, wide.shape), NATIVE)
    return value * e8m0_value(exponent)[:, None]


@triton.jit(do_not_specialize=["groups"])
def act_qdq_kernel(
    x, y, groups, DIM: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, FP4: tl.constexpr, NATIVE: tl.constexpr, GROUPS: tl.constexpr
):
    """As ``act_quant_kernel``, over all groups of a row of DIM channels; groups from CHANNELS on are copied."""
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    per_row: tl.constexpr = (DIM + GROUP - 1) // GROUP
    column = (group % per_row)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = (group // per_row)[:, None] * DIM + column
    inside = (group < groups)[:, None] & (column < DIM)
    raw = tl.load(x + at, mask=inside, other=0.0)
    rounded = qdq(raw.to(tl.float32), FP4, NATIVE).to(y.dtype.element_ty)
    tl.store(y + at, tl.where(column < CHANNELS, rounded, raw), mask=inside)


@triton.jit
def hadamard_signs(DIM: tl.constexpr):
    """The +-1 matrix [DIM, DIM], BF16, made in registers: where bits of row and column share an odd number of ones, -1."""
    i = tl.arange(0, DIM)
    odd = i[:, None] & i[None, :]
    odd ^= odd >> 8
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (1 - 2 * (odd & 1)).to(tl.bfloat16)


@triton.jit
def turn_within(value, other, positions, freqs, token, inside, turned, DIM: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr):
    """Rows [rows, DIM] with the ``turned`` of their channels, the last 2 HALF, rotated as ``rope.turn`` does; ``other``: each channel's partner."""
    i = tl.arange(0, DIM)
    position = tl.load(positions + token, mask=tl.reshape(inside, token.shape), other=0).to(tl.float32)
    angle = position[:, None] * tl.load(freqs + (i - (DIM - 2 * HALF)) // 2, mask=i >= DIM - 2 * HALF, other=0.0)[None, :]
    if INVERSE:
        angle = -angle
    across = other.to(tl.float32) * tl.sin(angle)
    both = value.to(tl.float32) * tl.cos(angle) + tl.where(((i & 1) == 0)[None, :], -across, across)
    return tl.where(turned, both.to(value.dtype), value)


@triton.jit(do_not_specialize=["rows", "heads"])
def hadamard_kernel(
    x, positions, freqs, y, grid, rows, heads,
    DIM: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, QUANTISE: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotation as a product with the +-1 matrix, whose entries are made in registers; beside it, if asked, the result on the FP4 grid in groups of 32.

    HALF: pairs of channels at the end that are turned first, as ``rope_kernel`` does, and rounded; rows are ``heads`` of a token.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    i = tl.arange(0, DIM)
    at = row[:, None] * DIM + i[None, :]
    inside = (row < rows)[:, None]
    value = tl.load(x + at, mask=inside, other=0.0)
    if HALF:
        turned = (i >= DIM - 2 * HALF)[None, :]
        other = tl.load(x + row[:, None] * DIM + (i ^ 1)[None, :], mask=inside & turned, other=0.0)
        value = turn_within(value, other, positions, freqs, row // heads, inside, turned, DIM, HALF, INVERSE)
    rotated = (tl.dot(value, hadamard_signs(DIM)) * NORM).to(y.dtype.element_ty)
    tl.store(y + at, rotated, mask=inside)
    if QUANTISE:
        rounded = qdq(tl.reshape(rotated.to(tl.float32), (ROWS * DIM // 32, 32)), True, True)
        tl.store(grid + at, tl.reshape(rounded, (ROWS, DIM)).to(y.dtype.element_ty), mask=inside)


def act_quant(x: torch.Tensor, *, block: int, paired: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """``ops/quant.py: act_quant`` for contiguous ``x`` [tokens, dim] and a power-of-two ``block``. ``paired``: codes in the order of ``words.paired_place``."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty((x.shape[0], x.shape[1] // block), dtype=torch.uint8, device=x.device)
    options = launch.options("act_quant", x)
    groups = scales.numel()
    act_quant_kernel[(cdiv(groups, options["GROUPS"]),)](x, codes, scales, groups, GROUP=block, PAIRED=paired, NATIVE=launch.native_fp8(x), **options)
    return codes, scales


def act_qdq(x: torch.Tensor, *, format: str, block: int, channels: int) -> torch.Tensor:
    """``ops/quant.py: act_qdq`` for contiguous ``x`` [tokens, dim] and a power-of-two ``block``."""
    y = torch.empty_like(x)
    options = launch.options("act_qdq", x)
    groups = x.shape[0] * cdiv(x.shape[1], block)
    act_qdq_kernel[(cdiv(groups, options["GROUPS"]),)](
        x, y, groups, DIM=x.shape[1], CHANNELS=channels, GROUP=block, FP4=format == "e2m1", NATIVE=launch.native_fp8(x), **options
    )
    return y


def hadamard(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``ops/quant.py: hadamard`` for BF16 ``x`` [tokens, dim], dim a power of two from 16 to 256; and the same rounded by ``act_qdq`` to E2M1 in groups of
    32, where rows are whole groups. Heads that wait for RoPE are turned on the way; rows that wait for norm and RoPE go on waiting, for who packs them.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if (rows := awaited(x, Normed, rows=True)) and rows.weight is not None and rows.x.shape[1] == 1 and x.shape[1] % 32 == 0:
        return waiting(y, Rotated(y, _rotate, rows)), None
    grid = torch.empty_like(y) if x.shape[1] % 32 == 0 else None
    _hadamard(x, y, grid)
    return y, grid


def _rotate(of: Rotated) -> None:
    of.of.made()
    _hadamard(of.of.room.reshape(of.room.shape), of.room, None)


def _hadamard(x: torch.Tensor, y: torch.Tensor, grid: torch.Tensor | None) -> None:
    of = awaited(x, Turned, rows=True)
    (rows, dim), x = x.shape, x.contiguous() if of is None else of.x
    positions, freqs, heads, half = (x, x, 1, 0) if of is None else (of.positions, of.freqs, of.x.shape[1], of.freqs.shape[0])
    options = launch.options("hadamard", x)
    hadamard_kernel[(cdiv(rows, options["ROWS"]),)](
        x, positions, freqs, y, y if grid is None else grid, rows, heads, DIM=dim, HALF=half, INVERSE=of is not None and of.inverse,
        QUANTISE=grid is not None, NORM=dim**-0.5, **options,
    )  # fmt: skip


SPECS = (
    KernelSpec(
        name="act_quant",
        kernel=act_quant_kernel,
        signature={"x": "*bf16", "codes": "*u8", "scales": "*u8", "groups": "i32"},
        variants={"block128": {"GROUP": 128, "PAIRED": False}, "paired": {"GROUP": 128, "PAIRED": True}},
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        looped=False,
        work=lambda c: Work(bytes=c["GROUPS"] * (3.0 * c["GROUP"] + 1)),
    ),
    KernelSpec(
        name="act_qdq",
        kernel=act_qdq_kernel,
        signature={"x": "*bf16", "y": "*bf16", "groups": "i32"},
        variants={
            "kv": {"DIM": 512, "CHANNELS": 448, "GROUP": 64, "FP4": False},
            "index": {"DIM": 128, "CHANNELS": 128, "GROUP": 32, "FP4": True},
        },
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        looped=False,
        work=lambda c: Work(bytes=4.0 * c["GROUPS"] * c["GROUP"]),
    ),
    KernelSpec(
        name="hadamard",
        kernel=hadamard_kernel,
        signature={"x": "*bf16", "positions": "*i32", "freqs": "*fp32", "y": "*bf16", "grid": "*bf16", "rows": "i32", "heads": "i32"},
        variants={
            "index": {"DIM": 128, "HALF": 0, "INVERSE": False, "QUANTISE": True, "NORM": 128**-0.5},
            "turned": {"DIM": 128, "HALF": 32, "INVERSE": False, "QUANTISE": True, "NORM": 128**-0.5},
        },
        mma={80: "HMMA", 89: "HMMA", 90: "HGMMA|HMMA", 100: "UTC.*MMA|HMMA", 120: "HMMA"},
        looped=False,
        work=lambda c: Work(bytes=6.0 * c["ROWS"] * c["DIM"], flops=2.0 * c["ROWS"] * c["DIM"] ** 2),
    ),
)
