"""KV compression: a softmax per channel over a window of tokens, plain (ratio 128) and overlapping (ratio 4)."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import parts
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["recent", "tokens", "pieces"])
def compress_kernel(
    kv_score, state, slots, ape, windows, y, recent, tokens, pieces,
    DIM: tl.constexpr, WIDTH: tl.constexpr, RATIO: tl.constexpr, SPAN: tl.constexpr, CACHED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program mixes BLOCK channels of one window. WIDTH = 2 DIM: the previous window's tokens use their first DIM channels, the current one's their last.

    CACHED: the first ``recent`` tokens are state[slots[token]], a slot of -1 zeros, the others the ``tokens`` rows of ``kv_score``, which may come in
    ``pieces``.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCK_S)
    token = tl.load(windows + row * SPAN + j, mask=j < SPAN, other=-1)
    channel = c[None, :] + tl.where(j >= RATIO, DIM, 0)[:, None]
    inside = (token >= 0)[:, None] & (c < DIM)[None, :]
    if CACHED:
        old = token < recent
        slot = tl.load(slots + token, mask=(token >= 0) & old, other=0)
        stored = inside & (slot >= 0)[:, None]
        base = tl.where(old, slot, token - recent).to(tl.int64)[:, None] * (2 * WIDTH)
        source = tl.where(old[:, None], state + base, kv_score + base) + channel
        new = inside & (token >= recent)[:, None]
    else:
        stored, new = inside, inside
        source = kv_score + token.to(tl.int64)[:, None] * (2 * WIDTH) + channel
    kv = tl.load(source, mask=stored, other=0.0)
    score = tl.load(source + WIDTH, mask=stored, other=0.0)
    stride = tl.cast(tokens, tl.int64) * (2 * WIDTH)
    for piece in range(1, pieces):
        kv += tl.load(source + piece * stride, mask=new, other=0.0)
        score += tl.load(source + piece * stride + WIDTH, mask=new, other=0.0)
    score += tl.load(ape + (j % RATIO)[:, None] * WIDTH + channel, mask=inside, other=0.0)
    score = tl.where(inside, score, float("-inf"))
    top = tl.maximum(tl.max(score, axis=0), -3.0e38)
    weight = tl.exp(score - top[None, :])
    total = tl.sum(weight, axis=0)
    out = tl.sum(weight * kv, axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(y + row * DIM + c, out.to(y.dtype.element_ty), mask=c < DIM)


def compress(
    kv_score: torch.Tensor, ape: torch.Tensor, window_idxs: torch.Tensor, *, dim: int, state: torch.Tensor | None = None, slots: torch.Tensor | None = None
) -> torch.Tensor:
    """``ops/attention.py: compress``, to BF16; with ``state`` and ``slots`` ``cached_compress``."""
    rows, span = window_idxs.shape
    cached = state is not None and slots is not None
    ratio, width = ape.shape
    tokens = kv_score.shape[0]
    kv_score = parts(kv_score)
    y = torch.empty((rows, dim), dtype=torch.bfloat16, device=kv_score.device)
    options = launch.options("compress", kv_score)
    compress_kernel[(rows, cdiv(dim, options["BLOCK"]))](
        kv_score, state if cached else kv_score, slots if cached else window_idxs, ape, window_idxs, y, slots.shape[0] if slots is not None else 0,
        tokens, kv_score.shape[0],
        DIM=dim, WIDTH=width, RATIO=ratio, SPAN=span, CACHED=cached, BLOCK_S=next_power_of_2(span), **options,
    )  # fmt: skip
    return y


SPECS = (
    KernelSpec(
        name="compress",
        kernel=compress_kernel,
        looped=False,
        signature={"kv_score": "*fp32", "state": "*fp32", "slots": "*i32", "ape": "*fp32", "windows": "*i32", "y": "*bf16", "recent": "i32", "tokens": "i32", "pieces": "i32"},
        variants={
            "ratio128": {"DIM": 512, "WIDTH": 512, "RATIO": 128, "SPAN": 128, "CACHED": True, "BLOCK_S": 128},
            "ratio4": {"DIM": 512, "WIDTH": 1024, "RATIO": 4, "SPAN": 8, "CACHED": True, "BLOCK_S": 8},
            "index": {"DIM": 128, "WIDTH": 256, "RATIO": 4, "SPAN": 8, "CACHED": True, "BLOCK_S": 8},
        },
        work=lambda c: Work(bytes=c["BLOCK"] * c["SPAN"] * 8.0),
    ),
)
