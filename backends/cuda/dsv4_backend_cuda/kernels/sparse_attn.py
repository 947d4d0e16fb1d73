"""Attention over selected rows with a sink. Packed rows are widened to BF16 once, for all heads, before they are attended to.

A row is key and value at once, so it is fetched once. Rows are taken in an order that only a token's own list decides; a decode step cuts the list
into pieces of a fixed length and adds them up in order, so that a token's result does not depend on the batch.
"""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Attended, waiting
from dsv4_backend_cuda.kernels.rope import turn
from dsv4_backend_cuda.kernels.unpack import unpack_rows
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2

NOTHING = tl.constexpr(-1e30)  # below any score; finite, so that a difference of two stays a number


@triton.jit(do_not_specialize=["count"])
def sparse_attn_kernel(
    q, kv, sink, picks, y, partial, partial_sum, heads, count, softmax_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes HEADS heads of one token over all its picks, or (SPLIT > 0) over one piece of SPLIT of them."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK_D)
    live_head, live_column = head < heads, column < DIM
    tile = live_head[:, None] & live_column[None, :]
    query = tl.load(q + (token * heads + head)[:, None] * DIM + column[None, :], mask=tile, other=0.0)
    top = tl.full((HEADS,), NOTHING, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK_D), tl.float32)
    first, last = 0, count
    if SPLIT > 0:
        first = tl.program_id(2) * SPLIT
        last = tl.minimum(first + SPLIT, count)
    for start in range(first, last, ROWS):
        j = start + tl.arange(0, ROWS)
        i = tl.load(picks + token * count + j, mask=j < last, other=-1)
        live = i >= 0
        row = tl.load(kv + i.to(tl.int64)[:, None] * DIM + column[None, :], mask=live[:, None] & live_column[None, :], other=0.0)
        score = tl.where(live[None, :], tl.dot(query, tl.trans(row)) * softmax_scale, float("-inf"))
        above = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp(score - above[:, None])
        fade = tl.exp(top - above)
        total = total * fade + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(tl.bfloat16), row, acc * fade[:, None])
        top = above
    if SPLIT > 0:
        piece = (token * tl.num_programs(2) + tl.program_id(2)) * heads + head
        tl.store(partial + piece[:, None] * DIM + column[None, :], acc, mask=tile)
        tl.store(partial_sum + 2 * piece, top, mask=live_head)
        tl.store(partial_sum + 2 * piece + 1, total, mask=live_head)
    else:
        drain = tl.load(sink + head, mask=live_head, other=0.0)
        above = tl.maximum(top, drain)
        fade = tl.exp(top - above)
        total = total * fade + tl.exp(drain - above)
        out = acc * (fade / tl.where(total == 0, 1.0, total))[:, None]
        tl.store(y + (token * heads + head)[:, None] * DIM + column[None, :], out.to(y.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=["pieces"])
def sparse_attn_combine_kernel(
    partial, partial_sum, sink, positions, freqs, y, heads, pieces,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, PIECES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of HEADS heads of one token, in order, each scaled to the common maximum. HALF: pairs of channels at the end that are then turned
    back, as ``rope_kernel`` does.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column, p = tl.arange(0, BLOCK_D), tl.arange(0, PIECES)
    live = head < heads
    tile = live[:, None] & (column < DIM)[None, :]
    drain = tl.load(sink + head, mask=live, other=0.0)
    at = (token * pieces + p)[None, :] * heads + head[:, None]
    tops = tl.load(partial_sum + 2 * at, mask=live[:, None] & (p < pieces)[None, :], other=NOTHING)
    above = tl.maximum(tl.max(tops, axis=1), drain)
    total = tl.exp(drain - above)
    acc = tl.zeros((HEADS, BLOCK_D), tl.float32)
    last = DIM - 2 * HALF + tl.arange(0, 2 * HALF if HALF else 2)
    tail = tl.zeros((HEADS, 2 * HALF if HALF else 2), tl.float32)
    for piece in range(pieces):
        row = (token * pieces + piece) * heads + head
        fade = tl.exp(tl.load(partial_sum + 2 * row, mask=live, other=NOTHING) - above)
        total += fade * tl.load(partial_sum + 2 * row + 1, mask=live, other=0.0)
        acc += fade[:, None] * tl.load(partial + row[:, None] * DIM + column[None, :], mask=tile, other=0.0)
        if HALF:
            tail += fade[:, None] * tl.load(partial + row[:, None] * DIM + last[None, :], mask=live[:, None], other=0.0)
    total = tl.where(total == 0, 1.0, total)[:, None]
    out = y + (token * heads + head)[:, None] * DIM
    tl.store(out + column[None, :], (acc / total).to(y.dtype.element_ty), mask=tile & (column < DIM - 2 * HALF)[None, :])
    if HALF:
        turned = turn((tail / total).to(y.dtype.element_ty), positions, freqs, token, HALF, True)
        tl.store(out + last[None, :], turned.to(y.dtype.element_ty), mask=live[:, None])


def sparse_attn(q: torch.Tensor, kv: torch.Tensor, attn_sink: torch.Tensor, topk_idxs: torch.Tensor, *, softmax_scale: float, split: bool) -> torch.Tensor:
    """``ops/attention.py: sparse_attn``, BF16, at least one pick. ``split``: a decode step's way, pieces of the list in parallel."""
    tokens, heads, dim = q.shape
    count = topk_idxs.shape[1]
    y = torch.empty_like(q)
    options = dict(launch.options("sparse_attn", q))
    length = options.pop("SPLIT")
    pieces = cdiv(count, length) if split else 1
    partial = torch.empty((tokens, pieces, heads, dim) if split else (1,), dtype=torch.float32, device=q.device)
    sums = torch.empty((tokens, pieces, heads, 2) if split else (1,), dtype=torch.float32, device=q.device)
    block = next_power_of_2(dim)
    sparse_attn_kernel[(tokens, cdiv(heads, options["HEADS"]), pieces)](
        q, kv, attn_sink, topk_idxs, y, partial, sums, heads, count, softmax_scale, DIM=dim, BLOCK_D=block, SPLIT=length if split else 0, **options
    )
    return waiting(y, Attended(y, combine, partial, sums, attn_sink)) if split else y


def combine(of: Attended, y: torch.Tensor | None = None, positions: torch.Tensor | None = None, freqs: torch.Tensor | None = None) -> None:
    """Put the attended rows into their room, or, turned back by RoPE, into ``y``."""
    _, pieces, heads, dim = of.partial.shape
    y = of.room if y is None else y
    options = launch.options("sparse_attn_combine", y)
    sparse_attn_combine_kernel[(y.shape[0], cdiv(heads, options["HEADS"]))](
        of.partial, of.sums, of.sink, of.sink if positions is None else positions, of.sink if freqs is None else freqs, y, heads, pieces,
        DIM=dim, BLOCK_D=next_power_of_2(dim), HALF=0 if freqs is None else freqs.shape[0], PIECES=next_power_of_2(pieces), **options,
    )  # fmt: skip


def cached_sparse_attn(
    q: torch.Tensor,
    kv: torch.Tensor,
    ring: torch.Tensor,
    ring_index: torch.Tensor,
    rows: torch.Tensor | None,
    row_index: torch.Tensor | None,
    attn_sink: torch.Tensor,
    topk_idxs: torch.Tensor,
    *,
    rope_dim: int,
    softmax_scale: float,
    split: bool,
) -> torch.Tensor:
    """``ops/fused.py: cached_sparse_attn`` over packed caches (uint8, a row's bytes a multiple of 4)."""
    table, picks = unpack_rows(kv, ring, ring_index, rows, row_index, topk_idxs, rope_dim=rope_dim)
    return sparse_attn(q, table, attn_sink, picks, softmax_scale=softmax_scale, split=split)


_SHAPE = {"DIM": 512, "BLOCK_D": 512}
SPECS = (
    KernelSpec(
        name="sparse_attn",
        kernel=sparse_attn_kernel,
        signature={"q": "*bf16", "kv": "*bf16", "sink": "*fp32", "picks": "*i32", "y": "*bf16", "partial": "*fp32", "partial_sum": "*fp32"}
        | {"heads": "i32:16", "count": "i32:16", "softmax_scale": "fp32"},
        variants={"decode": _SHAPE, "prefill": _SHAPE | {"SPLIT": 0}},
        mma={80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC.*MMA", 120: "HMMA"},
        work=lambda c: Work(bytes=c["ROWS"] * 1024.0, flops=4.0 * c["ROWS"] * c["HEADS"] * 512),
    ),
    KernelSpec(
        name="sparse_attn_combine",
        kernel=sparse_attn_combine_kernel,
        signature={"partial": "*fp32", "partial_sum": "*fp32", "sink": "*fp32", "positions": "*i32", "freqs": "*fp32", "y": "*bf16", "heads": "i32:16", "pieces": "i32"},
        variants={"flash": _SHAPE | {"PIECES": 8, "HALF": 0}, "turned": _SHAPE | {"PIECES": 8, "HALF": 32}},
        work=lambda c: Work(bytes=c["HEADS"] * 512 * 4.0),
    ),
)
