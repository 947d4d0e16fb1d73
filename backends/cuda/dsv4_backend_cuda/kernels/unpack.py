"""Rows of packed caches (E4M3 codes, E8M0 scales, BF16 channels) widened to BF16."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels.words import bf16_of_e4m3
from dsv4_backend_cuda.launch import KernelSpec, Work, next_power_of_2

KV_BLOCK = tl.constexpr(64)  # channels per scale


@triton.jit(do_not_specialize=["recent", "tokens"])
def unpack_rows_kernel(
    kv, ring, ring_index, old, old_index, picks, rows, slots, recent, tokens,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROPE: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr, OLD: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """A program writes a row of the table [ring[ring_index] | kv | old[old_index]], ``recent`` and ``tokens`` rows in its first two parts.

    PICKED: row j is the table's row picks[j], and slots[j] is j, or -1 where nothing is picked. Else it is the table's row j. An index of -1 into a cache
    is a row of zeros.
    """
    PLAIN: tl.constexpr = DIM - ROPE
    j = tl.program_id(0)
    i = j
    if PICKED:
        i = tl.load(picks + j)
        tl.store(slots + j, tl.where(i >= 0, j, -1))
    out = rows + j.to(tl.int64) * DIM
    column = tl.arange(0, BLOCK_D)
    if (i >= recent) & (i < recent + tokens):
        value = tl.load(kv + (i - recent).to(tl.int64) * DIM + column, mask=column < DIM)
        tl.store(out + column, value, mask=column < DIM)
    elif i >= 0:
        packed, index = ring, ring_index + i
        if OLD:
            if i >= recent:
                packed, index = old, old_index + (i - recent - tokens)
        slot = tl.load(index).to(tl.int64)
        there = slot >= 0
        row = tl.multiple_of(packed + slot * WIDTH, 8)  # as torch allocates and rows are laid out
        block, part, turned = tl.arange(0, BLOCK_D // KV_BLOCK)[:, None], tl.arange(0, KV_BLOCK // 4)[None, :], tl.arange(0, BLOCK_R)
        live = there & (block * KV_BLOCK + 4 * part < PLAIN)
        codes = tl.load(row.to(tl.pointer_type(tl.uint32), bitcast=True) + block * (KV_BLOCK // 4) + part, mask=live, other=0)
        scale = tl.load(row + PLAIN + block, mask=there & (block * KV_BLOCK < PLAIN), other=0).to(tl.uint16)
        factor = tl.where(scale == 0, 0x40, scale << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        value = tl.reshape(bf16_of_e4m3(codes) * factor, (BLOCK_D,))
        tl.store(out + column, value, mask=column < PLAIN)
        tail = tl.load((row + (WIDTH - 2 * ROPE)).to(tl.pointer_type(tl.bfloat16), bitcast=True) + turned, mask=there & (turned < ROPE), other=0.0)
        tl.store(out + PLAIN + turned, tail, mask=turned < ROPE)


def unpack_rows(
    kv: torch.Tensor, ring: torch.Tensor, ring_index: torch.Tensor, old: torch.Tensor | None, old_index: torch.Tensor | None, picks: torch.Tensor,
    *, rope_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Table of BF16 rows and the picks into it: the picked rows, or all rows if those are fewer. Which of the two follows from shapes alone."""
    recent, tokens, dim = ring_index.shape[0], *kv.shape
    everything = recent + tokens + (0 if old_index is None else old_index.shape[0])
    picked = picks.numel() < everything
    total = picks.numel() if picked else everything
    rows = torch.empty((total, dim), dtype=kv.dtype, device=kv.device)
    slots = torch.empty_like(picks) if picked else picks
    options = launch.options("unpack_rows", kv)
    unpack_rows_kernel[(total,)](
        kv, ring, ring_index, ring if old is None else old, ring_index if old_index is None else old_index, picks, rows, slots, recent, tokens,
        DIM=dim, BLOCK_D=next_power_of_2(dim), ROPE=rope_dim, BLOCK_R=next_power_of_2(rope_dim),
        WIDTH=ring.shape[1], OLD=old is not None, PICKED=picked, **options,
    )  # fmt: skip
    return rows, slots


SPECS = (
    KernelSpec(
        name="unpack_rows",
        kernel=unpack_rows_kernel,
        signature={"kv": "*bf16", "ring": "*u8", "ring_index": "*i32", "old": "*u8", "old_index": "*i32", "picks": "*i32", "rows": "*bf16", "slots": "*i32"}
        | {"recent": "i32", "tokens": "i32"},
        variants={"flash": {"DIM": 512, "BLOCK_D": 512, "ROPE": 64, "BLOCK_R": 64, "WIDTH": 584, "OLD": True, "PICKED": True}},
        work=lambda _: Work(bytes=584.0 + 1024.0),
        looped=False,
    ),
)
