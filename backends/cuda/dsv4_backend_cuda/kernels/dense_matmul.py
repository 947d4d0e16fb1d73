"""Linear layers that do not quantise the activation: BF16 weights, and the grouped output projection with FP8 weights taken to BF16."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch, pieces
from dsv4_backend_cuda.kernels.add_pieces import in_pieces, total
from dsv4_backend_cuda.kernels.formats import e8m0_value
from dsv4_backend_cuda.kernels.scaled_matmul import side_by_side
from dsv4_backend_cuda.kernels.tiles import following
from dsv4_backend_cuda.kernels.words import bf16_of_e4m3
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv

DECODE_TOKENS = 16


@triton.jit
def dense_tile(
    tile, part, group, piece,
    x, w, w2, w3, w4, w5, ws, y, y2, y3, y4, y5, rows, N, N2, N3, N4, N5, stride, stride2, stride3, stride4, stride5, K, span,
    GROUPS: tl.constexpr, FP8: tl.constexpr, WEIGHTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK_N of a ``group``'s N outputs, the ``tile``-th, for BLOCK_T rows, the ``part``-th. Weights are the tall operand, as in ``scaled_tile``. FP8: K is a multiple of 4.

    WORDS: codes are widened in words of four, where a conversion for each takes as long as the products (16 lanes a cycle on sm_90) or does not exist. ``stride``: from a row of
    ``y`` to the next. WEIGHTS: one group, so many BF16 weights, each with its outputs and its ``y``. SPLIT: one group, and that ``piece`` of the sum, ``span``
    steps of 128, into ``y`` [pieces, rows, stride].
    """
    begin, stop = 0, K
    if WEIGHTS > 1:
        tile, w, ws, y, N, stride = following(tile, tl.cdiv(N, BLOCK_N), w, ws, y, N, stride, w2, ws, y2, N2, stride2)
    if WEIGHTS > 2:
        tile, w, ws, y, N, stride = following(tile, tl.cdiv(N, BLOCK_N), w, ws, y, N, stride, w3, ws, y3, N3, stride3)
    if WEIGHTS > 3:
        tile, w, ws, y, N, stride = following(tile, tl.cdiv(N, BLOCK_N), w, ws, y, N, stride, w4, ws, y4, N4, stride4)
    if WEIGHTS > 4:
        tile, w, ws, y, N, stride = following(tile, tl.cdiv(N, BLOCK_N), w, ws, y, N, stride, w5, ws, y5, N5, stride5)
    if SPLIT:
        begin = piece * span * 128
        stop = tl.minimum(begin + span * 128, K)
        y += tl.cast(piece, tl.int64) * rows * stride
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = (part * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
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


@triton.jit(do_not_specialize=["rows", "span"])
def dense_matmul_kernel(
    x, w, w2, w3, w4, w5, ws, y, y2, y3, y4, y5, rows, N, N2, N3, N4, N5, stride, stride2, stride3, stride4, stride5, K, span,
    GROUPS: tl.constexpr, FP8: tl.constexpr, WEIGHTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr = 0,
):  # fmt: skip
    """A program computes a ``dense_tile``."""
    piece = tl.program_id(2)
    dense_tile(
        tl.program_id(0), tl.program_id(1), 0 if SPLIT else piece, piece, x, w, w2, w3, w4, w5, ws, y, y2, y3, y4, y5, rows, N, N2, N3, N4, N5,
        stride, stride2, stride3, stride4, stride5, K, span, GROUPS, FP8, WEIGHTS, SPLIT, BLOCK_N, BLOCK_T, WORDS,
    )  # fmt: skip


TOGETHER = 5
"""Weights that one launch can take."""


def shared_out(
    kernel: str, x: torch.Tensor, outputs: Sequence[int], *, split: bool, reader: bool = False
) -> tuple[dict[str, Any], int, int]:
    """The tile for products with so many outputs each, the span that a program sums, and how many pieces those are."""
    rows, steps = x.shape[0], cdiv(x.shape[-1], 128)
    options = launch.options(f"{kernel}_{'decode' if rows <= DECODE_TOKENS else 'prefill'}", x)
    programs = sum(cdiv(n, options["BLOCK_N"]) for n in outputs) * cdiv(rows, options["BLOCK_T"])
    span = pieces.span(programs, steps, launch.architecture(str(x.device)), reader=reader) if split else steps
    return options, span, max(cdiv(steps, span), 1)


def filled(values: Sequence[Any]) -> Sequence[Any]:
    """As many as the kernel has arguments."""
    return [*values, *[values[-1]] * (TOGETHER - len(values))]


def _launch(
    x: torch.Tensor, weights: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], scale: torch.Tensor | None, *, groups: int, span: int, options: dict[str, Any]
) -> None:
    """Products with up to TOGETHER weights, each into its columns [pieces, rows, outputs]; with ``groups`` one, whose rows of groups these are."""
    rows, k, count, outputs = x.shape[0], x.shape[-1], ys[0].shape[0], [w.shape[0] // groups for w in weights]
    grid = (sum(cdiv(n, options["BLOCK_N"]) for n in outputs), cdiv(rows, options["BLOCK_T"]), max(groups, count))
    dense_matmul_kernel[grid](
        x, *filled(weights), weights[0] if scale is None else scale, *filled(ys), rows, *filled(outputs), *filled([y.stride(1) for y in ys]), k, span,
        GROUPS=groups, FP8=scale is not None, WEIGHTS=len(weights), SPLIT=count > 1, **options,
    )  # fmt: skip


def products(x: torch.Tensor, weights: Sequence[torch.Tensor], *, out_dtype: torch.dtype, split: bool, reader: bool = False) -> torch.Tensor:
    """``linear`` with one weight, or two of a shape, as [pieces, tokens, outputs]: one piece, or several in float32 to be added up (``scaled_matmul.products``)."""
    outputs = [w.shape[0] for w in weights]
    options, span, count = shared_out("bf16_linear", x, outputs, split=split, reader=reader)
    y = torch.empty((count, x.shape[0], sum(outputs)), dtype=out_dtype if count == 1 else torch.float32, device=x.device)
    _launch(x, weights, side_by_side(y, len(weights)), None, groups=1, span=span, options=options)
    return y


def columns(weights: Sequence[Sequence[torch.Tensor]], ys: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each weight's outputs in the results of weights and pairs of them."""
    return [part for pair, y in zip(weights, ys, strict=True) for part in side_by_side(y, len(pair))]


def together(x: torch.Tensor, weights: Sequence[Sequence[torch.Tensor]], rooms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Products of one input with weights, or pairs of them side by side: each in its room [tokens, outputs], or several pieces for the readers."""
    options, span, count = shared_out("bf16_linear", x, [w.shape[0] for pair in weights for w in pair], split=True)
    ys = in_pieces(rooms, count)
    _launch(x, [w for pair in weights for w in pair], columns(weights, ys), None, groups=1, span=span, options=options)
    return ys


def linear(x: torch.Tensor, *weights: torch.Tensor, out_dtype: torch.dtype, split: bool = False) -> torch.Tensor:
    """``ops/matmul.py: linear`` for a BF16 weight [out, in]: the router, the vocabulary head; for two of a shape their results side by side: a compressor."""
    return total(products(x, weights, out_dtype=out_dtype, split=split), out_dtype)


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """``ops/matmul.py: grouped_linear`` for ``x`` [tokens, groups, in] and a weight [out, in], BF16 or E4M3 codes with ``scale``."""
    kernel = "bf16_linear" if scale is None else "grouped_linear"
    options, span, _ = shared_out(kernel, x, [weight.shape[0] // x.shape[1]], split=False)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x, [weight], [y[None]], scale, groups=x.shape[1], span=span, options=options)
    return y


def _specs(name: str, *, fp8: bool, groups: int) -> KernelSpec:
    def work(c: Mapping[str, Any]) -> Work:
        n, t = c["BLOCK_N"], c["BLOCK_T"]
        return Work(bytes=n * 128.0 * (1 if fp8 else 2) * (1 if t <= DECODE_TOKENS else 1 / 8), flops=2.0 * n * t * 128)

    kinds = {"w": "*u8" if fp8 else "*bf16", "y": "*bf16" if fp8 else "*fp32", "N": "i32:16", "stride": "i32:16"}
    return KernelSpec(
        name=name, kernel=dense_matmul_kernel,
        signature={"x": "*bf16", "ws": "*u8", "rows": "i32", "K": "i32:16", "span": "i32"}
        | {f"{arg}{i}": kind for arg, kind in kinds.items() for i in ("", 2, 3, 4, 5)},
        variants={"flash": {"GROUPS": groups, "FP8": fp8, "WEIGHTS": 1, "SPLIT": False}}
        | ({} if fp8 else {name: {"GROUPS": 1, "FP8": False, "WEIGHTS": count, "SPLIT": True} for name, count in (("split", 1), ("pair", 2), ("five", 5))}),
        mma={80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC.*MMA", 120: "HMMA"},
        work=work,
    )  # fmt: skip


SPECS = tuple(_specs(f"{base}_{phase}", fp8=fp8, groups=groups) for base, fp8, groups in (("bf16_linear", False, 1), ("grouped_linear", True, 8)) for phase in ("decode", "prefill"))
