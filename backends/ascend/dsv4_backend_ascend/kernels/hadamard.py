"""``hadamard``, with its result on the FP4 grid beside it."""

import triton
import triton.language as tl

from dsv4_backend_ascend.kernels.rounding import on_grid


@triton.jit(do_not_specialize=["rows"])
def hadamard_kernel(x, y, rounded, rows, factor, DIM: tl.constexpr, STAGES: tl.constexpr, ROUND: tl.constexpr):
    """A unit is a row of DIM = 2^STAGES channels; butterflies of sums and differences. ``factor``: DIM^-0.5."""
    column = tl.arange(0, DIM)
    second = (tl.arange(0, 2) == 1)[None, :, None]
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * DIM + column
        wide = tl.load(x + at).to(tl.float32)
        for stage in tl.static_range(STAGES):
            pairs = tl.reshape(wide, (DIM // 2 // 2**stage, 2, 2**stage))
            total = tl.sum(pairs, axis=1)[:, None, :]
            difference = tl.sum(tl.where(second, -pairs, pairs), axis=1)[:, None, :]
            wide = tl.reshape(tl.where(second, difference, total), (DIM,))
        done = (wide * factor).to(y.dtype.element_ty)
        tl.store(y + at, done)
        if ROUND:
            grid = on_grid(tl.reshape(done.to(tl.float32), (DIM // 32, 32)), True)
            tl.store(rounded + at, tl.reshape(grid, (DIM,)).to(y.dtype.element_ty))
