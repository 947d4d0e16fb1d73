"""Attention over selected rows with a sink: rows as BF16, or gathered straight out of the packed cache.

A row is key and value at once, so it is fetched once. Rows are taken in an order that only a token's own list decides; a decode step cuts the list
into pieces of a fixed length and adds them up in order, so that a token's result does not depend on the batch.
"""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels.formats import e4m3_half
from dsv4_backend_cuda.launch import KernelSpec, Work

KV_BLOCK = 64  # channels per scale of a packed row
NOTHING = tl.constexpr(-1e30)  # below any score; finite, so that a difference of two stays a number


@triton.jit
def packed_rows(codes, halves, slot, live, column, DIM: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, NATIVE: tl.constexpr):
    """Rows of a packed cache as BF16 [rows, columns]: E4M3 codes times E8M0 scales, then BF16 channels. A slot of -1 is a row of zeros."""
    PLAIN: tl.constexpr = DIM - ROPE
    start = slot.to(tl.int64) * WIDTH
    there = (live & (slot >= 0))[:, None]
    scaled = there & (column < PLAIN)[None, :]
    code = tl.load(codes + start[:, None] + column[None, :], mask=scaled, other=0)
    byte = tl.load(codes + start[:, None] + PLAIN + (column // 64)[None, :], mask=scaled, other=0).to(tl.uint16)
    factor = tl.where(byte == 0, 0x40, byte << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if NATIVE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.bfloat16)
    else:
        value = e4m3_half(code).to(tl.bfloat16)
    turned = there & ((column >= PLAIN) & (column < DIM))[None, :]
    at = start // 2 + (WIDTH // 2 - ROPE)
    rope = tl.load(halves + at[:, None] + (column - PLAIN)[None, :], mask=turned, other=0.0)
    return tl.where(scaled, value * factor, rope)


@triton.jit
def sparse_attn_kernel(
    q, kv, ring, ring_halves, ring_index, old, old_halves, old_index, sink, picks, y, partial, partial_sum,
    heads, count, recent, tokens, softmax_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, OLD: tl.constexpr,
    SPLIT: tl.constexpr, NATIVE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes HEADS heads of one token over all its picks, or (SPLIT > 0) over one piece of SPLIT of them.

    PACKED: picks count in [ring[ring_index] | kv | old[old_index]], with ``recent`` and ``tokens`` rows in the first two; else in ``kv``.
    """
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
        if PACKED:
            fresh = live & (i >= recent) & (i < recent + tokens)
            row = tl.load(kv + (i - recent).to(tl.int64)[:, None] * DIM + column[None, :], mask=fresh[:, None] & live_column[None, :], other=0.0)
            in_ring = live & (i < recent)
            slot = tl.load(ring_index + i, mask=in_ring, other=-1)
            codes, halves = ring, ring_halves
            if OLD:  # a row lies in one cache or the other, so that one fetch and one decoding serve both
                in_old = i >= recent + tokens
                slot = tl.where(in_old, tl.load(old_index + (i - recent - tokens), mask=in_old, other=-1), slot)
                codes = tl.multiple_of(tl.where(in_old, old, ring)[:, None], (16, 16))  # as torch allocates; the compiler cannot see through a choice
                halves = tl.multiple_of(tl.where(in_old, old_halves, ring_halves)[:, None], (16, 16))
            cached = packed_rows(codes, halves, slot, live & ~fresh, column, DIM, ROPE, WIDTH, NATIVE)
            row = tl.where(fresh[:, None], row, cached)
        else:
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


@triton.jit
def sparse_attn_combine_kernel(
    partial, partial_sum, sink, y, heads, pieces, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr, HEADS: tl.constexpr
):
    """Add up the pieces of HEADS heads of one token, in order, each scaled to the common maximum."""
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
    for piece in range(pieces):
        row = (token * pieces + piece) * heads + head
        fade = tl.exp(tl.load(partial_sum + 2 * row, mask=live, other=NOTHING) - above)
        total += fade * tl.load(partial_sum + 2 * row + 1, mask=live, other=0.0)
        acc += fade[:, None] * tl.load(partial + row[:, None] * DIM + column[None, :], mask=tile, other=0.0)
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(y + (token * heads + head)[:, None] * DIM + column[None, :], out.to(y.dtype.element_ty), mask=tile)


def _attend(
    q: torch.Tensor, kv: torch.Tensor, sink: torch.Tensor, picks: torch.Tensor, *, softmax_scale: float, split: bool,
    ring: torch.Tensor | None = None, ring_index: torch.Tensor | None = None, old: torch.Tensor | None = None, old_index: torch.Tensor | None = None, rope_dim: int = 0,
) -> torch.Tensor:  # fmt: skip
    tokens, heads, dim = q.shape
    count = picks.shape[1]
    y = torch.empty_like(q)
    options = dict(launch.options("sparse_attn_packed" if ring is not None else "sparse_attn", q))
    length = options.pop("SPLIT")
    pieces = triton.cdiv(count, length) if split else 1
    partial = torch.empty((tokens, pieces, heads, dim) if split else (1,), dtype=torch.float32, device=q.device)
    sums = torch.empty((tokens, pieces, heads, 2) if split else (1,), dtype=torch.float32, device=q.device)
    block = triton.next_power_of_2(dim)
    unused = picks if ring_index is None else ring_index
    packed = kv if ring is None else ring
    source = packed if old is None else old
    halves = [t if t.dtype == torch.bfloat16 else t.view(torch.bfloat16) for t in (packed, source)]
    sparse_attn_kernel[(tokens, triton.cdiv(heads, options["HEADS"]), pieces)](
        q, kv, packed, halves[0], unused, source, halves[1], unused if old_index is None else old_index, sink, picks, y, partial, sums,
        heads, count, unused.shape[0], kv.shape[0], softmax_scale,
        DIM=dim, BLOCK_D=block, ROPE=rope_dim, WIDTH=packed.shape[1], PACKED=ring is not None, OLD=old is not None,
        SPLIT=length if split else 0, NATIVE=launch.native_fp8(q), **options,
    )  # fmt: skip
    if split:
        options = launch.options("sparse_attn_combine", q)
        sparse_attn_combine_kernel[(tokens, triton.cdiv(heads, options["HEADS"]))](
            partial, sums, sink, y, heads, pieces, DIM=dim, BLOCK_D=block, PIECES=triton.next_power_of_2(pieces), **options
        )
    return y


def sparse_attn(q: torch.Tensor, kv: torch.Tensor, attn_sink: torch.Tensor, topk_idxs: torch.Tensor, *, softmax_scale: float, split: bool) -> torch.Tensor:
    """``ops/attention.py: sparse_attn``, BF16, at least one pick. ``split``: a decode step's way, pieces of the list in parallel."""
    return _attend(q, kv, attn_sink, topk_idxs, softmax_scale=softmax_scale, split=split)


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
    """``ops/fused.py: cached_sparse_attn`` over packed caches (uint8, a row's bytes even in number): rows are decoded where they are used."""
    return _attend(
        q, kv, attn_sink, topk_idxs, softmax_scale=softmax_scale, split=split,
        ring=ring, ring_index=ring_index, old=rows, old_index=row_index, rope_dim=rope_dim,
    )  # fmt: skip


def _spec(name: str, *, packed: bool) -> KernelSpec:
    shape = {"DIM": 512, "BLOCK_D": 512, "ROPE": 64 if packed else 0, "WIDTH": 584 if packed else 512, "PACKED": packed, "OLD": packed}
    pointers = {"q": "*bf16", "kv": "*bf16", "ring": "*u8", "ring_halves": "*bf16", "ring_index": "*i32", "old": "*u8", "old_halves": "*bf16", "old_index": "*i32"}
    return KernelSpec(
        name=name,
        kernel=sparse_attn_kernel,
        signature=pointers
        | {"sink": "*fp32", "picks": "*i32", "y": "*bf16", "partial": "*fp32", "partial_sum": "*fp32"}
        | {"heads": "i32:16", "count": "i32:16", "recent": "i32", "tokens": "i32", "softmax_scale": "fp32"},
        variants={"decode": shape, "prefill": shape | {"SPLIT": 0}},
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        mma={80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC.*MMA|HMMA", 120: "HMMA"},
        work=lambda c: Work(bytes=float(c["ROWS"]) * (584 if packed else 1024), flops=4.0 * c["ROWS"] * c["HEADS"] * 512),
    )


SPECS = (
    _spec("sparse_attn", packed=False),
    _spec("sparse_attn_packed", packed=True),
    KernelSpec(
        name="sparse_attn_combine",
        kernel=sparse_attn_combine_kernel,
        signature={"partial": "*fp32", "partial_sum": "*fp32", "sink": "*fp32", "y": "*bf16", "heads": "i32:16", "pieces": "i32"},
        variants={"flash": {"DIM": 512, "BLOCK_D": 512, "PIECES": 8}},
        work=lambda c: Work(bytes=c["HEADS"] * 512 * 4.0),
    ),
)
