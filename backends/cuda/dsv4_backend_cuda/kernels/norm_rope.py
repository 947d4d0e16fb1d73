"""RMS norm of rows and RoPE on their last channels, in one launch: queries and key/value rows, compressed rows."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Normed, parts
from dsv4_backend_cuda.kernels.quant import qdq
from dsv4_backend_cuda.kernels.tiles import in_order
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2
from dsv4_core.contract.dtypes import KV_BLOCK


@triton.jit
def norm_and_turn(
    program, x, weight, positions, freqs, y, grid, rows, heads, pieces, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WEIGHTED: tl.constexpr, GROUP: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, ``heads`` of them a token. What is turned is the norm's result as it would be handed on, in BF16. ``x`` may come in ``pieces``,
    whose sum is rounded first.

    GROUP: unless 0, beside it the row with its plain channels, whole groups, on the FP8 grid.
    """
    row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    present = (row < rows)[:, None]
    PLAIN: tl.constexpr = DIM - 2 * HALF
    column = tl.arange(0, BLOCK)
    at = row[:, None] * DIM + column[None, :]
    stride = tl.cast(rows, tl.int64) * DIM
    wide = in_order(x, at, present & (column < DIM)[None, :], stride, pieces).to(y.dtype.element_ty).to(tl.float32)
    inverse = (1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / DIM + eps))[:, None]
    wide = wide * inverse
    if WEIGHTED:
        wide = wide * tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    plain = present & (column < PLAIN)[None, :]
    tl.store(y + at, wide.to(y.dtype.element_ty), mask=plain)
    if GROUP:
        groups = tl.reshape(wide.to(y.dtype.element_ty).to(tl.float32), (ROWS * (BLOCK // GROUP), GROUP))
        tl.store(grid + at, tl.reshape(qdq(groups, False, NATIVE), (ROWS, BLOCK)).to(y.dtype.element_ty), mask=plain)
    turned = tl.arange(0, 2 * HALF)
    tail_at = row[:, None] * DIM + PLAIN + turned[None, :]
    tail = in_order(x, tail_at, present, stride, pieces).to(y.dtype.element_ty).to(tl.float32) * inverse
    if WEIGHTED:
        tail = tail * tl.load(weight + PLAIN + turned).to(tl.float32)[None, :]
    a, b = tl.split(tl.reshape(tail.to(y.dtype.element_ty).to(tl.float32), (ROWS, HALF, 2)))
    position = tl.load(positions + row // heads, mask=row < rows, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(freqs + tl.arange(0, HALF))[None, :]
    cosine, sine = tl.cos(angle), tl.sin(angle)
    out = tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), (ROWS, 2 * HALF))
    tl.store(y + tail_at, out.to(y.dtype.element_ty), mask=present)
    if GROUP:
        tl.store(grid + tail_at, out.to(y.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["rows", "heads", "pieces", "rows2", "pieces2"])
def norm_rope_kernel(
    x, weight, positions, freqs, y, grid, rows, heads, pieces, x2, weight2, y2, rows2, pieces2, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WEIGHTED: tl.constexpr, GROUP: tl.constexpr, TWO: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS whole rows. TWO: of ``x``, then of ``x2``, one weighted row a token, whose ``grid`` of GROUP channels it is."""
    program = tl.program_id(0)
    if TWO:
        first = tl.cdiv(rows, ROWS)
        if program >= first:
            norm_and_turn(program - first, x2, weight2, positions, freqs, y2, grid, rows2, 1, pieces2, eps, DIM, BLOCK, HALF, True, GROUP, NATIVE, ROWS)
        else:
            norm_and_turn(program, x, weight, positions, freqs, y, grid, rows, heads, pieces, eps, DIM, BLOCK, HALF, WEIGHTED, 0, NATIVE, ROWS)
    else:
        norm_and_turn(program, x, weight, positions, freqs, y, grid, rows, heads, pieces, eps, DIM, BLOCK, HALF, WEIGHTED, GROUP, NATIVE, ROWS)


def norm_rope(x: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor, freqs: torch.Tensor, *, eps: float) -> Normed:
    """``ops/norm.py: rms_norm_rope`` for ``x`` [tokens, heads, dim], to be made; the number of pairs is a power of two. Of key/value rows (a weight, one
    head) also what ``act_qdq`` makes of the result, E4M3 in groups of KV_BLOCK up to the turned channels, where those are whole groups.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plain = x.shape[2] - 2 * freqs.shape[0]
    grid = torch.empty_like(y) if weight is not None and x.shape[1] == 1 and plain > 0 and plain % KV_BLOCK == 0 else None
    return Normed(y, make, x, weight, positions, freqs, eps, grid, plain)


def make(of: Normed, other: Normed | None = None) -> None:
    """Put the rows into their room, and into ``other``'s its rows of key/values, which ``of`` goes with."""
    (tokens, heads, dim), options, half = of.x.shape, launch.options("norm_rope", of.room), of.freqs.shape[0]
    x, rows, second, grid = parts(of.x), tokens * heads, other or of, of.grid if other is None else other.grid
    x2, rows2 = (x, 0) if other is None else (parts(other.x), other.x.shape[0])
    norm_rope_kernel[(cdiv(rows, options["ROWS"]) + cdiv(rows2, options["ROWS"]),)](
        x, x if of.weight is None else of.weight, of.positions, of.freqs, of.room, of.room if grid is None else grid, rows, heads, x.shape[0],
        x2, x2 if second.weight is None else second.weight, second.room, rows2, x2.shape[0], of.eps,
        DIM=dim, BLOCK=next_power_of_2(dim), HALF=half, WEIGHTED=of.weight is not None, GROUP=0 if grid is None else KV_BLOCK, TWO=other is not None,
        NATIVE=launch.native_fp8(of.room), **options,
    )  # fmt: skip


def together(of: Normed, other: Normed) -> bool:
    """Whether ``other`` are key/value rows of the same tokens, of the same form, so that one launch makes both."""
    same = of.x.shape[0] == other.x.shape[0] and of.x.shape[2] == other.x.shape[2] and of.x.dtype == other.x.dtype and of.eps == other.eps
    addresses = of.positions.data_ptr() == other.positions.data_ptr() and of.freqs.data_ptr() == other.freqs.data_ptr()
    return same and addresses and of.freqs.shape == other.freqs.shape and of.grid is None and other.grid is not None


SPECS = (
    KernelSpec(
        name="norm_rope",
        kernel=norm_rope_kernel,
        signature={"x": "*bf16", "weight": "*bf16", "positions": "*i32", "freqs": "*fp32", "y": "*bf16", "grid": "*bf16", "rows": "i32", "heads": "i32", "pieces": "i32",
                   "x2": "*fp32", "weight2": "*bf16", "y2": "*bf16", "rows2": "i32", "pieces2": "i32", "eps": "fp32"},
        variants={
            "query": {"DIM": 512, "BLOCK": 512, "HALF": 32, "WEIGHTED": False, "GROUP": 0, "TWO": False},
            "row": {"DIM": 512, "BLOCK": 512, "HALF": 32, "WEIGHTED": True, "GROUP": 64, "TWO": False},
            "both": {"DIM": 512, "BLOCK": 512, "HALF": 32, "WEIGHTED": False, "GROUP": 64, "TWO": True},
            "index": {"DIM": 128, "BLOCK": 128, "HALF": 32, "WEIGHTED": True, "GROUP": 64, "TWO": False},
        },
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        looped=False,
        work=lambda c: Work(bytes=(6.0 if c["GROUP"] else 4.0) * c["ROWS"] * c["DIM"]),
    ),
)
