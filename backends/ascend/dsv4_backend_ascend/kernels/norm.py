"""``rms_norm`` with its result on the FP8 grid beside it; ``rms_norm_rope`` and ``apply_rope``."""

import triton
import triton.language as tl

from dsv4_backend_ascend.kernels.rounding import rounded_row


@triton.jit(do_not_specialize=["rows", "stride"])
def norm_kernel(
    x,
    weight,
    y,
    rounded,
    rows,
    stride,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROUND: tl.constexpr,
):
    """A unit is a row, read twice in parts of BLOCK channels: a whole one does not fit a core's memory. ``stride``: from one row of ``x`` to the next."""
    part = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        read = x + tl.cast(row, tl.int64) * stride
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, DIM, BLOCK):
            wide = tl.load(read + first + part, mask=first + part < DIM, other=0.0).to(tl.float32)
            squares += wide * wide
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / DIM + eps)
        for first in range(0, DIM, BLOCK):
            column = first + part
            inside = column < DIM
            wide = tl.load(read + column, mask=inside, other=0.0).to(tl.float32) * inverse
            if WEIGHTED:
                wide = wide * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            done = wide.to(y.dtype.element_ty)
            at = tl.cast(row, tl.int64) * DIM + column
            tl.store(y + at, done, mask=inside)
            if ROUND:
                tl.store(rounded + at, rounded_row(done, BLOCK), mask=inside)


@triton.jit(do_not_specialize=["rows", "heads"])
def rope_kernel(
    x, weight, cosine, sine, y, rows, heads, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, TURNED: tl.constexpr, NORM: tl.constexpr, WEIGHTED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """A unit is a row, ``heads`` of them a token: normed if NORM, rounded to BF16, and its last TURNED channels turned in pairs of neighbours.

    A channel's partner is the next or the one before: both are loaded as whole runs. ``cosine`` and ``sine`` [tokens, TURNED] repeat for the two of a pair.
    """
    PLAIN: tl.constexpr = DIM - TURNED
    column = tl.arange(0, BLOCK)
    j = tl.arange(0, TURNED)
    even = (j & 1) == 0  # a remainder would be taken element by element
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        first = tl.cast(row, tl.int64) * DIM
        whole = tl.load(x + first + column, mask=column < DIM, other=0.0)
        tail = first + PLAIN + j
        own = tl.load(x + tail)
        after = tl.load(x + tail + 1, mask=j < TURNED - 1, other=0.0)
        before = tl.load(x + tail - 1, mask=j > 0, other=0.0)
        if NORM:
            wide = whole.to(tl.float32)
            inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / DIM + eps)
            wide = wide * inverse
            a, b, c = own.to(tl.float32) * inverse, after.to(tl.float32) * inverse, before.to(tl.float32) * inverse
            if WEIGHTED:
                wide = wide * tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
                a = a * tl.load(weight + PLAIN + j).to(tl.float32)
                b = b * tl.load(weight + PLAIN + j + 1, mask=j < TURNED - 1, other=0.0).to(tl.float32)
                c = c * tl.load(weight + PLAIN + j - 1, mask=j > 0, other=0.0).to(tl.float32)
            kind = y.dtype.element_ty
            whole, own, after, before = wide.to(kind), a.to(kind), b.to(kind), c.to(kind)
        if PLAIN > 0:
            tl.store(y + first + column, whole, mask=column < PLAIN)
        angle = tl.cast(row // heads, tl.int64) * TURNED + j
        sin = tl.load(sine + angle)
        if INVERSE:
            sin = -sin
        partner = tl.where(even, -after.to(tl.float32), before.to(tl.float32))
        turned = own.to(tl.float32) * tl.load(cosine + angle) + partner * sin
        tl.store(y + tail, turned.to(y.dtype.element_ty))
