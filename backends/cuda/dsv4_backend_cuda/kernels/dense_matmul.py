"""Linear layers that do not quantise the activation: BF16 weights, and the grouped output projection with FP8 weights taken to BF16."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch, pieces
from dsv4_backend_cuda.kernels.add_pieces import total
from dsv4_backend_cuda.kernels.formats import e8m0_value
from dsv4_backend_cuda.kernels.tiles import of_two
from dsv4_backend_cuda.kernels.words import bf16_of_e4m3
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv

DECODE_TOKENS = 16


@triton.jit(do_not_specialize=["rows", "span"])
def dense_matmul_kernel(
    x, w, w2, ws, y, rows, N, K, span,
    GROUPS: tl.constexpr, FP8: tl.constexpr, TWO: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr = 0,
):  # fmt: skip
    """A program computes BLOCK_N of group program_id(2)'s N outputs for BLOCK_T rows. Weights are the tall operand, as in ``scaled_matmul``. FP8: K is a multiple of 4.

    WORDS: codes are widened in words of four, where a conversion for each takes as long as the products (16 lanes a cycle on sm_90) or does not exist. TWO: one group, two BF16
    weights of N outputs, side by side in a row of ``y``. SPLIT: one group, and program_id(2) is the piece of the sum, ``span`` steps of 128, into ``y``
    [pieces, rows, outputs].
    """
    group, begin, stop = tl.program_id(2), 0, K
    stride = 2 * N if TWO else N * GROUPS
    if SPLIT:
        group, begin = 0, tl.program_id(2) * span * 128
        stop = tl.minimum(begin + span * 128, K)
        y += tl.program_id(2).to(tl.int64) * rows * stride
    tile = tl.program_id(0)
    if TWO:
        tile, w, ws, y = of_two(tile, tl.cdiv(N, BLOCK_N), w, ws, y, w2, ws, N)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live_n, live_t = n < N, row < rows
    out = group * N + n  # row of the weight, column of the result
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    inner = tl.arange(0, 128)
    for k in range(begin, stop, 128):
        live_k = k + inner < K
        narrow = tl.load(x + (row * GROUPS + group)[None, :] * K + k + inner[:, None], mask=live_t[None, :] & live_k[:, None], other=0.0)
        if FP8:
            if WORDS:
                word = k // 4 + tl.arange(0, 32)
                codes = w.to(tl.pointer_type(tl.uint32), bitcast=True) + out.to(tl.int64)[:, None] * (K // 4)
                wide = bf16_of_e4m3(tl.load(codes + word[None, :], mask=live_n[:, None] & (word < K // 4)[None, :], other=0))
            else:
                wide = tl.load(w + out.to(tl.int64)[:, None] * K + k + inner[None, :], mask=live_n[:, None] & live_k[None, :], other=0)
                wide = wide.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
            scale = tl.load(ws + (out // 128) * ((K + 127) // 128) + k // 128, mask=live_n, other=127)
            acc += tl.dot(wide, narrow) * e8m0_value(scale)[:, None]  # a power of two: as exact after the sum as before it
        else:
            wide = tl.load(w + out.to(tl.int64)[:, None] * K + k + inner[None, :], mask=live_n[:, None] & live_k[None, :], other=0)
            acc = tl.dot(wide, narrow, acc)
    at = row[:, None] * stride + out.to(tl.int64)[None, :]
    tl.store(y + at, tl.trans(acc).to(y.dtype.element_ty), mask=live_t[:, None] & live_n[None, :])


def _launch(
    x: torch.Tensor, weights: Sequence[torch.Tensor], scale: torch.Tensor | None, out_dtype: torch.dtype, groups: int, *, split: bool, reader: bool = False
) -> torch.Tensor:
    rows, k = x.shape[0], x.shape[-1]
    first, last = weights[0], weights[-1]
    n = first.shape[0] // groups
    options = launch.options(f"{'grouped_linear' if scale is not None else 'bf16_linear'}_{'decode' if rows <= DECODE_TOKENS else 'prefill'}", x)
    grid = (cdiv(n, options["BLOCK_N"]) * len(weights), cdiv(rows, options["BLOCK_T"]))
    steps = cdiv(k, 128)
    span = pieces.span(grid[0] * grid[1], steps, launch.architecture(str(x.device)), reader=reader) if split else steps
    count = max(cdiv(steps, span), 1)
    y = torch.empty((count, rows, first.shape[0] * len(weights)), dtype=out_dtype if count == 1 else torch.float32, device=x.device)
    dense_matmul_kernel[(*grid, max(groups, count))](
        x, first, last, first if scale is None else scale, y, rows, n, k, span,
        GROUPS=groups, FP8=scale is not None, TWO=len(weights) == 2, SPLIT=count > 1, **options,
    )  # fmt: skip
    return y


def products(x: torch.Tensor, weights: Sequence[torch.Tensor], *, out_dtype: torch.dtype, split: bool, reader: bool = False) -> torch.Tensor:
    """``linear`` with one weight, or two of a shape, as [pieces, tokens, outputs]: one piece, or several in float32 to be added up (``scaled_matmul.products``)."""
    return _launch(x, weights, None, out_dtype, 1, split=split, reader=reader)


def linear(x: torch.Tensor, *weights: torch.Tensor, out_dtype: torch.dtype, split: bool = False) -> torch.Tensor:
    """``ops/matmul.py: linear`` for a BF16 weight [out, in]: the router, the vocabulary head; for two of a shape their results side by side: a compressor."""
    return total(products(x, weights, out_dtype=out_dtype, split=split), out_dtype)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """``ops/matmul.py: grouped_linear`` for ``x`` [tokens, groups, in] and a weight [out, in], BF16 or E4M3 codes with ``scale``."""
    return _launch(x, [weight], scale, x.dtype, x.shape[1], split=False)[0]


def _specs(name: str, *, fp8: bool, groups: int) -> KernelSpec:
    def work(c: Mapping[str, Any]) -> Work:
        n, t = c["BLOCK_N"], c["BLOCK_T"]
        return Work(bytes=n * 128.0 * (1 if fp8 else 2) * (1 if t <= DECODE_TOKENS else 1 / 8), flops=2.0 * n * t * 128)

    return KernelSpec(
        name=name, kernel=dense_matmul_kernel,
        signature=dict.fromkeys(("w", "w2"), "*u8" if fp8 else "*bf16") | {"x": "*bf16", "ws": "*u8", "y": "*bf16" if fp8 else "*fp32", "rows": "i32", "N": "i32:16", "K": "i32:16", "span": "i32"},
        variants={"flash": {"GROUPS": groups, "FP8": fp8, "TWO": False, "SPLIT": False}}
        | ({} if fp8 else {"split": {"GROUPS": 1, "FP8": False, "TWO": False, "SPLIT": True}, "pair": {"GROUPS": 1, "FP8": False, "TWO": True, "SPLIT": True}}),
        mma={80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC.*MMA", 120: "HMMA"},
        work=work,
    )  # fmt: skip


SPECS = tuple(_specs(f"{base}_{phase}", fp8=fp8, groups=groups) for base, fp8, groups in (("bf16_linear", False, 1), ("grouped_linear", True, 8)) for phase in ("decode", "prefill"))
