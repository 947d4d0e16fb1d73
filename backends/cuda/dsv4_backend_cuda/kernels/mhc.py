"""Hyper-connections: mix, split with Sinkhorn, reduce (and norm) in two launches; and the way back to the streams. hc is a power of two."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Mixture, Streams, awaited, waiting
from dsv4_backend_cuda.kernels.formats import quantise_e4m3
from dsv4_backend_cuda.kernels.moe import combined
from dsv4_backend_cuda.kernels.scaled_matmul import mma_of
from dsv4_backend_cuda.kernels.words import paired_place
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2

Codes = tuple[torch.Tensor, torch.Tensor]
"""E4M3 codes [1 or 2, tokens, dim] of BF16 rows, the second ones in the order of ``words.paired_place``, and scale bytes [tokens, dim / 128]."""


@triton.jit(do_not_specialize=["tokens"])
def mix_kernel(
    h, fn, partial, y, old, post, comb, place, local, shared, tokens, K,
    EXPAND: tl.constexpr, DIM: tl.constexpr, TOPK: tl.constexpr, SHARED: tl.constexpr,
    MIXES: tl.constexpr, BLOCK_M: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of one PIECE of the streams' channels with ``fn``, and their sum of squares in the last column: partial[piece, token, BLOCK_M].

    EXPAND: streams, 0 for none: ``h`` is not made yet, the program makes its channels, as ``expand_kernel`` does. TOPK: and unless 0 the sub-layer's rows
    are not either: ``y`` holds the experts' rows (``moe.combine_kernel``). A block of channels lies in one stream: DIM is a multiple of BLOCK_K.
    """
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * PIECE
    mixes = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_T,), tl.float32)
    for k in range(start, start + PIECE, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        at, inside = row[:, None] * K + column[None, :], (row < tokens)[:, None] & (column < K)[None, :]
        if EXPAND:
            stream, token = tl.minimum(k // DIM, EXPAND - 1), tl.minimum(row, tokens - 1)[:, None]
            d = (column - stream * DIM)[None, :]
            if TOPK:
                new = combined(y, place, local, shared, token, d, inside, DIM, TOPK, SHARED).to(h.dtype.element_ty).to(tl.float32)
            else:
                new = tl.load(y + token * DIM + d, mask=inside, other=0.0).to(tl.float32)
            new = tl.load(post + token * EXPAND + stream) * new
            mixed = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
            for j in tl.static_range(EXPAND):
                share = tl.load(comb + (token * EXPAND + j) * EXPAND + stream)
                mixed += share * tl.load(old + (token * EXPAND + j) * DIM + d, mask=inside, other=0.0).to(tl.float32)
            rounded = (new + mixed).to(h.dtype.element_ty)
            tl.store(h + at, rounded, mask=inside)
            x = rounded.to(tl.float32)
        else:
            x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        f = tl.load(fn + m[None, :] * K + column[:, None], mask=(m < MIXES)[None, :] & (column < K)[:, None], other=0.0)
        mixes = tl.dot(x, f, mixes, input_precision="ieee")
        squares += tl.sum(x * x, axis=1)
    mixes = tl.where(m[None, :] == BLOCK_M - 1, squares[:, None], mixes)
    at = (tl.program_id(1).to(tl.int64) * tokens + row) * BLOCK_M
    tl.store(partial + at[:, None] + m[None, :], mixes, mask=(row < tokens)[:, None])


@triton.jit
def gathered(partial, at, stride, pieces):
    """Sum of the pieces at offsets ``at``, in order."""
    total = tl.load(partial + at)
    for piece in range(1, pieces):
        total += tl.load(partial + piece * stride + at)
    return total


@triton.jit(do_not_specialize=["tokens", "pieces", "iters"])
def reduce_kernel(
    h, partial, scale, base, weight, y, post, comb, codes, scales, tokens, pieces, norm_eps, eps, iters,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HC: tl.constexpr, BLOCK_M: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr,
    QUANTISE: tl.constexpr, PAIRED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program finishes one token: ``pre`` and (unless HEAD) ``post`` and ``comb`` from the mixes, the weighted sum of streams, RMS norm if NORM.

    QUANTISE: and FP8 codes of the result in groups of 128, as ``act_quant`` makes them. PAIRED: behind all tokens' codes once more, in the order in which
    FP4 weights are multiplied.
    """
    token = tl.program_id(0).to(tl.int64)
    stride = tl.cast(tokens, tl.int64) * BLOCK_M
    first = token * BLOCK_M
    j = tl.arange(0, HC)
    inverse = 1.0 / tl.sqrt_rn(gathered(partial, first + BLOCK_M - 1, stride, pieces) / (HC * DIM) + norm_eps)
    mix = gathered(partial, first + j, stride, pieces) * inverse * tl.load(scale) + tl.load(base + j)
    pre = 1.0 / (1.0 + tl.exp(-mix)) + eps
    if not HEAD:
        mix = gathered(partial, first + HC + j, stride, pieces) * inverse * tl.load(scale + 1) + tl.load(base + HC + j)
        tl.store(post + token * HC + j, 2.0 / (1.0 + tl.exp(-mix)))
        cell = j[:, None] * HC + j[None, :]
        mixes = gathered(partial, first + 2 * HC + cell, stride, pieces) * inverse * tl.load(scale + 2) + tl.load(base + 2 * HC + cell)
        e = tl.exp(mixes - tl.max(mixes, axis=1)[:, None])
        matrix = e / tl.sum(e, axis=1)[:, None] + eps
        matrix = matrix / (tl.sum(matrix, axis=0) + eps)[None, :]
        for _ in range(iters - 1):
            matrix = matrix / (tl.sum(matrix, axis=1) + eps)[:, None]
            matrix = matrix / (tl.sum(matrix, axis=0) + eps)[None, :]
        tl.store(comb + token * HC * HC + cell, matrix)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for n in tl.static_range(HC):
        share = tl.sum(tl.where(j == n, pre, 0.0), axis=0)
        acc += share * tl.load(h + (token * HC + n) * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    if NORM:  # of the row as it would be handed on, in BF16
        acc = acc.to(y.dtype.element_ty).to(tl.float32)
        acc = acc * (1.0 / tl.sqrt_rn(tl.sum(acc * acc, axis=0) / DIM + norm_eps))
        acc = acc * tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)
    rounded = acc.to(y.dtype.element_ty)
    tl.store(y + token * DIM + d, rounded, mask=d < DIM)
    if QUANTISE:
        GROUPS: tl.constexpr = BLOCK_D // 128
        code, exponent = quantise_e4m3(tl.reshape(rounded.to(tl.float32), (1, GROUPS, 128)), NATIVE)
        tl.store(codes + token * DIM + d, tl.reshape(code, (BLOCK_D,)), mask=d < DIM)
        if PAIRED:
            tl.store(codes + (tokens + token) * DIM + paired_place(d), tl.reshape(code, (BLOCK_D,)), mask=d < DIM)
        group = tl.arange(0, GROUPS)
        tl.store(scales + token * (DIM // 128) + group, tl.reshape(exponent, (GROUPS,)).to(tl.uint8), mask=group < DIM // 128)


@triton.jit
def expand_kernel(y, h, post, comb, out, DIM: tl.constexpr, HC: tl.constexpr, BLOCK: tl.constexpr):
    """A program writes BLOCK channels of all streams of one token: post[n] y + sum_j comb[j, n] h[j]."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, HC)
    row = tl.load(y + token * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    at = (token * HC + j)[:, None] * DIM + d[None, :]
    streams = tl.load(h + at, mask=(d < DIM)[None, :], other=0.0).to(tl.float32)
    for n in tl.static_range(HC):
        column = tl.load(comb + (token * HC + j) * HC + n)
        new = tl.load(post + token * HC + n) * row + tl.sum(column[:, None] * streams, axis=0)
        tl.store(out + (token * HC + n) * DIM + d, new.to(out.dtype.element_ty), mask=d < DIM)


def _reduce(
    h: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, weight: torch.Tensor | None, *, norm_eps: float, eps: float, iters: int, head: bool, paired: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Codes | None]:
    tokens, hc, dim = h.shape
    mixes, k = fn.shape
    block_m = max(16, next_power_of_2(mixes + 1))
    options = launch.options("mix", h)
    block_k = options["BLOCK_K"]
    options["PIECE"] = min(options["PIECE"], cdiv(k, block_k) * block_k)  # few channels are one short piece
    pieces = cdiv(k, options["PIECE"])
    partial = torch.empty((pieces, tokens, block_m), dtype=torch.float32, device=h.device)
    grid, how = (cdiv(tokens, options["BLOCK_T"]), pieces), {"DIM": dim, "MIXES": mixes, "BLOCK_M": block_m, **options}
    streams = awaited(h, Streams) if dim % block_k == 0 else None
    if streams:
        h = streams.room
        of = awaited(streams.y, Mixture) if streams.y.dtype == h.dtype else None
        y, local, place = (of.rows, of.local, of.place) if of else (streams.y.contiguous(), fn, fn)
        shared = fn if of is None or of.shared is None else of.shared.contiguous()
        mix_kernel[grid](
            h, fn, partial, y, streams.h, streams.post, streams.comb, place, local, shared, tokens, k,
            EXPAND=hc, TOPK=of.topk if of else 0, SHARED=of is not None and of.shared is not None, **how,
        )  # fmt: skip
        streams.done()
    else:
        h = h.contiguous()
        mix_kernel[grid](h, fn, partial, *(fn,) * 7, tokens, k, EXPAND=0, TOPK=0, SHARED=False, **how)
    y = h.new_empty((tokens, dim))
    post = torch.empty((tokens, hc), dtype=torch.float32, device=h.device)
    comb = torch.empty((tokens, hc, hc), dtype=torch.float32, device=h.device)
    quantise = weight is not None and dim % 128 == 0
    codes = torch.empty((1 + paired, tokens, dim) if quantise else (0,), dtype=torch.uint8, device=h.device)
    scales = torch.empty((tokens, dim // 128) if quantise else (0,), dtype=torch.uint8, device=h.device)
    reduce_kernel[(tokens,)](
        h, partial, scale, base, h if weight is None else weight, y, post, comb, codes, scales, tokens, pieces, norm_eps, eps, iters,
        DIM=dim, BLOCK_D=next_power_of_2(dim), HC=hc, BLOCK_M=block_m, HEAD=head, NORM=weight is not None, QUANTISE=quantise,
        PAIRED=paired, NATIVE=launch.native_fp8(h), **launch.options("hc_reduce", h),
    )  # fmt: skip
    return y, post, comb, (codes, scales) if quantise else None


def hc_pre(
    h: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, eps: float, iters: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``ops/mhc.py: hc_pre``."""
    return _reduce(h, fn, scale, base, None, norm_eps=norm_eps, eps=eps, iters=iters, head=False)[:3]


def hc_pre_norm(
    h: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, weight: torch.Tensor, *, norm_eps: float, eps: float, iters: int, paired: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Codes | None]:
    """``ops/mhc.py: hc_pre_norm``, and FP8 codes of the norm's rows where they are whole groups of 128 channels; ``paired``: in both orders."""
    return _reduce(h, fn, scale, base, weight, norm_eps=norm_eps, eps=eps, iters=iters, head=False, paired=paired)


def hc_head(h: torch.Tensor, fn: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, *, norm_eps: float, eps: float) -> torch.Tensor:
    """``ops/mhc.py: hc_head``."""
    return _reduce(h, fn, scale, base, None, norm_eps=norm_eps, eps=eps, iters=0, head=True)[0]


def _expand(of: Streams) -> None:
    (tokens, hc, dim), options = of.room.shape, launch.options("hc_expand", of.room)
    grid = (tokens, cdiv(dim, options["BLOCK"]))
    expand_kernel[grid](of.y.contiguous(), of.h, of.post, of.comb, of.room, DIM=dim, HC=hc, **options)


def hc_post(y: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """``ops/mhc.py: hc_post``, for its reader to make: the next sub-layer's ``mix_kernel``."""
    out = torch.empty_like(h)
    return waiting(out, Streams(out, _expand, y, h, post, comb))


_MADE = {"EXPAND": 0, "DIM": 4096, "TOPK": 0, "SHARED": False}
_NORMED = {"HC": 4, "BLOCK_M": 32, "HEAD": False, "NORM": True, "QUANTISE": True}
_FLOATS = {"scale": "*fp32", "base": "*fp32"}
SPECS = (
    KernelSpec(
        name="mix", kernel=mix_kernel,
        signature={**dict.fromkeys(("h", "y", "old", "shared"), "*bf16"), **dict.fromkeys(("fn", "partial", "post", "comb"), "*fp32"),
                   "place": "*i32", "local": "*i32", "tokens": "i32", "K": "i32:16"},
        variants={"pre": {**_MADE, "MIXES": 24, "BLOCK_M": 32}, "head": {**_MADE, "MIXES": 4, "BLOCK_M": 16},
                  "expand": {**_MADE, "EXPAND": 4, "MIXES": 24, "BLOCK_M": 32},
                  "experts": {**_MADE, "EXPAND": 4, "TOPK": 6, "SHARED": True, "MIXES": 24, "BLOCK_M": 32}},
        work=lambda c: Work(bytes=c["BLOCK_K"] * (4.0 * c["MIXES"] + 2.0 + 2.0 * c["EXPAND"])),
    ),
    KernelSpec(
        name="hc_reduce", kernel=reduce_kernel, looped=False,
        signature={"h": "*bf16", "partial": "*fp32", **_FLOATS, "weight": "*bf16", "y": "*bf16", "post": "*fp32", "comb": "*fp32", "codes": "*u8",
                   "scales": "*u8", "tokens": "i32", "pieces": "i32", "norm_eps": "fp32", "eps": "fp32", "iters": "i32"},
        variants={
            "flash": {"DIM": 4096, "BLOCK_D": 4096, **_NORMED},
            "pro": {"DIM": 7168, "BLOCK_D": 8192, **_NORMED},
            "head": {"DIM": 4096, "BLOCK_D": 4096, "HC": 4, "BLOCK_M": 16, "HEAD": True, "NORM": False, "QUANTISE": False, "PAIRED": False},
        },
        per_arch=lambda arch: {"NATIVE": arch >= 89, "PAIRED": mma_of(arch, fp4=True) == "fp8"},
        work=lambda c: Work(bytes=c["DIM"] * 10.0),
    ),
    KernelSpec(
        name="hc_expand", kernel=expand_kernel, looped=False,
        signature={"y": "*bf16", "h": "*bf16", "post": "*fp32", "comb": "*fp32", "out": "*bf16"},
        variants={"flash": {"DIM": 4096, "HC": 4}, "pro": {"DIM": 7168, "HC": 4}},
        work=lambda c: Work(bytes=c["BLOCK"] * 18.0),
    ),
)  # fmt: skip
