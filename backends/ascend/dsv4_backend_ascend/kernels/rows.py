"""Plain cache rows: written by slot, and gathered beside others into one array."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def write_kernel(cache, rows, index, count, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """A unit is a row, which goes to its slot; -1 is none."""
    column = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        slot = tl.load(index + row)
        if slot >= 0:
            moved = tl.load(rows + tl.cast(row, tl.int64) * DIM + column, mask=column < DIM, other=0.0)
            tl.store(cache + tl.cast(slot, tl.int64) * DIM + column, moved, mask=column < DIM)


@triton.jit
def gather(cache, index, out, first, count, column, DIM: tl.constexpr):
    """Rows by slot, from ``first`` on in ``out``; -1 is a row of zeros."""
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        slot = tl.load(index + row)
        stored = tl.load(cache + tl.cast(tl.maximum(slot, 0), tl.int64) * DIM + column, mask=column < DIM, other=0.0)
        tl.store(
            out + tl.cast(first + row, tl.int64) * DIM + column, tl.where(slot >= 0, stored, 0.0), mask=column < DIM
        )


@triton.jit(do_not_specialize=["recent", "new", "old", "none"])
def join_kernel(
    ring, ring_index, kv, cache, index, out, recent, new, old, none, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """``recent`` rows of the ring, ``new`` ones of this step, ``old`` ones of the cache, and ``none`` rows of zeros, one below the other."""
    column = tl.arange(0, BLOCK)
    gather(ring, ring_index, out, 0, recent, column, DIM)
    for row in range(tl.program_id(0), new, tl.num_programs(0)):
        moved = tl.load(kv + tl.cast(row, tl.int64) * DIM + column, mask=column < DIM, other=0.0)
        tl.store(out + tl.cast(recent + row, tl.int64) * DIM + column, moved, mask=column < DIM)
    gather(cache, index, out, recent + new, old, column, DIM)
    for row in range(tl.program_id(0), none, tl.num_programs(0)):
        zeros = tl.zeros((BLOCK,), out.dtype.element_ty)
        tl.store(out + tl.cast(recent + new + old + row, tl.int64) * DIM + column, zeros, mask=column < DIM)
