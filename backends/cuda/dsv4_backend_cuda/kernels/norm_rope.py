"""RMS norm of rows and RoPE on their last channels, in one launch: queries, key/value rows, compressed rows."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import parts
from dsv4_backend_cuda.kernels.quant import qdq
from dsv4_backend_cuda.kernels.tiles import in_order
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2
from dsv4_core.contract.dtypes import KV_BLOCK


@triton.jit(do_not_specialize=["rows", "heads", "pieces"])
def norm_rope_kernel(
    x, weight, positions, freqs, y, grid, rows, heads, pieces, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WEIGHTED: tl.constexpr, GROUP: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS whole rows, ``heads`` of them a token. What is turned is the norm's result as it would be handed on, in BF16. ``x`` may come in
    ``pieces``, whose sum is rounded first.

    GROUP: unless 0, beside it the row with its plain channels, whole groups, on the FP8 grid.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
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


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor, freqs: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``ops/norm.py: rms_norm_rope`` for ``x`` [tokens, heads, dim]; the number of pairs is a power of two. Of key/value rows (a weight, one head)
    also what ``act_qdq`` makes of the result, E4M3 in groups of KV_BLOCK up to the turned channels, where those are whole groups.
    """
    tokens, heads, dim = x.shape
    x, y = parts(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, plain = tokens * heads, dim - 2 * freqs.shape[0]
    grid = torch.empty_like(y) if weight is not None and heads == 1 and plain > 0 and plain % KV_BLOCK == 0 else None
    options = launch.options("norm_rope", x)
    norm_rope_kernel[(cdiv(rows, options["ROWS"]),)](
        x, x if weight is None else weight, positions, freqs, y, y if grid is None else grid, rows, heads, x.shape[0], eps,
        DIM=dim, BLOCK=next_power_of_2(dim), HALF=freqs.shape[0], WEIGHTED=weight is not None,
        GROUP=0 if grid is None else KV_BLOCK, NATIVE=launch.native_fp8(x), **options,
    )  # fmt: skip
    return y, grid


SPECS = (
    KernelSpec(
        name="norm_rope",
        kernel=norm_rope_kernel,
        signature={"x": "*bf16", "weight": "*bf16", "positions": "*i32", "freqs": "*fp32", "y": "*bf16", "grid": "*bf16", "rows": "i32", "heads": "i32", "pieces": "i32", "eps": "fp32"},
        variants={
            "query": {"DIM": 512, "BLOCK": 512, "HALF": 32, "WEIGHTED": False, "GROUP": 0},
            "row": {"DIM": 512, "BLOCK": 512, "HALF": 32, "WEIGHTED": True, "GROUP": 64},
            "index": {"DIM": 128, "BLOCK": 128, "HALF": 32, "WEIGHTED": True, "GROUP": 64},
        },
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        looped=False,
        work=lambda c: Work(bytes=(6.0 if c["GROUP"] else 4.0) * c["ROWS"] * c["DIM"]),
    ),
)
