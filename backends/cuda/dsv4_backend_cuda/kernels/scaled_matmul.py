"""Linear layers with quantised weights: FP8 activations x FP8 (128 x 128 blocks) or FP4 (1 x 32) weights, dense and per expert.

Weights are the tall operand of the tensor-core product and tokens the wide one, so that one token wastes no more than 15 columns and a token's sum is
taken in the same order in every tile: the result's bits do not depend on the batch, unless a launch of few programs is split (``split``). K is walked in
steps of 128, an activation's scale block.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch, pieces
from dsv4_backend_cuda.kernels.add_pieces import in_pieces, total
from dsv4_backend_cuda.kernels.formats import e8m0_value
from dsv4_backend_cuda.kernels.fp4_matmul import fp4_matmul_kernel
from dsv4_backend_cuda.kernels.tiles import following, locate
from dsv4_backend_cuda.kernels.words import half_of_e4m3
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2

DECODE_TOKENS = 16  # up to here one narrow tile holds all tokens (of an expert)
MIDDLE_TOKENS = 128  # up to here a tile of few tokens keeps more multiprocessors busy than a wide one whose sum cannot be cut


@triton.jit
def scaled_tile(
    tile, part, piece, x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N2, stride, stride2, K, span,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, FP4: tl.constexpr, MMA: tl.constexpr, TWO: tl.constexpr, TOPK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs, the ``tile``-th, of BLOCK_T rows, the ``part``-th. EXPERTS 0: one dense weight. MMA: "half", "fp8" or "scaled" (block-scaled).

    ``stride``: from a row of ``y`` to the next. TWO: a second weight of N2 outputs, into ``y2``. TOPK > 0: row t is of token order[t] // TOPK. SPLIT: that
    ``piece`` of the sum, ``span`` blocks of 128, into ``y`` [pieces, rows, stride].
    """
    # One weight scale a program: a block of 128 outputs must hold all of the program's, or all but the first 128 are scaled by a neighbour's scale.
    tl.static_assert(FP4 or MMA == "scaled" or BLOCK_N <= 128, "BLOCK_N: a program reads one scale of 128 outputs")
    if TWO:
        tile, w, ws, y, N, stride = following(tile, tl.cdiv(N, BLOCK_N), w, ws, y, N, stride, w2, ws2, y2, N2, stride2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, first, end = 0, part * BLOCK_T, rows
    if EXPERTS > 0:
        expert, first, end = locate(part, offsets, rows, EXPERTS, SLOTS, BLOCK_T)
    t = first + tl.arange(0, BLOCK_T)
    live_t, live_n = t < end, n < N
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    row, column = t.to(tl.int64), n.to(tl.int64)
    source = row
    if TOPK > 0:
        source = (tl.load(order + t, mask=live_t, other=0) // TOPK).to(tl.int64)
    blocks = K // 128
    begin, stop = 0, blocks
    if SPLIT:
        begin = piece * span
        stop = tl.minimum(begin + span, blocks)
        y += tl.cast(piece, tl.int64) * rows * stride
    if expert < EXPERTS or EXPERTS == 0:
        PACK: tl.constexpr = 2 if FP4 else 1
        WORD: tl.constexpr = 4 if MMA == "half" else 1  # codes that a load takes at once
        wide_at = w + tl.cast(expert, tl.int64) * N * (K // PACK)
        narrow_at = x
        if MMA == "half":
            wide_at, narrow_at = wide_at.to(tl.pointer_type(tl.uint32), bitcast=True), x.to(tl.pointer_type(tl.uint32), bitcast=True)
        scales = ws + tl.cast(expert, tl.int64) * (N * (K // 32) if FP4 else ((N + 127) // 128) * blocks)
        inner, packed, group = tl.arange(0, 128 // WORD), tl.arange(0, 128 // (PACK * WORD)), tl.arange(0, 4)
        for block in range(begin, stop):
            wide = tl.load(wide_at + column[:, None] * (K // (PACK * WORD)) + block * (128 // (PACK * WORD)) + packed[None, :], mask=live_n[:, None], other=0)
            narrow = tl.load(narrow_at + source[None, :] * (K // WORD) + block * (128 // WORD) + inner[:, None], mask=live_t[None, :], other=0)
            if MMA == "scaled":
                scale_x = tl.load(xs + source[:, None] * blocks + block + 0 * group[None, :], mask=live_t[:, None], other=127)
                if FP4:
                    scale_w = tl.load(scales + column[:, None] * (K // 32) + block * 4 + group[None, :], mask=live_n[:, None], other=127)
                    acc = tl.dot_scaled(wide, scale_w, "e2m1", narrow, scale_x, "e4m3", acc)
                else:
                    scale_w = tl.load(scales + (column // 128)[:, None] * blocks + block + 0 * group[None, :], mask=live_n[:, None], other=127)
                    acc = tl.dot_scaled(wide, scale_w, "e4m3", narrow, scale_x, "e4m3", acc)
            else:
                scale = e8m0_value(tl.load(xs + source * blocks + block, mask=live_t, other=127))
                scale_w = e8m0_value(tl.load(scales + (tile * BLOCK_N // 128) * blocks + block))
                if MMA == "fp8":
                    product = tl.dot(wide.to(tl.float8e4nv, bitcast=True), narrow.to(tl.float8e4nv, bitcast=True))
                else:
                    product = tl.dot(half_of_e4m3(wide), tl.trans(half_of_e4m3(tl.trans(narrow)))) * 65536.0
                acc += product * (scale * scale_w)[None, :]
    out = tl.trans(acc).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * stride + column[None, :], out, mask=live_t[:, None] & live_n[None, :])


@triton.jit(do_not_specialize=["rows", "span"])
def scaled_matmul_kernel(
    x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N2, stride, stride2, K, span,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, FP4: tl.constexpr, MMA: tl.constexpr, TWO: tl.constexpr, TOPK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A program computes a ``scaled_tile``."""
    scaled_tile(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N2, stride, stride2, K, span,
        EXPERTS, SLOTS, FP4, MMA, TWO, TOPK, SPLIT, BLOCK_N, BLOCK_T,
    )  # fmt: skip


def mma_of(arch: int, *, fp4: bool) -> str:
    """Kind of product: block-scaled where tensor cores have it (of mixed formats, in Triton, on sm_100 only), FP16 where they lack FP8."""
    if arch >= 100 and not (fp4 and arch >= 120):
        return "scaled"
    return "fp8" if arch >= 89 else "half"


Weight = tuple[torch.Tensor, torch.Tensor]
"""Codes [out, in or in / 2] (experts in front of them) and scale bytes, both uint8."""


def paired(device: torch.Tensor, *, fp4: bool) -> bool:
    """Whether a product by such weights wants its activation's codes in the order of ``words.paired_place``."""
    return fp4 and mma_of(launch.architecture(str(device.device)), fp4=True) == "fp8"


def _launch(
    x: Weight, weights: Sequence[Weight], ys: Sequence[torch.Tensor], offsets: torch.Tensor, order: torch.Tensor | None,
    *, experts: int, tiles: int, topk: int, fp4: bool, span: int, options: dict[str, Any],
) -> None:  # fmt: skip
    """Products with one weight or two, each into its columns [pieces, rows, outputs]."""
    (codes, scales), first, last = x, weights[0], weights[-1]
    (count, rows, _), k, outputs = ys[0].shape, codes.shape[1], [w[0].shape[-2] for w in weights]
    grid = (sum(cdiv(n, options["BLOCK_N"]) for n in outputs), tiles, count)
    slots = next_power_of_2(experts + 2) if experts else 1
    mma = mma_of(launch.architecture(str(codes.device)), fp4=fp4)
    sizes = rows, outputs[0], outputs[-1], ys[0].stride(1), ys[-1].stride(1), k, span
    arrays = codes, scales, *first, *last, ys[0], ys[-1], offsets if order is None else order, offsets, *sizes
    how = {"EXPERTS": experts, "SLOTS": slots, "TWO": len(weights) == 2, "TOPK": topk, "SPLIT": count > 1, **options}
    if fp4 and mma != "scaled":
        fp4_matmul_kernel[grid](*arrays, FP8=mma == "fp8", **how)
    else:
        scaled_matmul_kernel[grid](*arrays, FP4=fp4, MMA=mma, **how)


def side_by_side(y: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The columns of ``count`` weights' outputs in ``y`` [pieces, rows, outputs]."""
    return list(y.split(y.shape[2] // count, 2))


def shared_out(
    codes: torch.Tensor, outputs: Sequence[int], *, fp4: bool, split: bool, reader: bool = False
) -> tuple[dict[str, Any], int, int, int]:
    """The tile for products with so many outputs each, its tiles of tokens, the span that a program sums, and how many pieces those are."""
    rows, steps = codes.shape[0], codes.shape[1] // 128
    arch = launch.architecture(str(codes.device))

    def of_phase(phase: str) -> tuple[dict[str, Any], int, int, int]:
        options = launch.options(f"{'fp4_' if fp4 else ''}linear_{phase}", codes)
        tiles = cdiv(rows, options["BLOCK_T"])
        programs = sum(cdiv(n, options["BLOCK_N"]) for n in outputs) * tiles
        span = pieces.span(programs, steps, arch, reader=reader) if split else steps
        return options, tiles, span, max(cdiv(steps, span), 1)

    chosen = of_phase("decode" if rows <= DECODE_TOKENS else "prefill")
    return of_phase("middle") if DECODE_TOKENS < rows <= MIDDLE_TOKENS and chosen[2] == steps and not fp4 else chosen


def products(
    codes: torch.Tensor, scales: torch.Tensor, weights: Sequence[Weight],
    *, out_dtype: torch.dtype, fp4: bool, split: bool, reader: bool = False, room: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Products with one weight or two of a shape [out, in], side by side, as [pieces, tokens, outputs]: one piece in ``out_dtype`` (in ``room``, if given),
    or several in float32 for the reader to add up.

    ``split``: allowed to cut the sum in pieces, where there are too few programs for the multiprocessors; ``reader``: whoever reads it adds them up.
    """
    rows, outputs = codes.shape[0], [w[0].shape[0] for w in weights]
    options, tiles, span, count = shared_out(codes, outputs, fp4=fp4, split=split, reader=reader)
    dtype = out_dtype if count == 1 else torch.float32
    y = torch.empty((count, rows, sum(outputs)), dtype=dtype, device=codes.device) if room is None or count > 1 else room[None]
    _launch((codes, scales), weights, side_by_side(y, len(weights)), scales, None, experts=0, tiles=tiles, topk=0, fp4=fp4, span=span, options=options)
    return y


TOGETHER = 2
"""Products of one input that a launch can compute."""


def together(x: Weight, weights: Sequence[Weight], rooms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """FP8 products of one input with two weights of any number of outputs: each in its room [tokens, outputs], or several pieces for the readers."""
    options, tiles, span, count = shared_out(x[0], [w[0].shape[0] for w in weights], fp4=False, split=True)
    ys = in_pieces(rooms, count)
    _launch(x, weights, ys, x[1], None, experts=0, tiles=tiles, topk=0, fp4=False, span=span, options=options)
    return ys


def linear(
    codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor,
    *, out_dtype: torch.dtype, fp4: bool = False, split: bool = False, room: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Quantised activation [tokens, in] x weight [out, in]: ``ops/matmul.py: linear`` after ``act_quant``. All four operands uint8; in % 128 = 0."""
    return total(products(codes, scales, [(weight, weight_scale)], out_dtype=out_dtype, fp4=fp4, split=split, room=room), out_dtype, room)


def expert_products(
    codes: torch.Tensor, scales: torch.Tensor, weights: Sequence[Weight], offsets: torch.Tensor, *, fp4: bool, order: torch.Tensor | None = None, topk: int = 0
) -> torch.Tensor:
    """``ops/matmul.py: expert_linear`` after ``act_quant``, with one weight or two [experts, out, in or in / 2], whose outputs stand side by side.

    ``order`` (of ``moe.sort``, with its ``topk``): row r is of token ``order[r] // topk``; codes are the tokens'. The grid is the largest number of tiles
    that any distribution of rows over experts needs, so nothing is read back from the device.
    """
    rows, (experts, n, _) = codes.shape[0] if order is None else order.shape[0], weights[0][0].shape
    y = torch.empty((1, rows, n * len(weights)), dtype=torch.bfloat16, device=codes.device)
    options = launch.options(f"{'fp4' if fp4 else 'fp8'}_experts_{'decode' if rows <= DECODE_TOKENS * experts else 'prefill'}", codes)
    tiles = min(rows, experts + 1 + rows // options["BLOCK_T"])
    _launch(
        (codes, scales), weights, side_by_side(y, len(weights)), offsets, order, experts=experts, tiles=tiles, topk=topk, fp4=fp4, span=0, options=options
    )
    return y[0]


def _specs(base: str, phase: str) -> Iterator[KernelSpec]:
    fp4, experts = base.startswith("fp4"), 256 if "experts" in base else 0
    shape = {"EXPERTS": experts, "SLOTS": 512 if experts else 1, "TWO": False, "TOPK": 0, "SPLIT": False}
    pair = shape | {"TWO": True} | ({"TOPK": 6} if experts else {"SPLIT": phase != "prefill"})

    def work(arch: int, c: Mapping[str, Any]) -> Work:
        n, t, k = c["BLOCK_N"], c["BLOCK_T"], 128
        weight = n * k / 2 + n * k / 32 if fp4 else n * k + 1
        # A decode tile's activations come from the second-level cache; a prefill tile's weights and activations are shared by the tiles of a wave.
        share = 1 / 8 if phase == "prefill" else 1.0
        return Work(bytes=weight * share, flops=2.0 * n * t * k, rate="fp8" if arch >= 89 else "bf16")

    for kind in ("half", "fp8", "scaled"):
        if not (architectures := tuple(a for a in launch.ARCHITECTURES if mma_of(a, fp4=fp4) == kind)):
            continue
        widened = fp4 and kind != "scaled"
        yield KernelSpec(
            name=f"{base}_{phase}",
            kernel=fp4_matmul_kernel if widened else scaled_matmul_kernel,
            signature=dict.fromkeys(("x", "xs", "w", "ws", "w2", "ws2"), "*u8")
            | {"y": "*bf16", "y2": "*bf16", "order": "*i32", "offsets": "*i32", "rows": "i32", "span": "i32"}
            | dict.fromkeys(("N", "N2", "stride", "stride2", "K"), "i32:16"),
            variants={name: what | ({"FP8": kind == "fp8"} if widened else {"FP4": fp4, "MMA": kind}) for name, what in (("flash", shape), ("pair", pair))},
            architectures=architectures,
            mma={80: "HMMA", 89: "QMMA", 90: "QGMMA", 100: "UTC.*MMA", 120: "QMMA" if fp4 else "QMMA|OMMA"},
            work=partial(work, architectures[0]),
        )


_PHASES = {"linear": ("decode", "middle", "prefill")}
SPECS = tuple(
    spec for base in ("linear", "fp4_linear", "fp8_experts", "fp4_experts") for phase in _PHASES.get(base, ("decode", "prefill")) for spec in _specs(base, phase)
)
