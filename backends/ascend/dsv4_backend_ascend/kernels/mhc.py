"""``hc_pre`` and ``hc_pre_norm`` after their product: Sinkhorn, the weighted sum of streams, the norm, in one launch."""

import triton
import triton.language as tl

from dsv4_backend_ascend.kernels.rounding import rounded_row


@triton.jit
def mixed(streams, pre, column, DIM: tl.constexpr, BLOCK: tl.constexpr, HC: tl.constexpr):
    """Channels of the weighted sum of a token's streams, float32."""
    j = tl.arange(0, HC)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in tl.static_range(HC):
        share = tl.sum(tl.where(j == n, pre, 0.0), axis=0)
        total += share * tl.load(streams + n * DIM + column, mask=column < DIM, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["tokens", "iters"])
def mix_kernel(
    h, mixes, scale, base, weight, y, post, comb, rounded, tokens, norm_eps, eps, iters,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HC: tl.constexpr, NORM: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """A unit is a token: ``mixes`` [tokens, HC * (2 + HC)] are its product with the streams, which are not normed yet. HC is a power of two.

    Streams are read two or three times in parts of BLOCK channels: a whole row does not fit a core's memory.
    """
    MIXES: tl.constexpr = HC * (2 + HC)
    j = tl.arange(0, HC)
    cell = j[:, None] * HC + j[None, :]
    part = tl.arange(0, BLOCK)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        streams = h + tl.cast(token, tl.int64) * (HC * DIM)
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, HC * DIM, BLOCK):
            x = tl.load(streams + first + part, mask=first + part < HC * DIM, other=0.0).to(tl.float32)
            squares += x * x
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / (HC * DIM) + norm_eps)
        product = mixes + tl.cast(token, tl.int64) * MIXES
        mix = tl.load(product + j) * inverse * tl.load(scale) + tl.load(base + j)
        pre = 1.0 / (1.0 + tl.exp(-mix)) + eps
        mix = tl.load(product + HC + j) * inverse * tl.load(scale + 1) + tl.load(base + HC + j)
        tl.store(post + tl.cast(token, tl.int64) * HC + j, 2.0 / (1.0 + tl.exp(-mix)))
        logits = tl.load(product + 2 * HC + cell) * inverse * tl.load(scale + 2) + tl.load(base + 2 * HC + cell)
        e = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        matrix = e / tl.sum(e, axis=1)[:, None] + eps
        matrix = matrix / (tl.sum(matrix, axis=0) + eps)[None, :]
        for _ in range(iters - 1):
            matrix = matrix / (tl.sum(matrix, axis=1) + eps)[:, None]
            matrix = matrix / (tl.sum(matrix, axis=0) + eps)[None, :]
        tl.store(comb + tl.cast(token, tl.int64) * (HC * HC) + cell, matrix)
        squares = tl.zeros((BLOCK,), tl.float32)
        if NORM:  # of the row as it would be handed on, in BF16
            for first in range(0, DIM, BLOCK):
                total = mixed(streams, pre, first + part, DIM, BLOCK, HC).to(y.dtype.element_ty).to(tl.float32)
                squares += total * total
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / DIM + norm_eps)
        for first in range(0, DIM, BLOCK):
            column = first + part
            total = mixed(streams, pre, column, DIM, BLOCK, HC)
            if NORM:
                total = total.to(y.dtype.element_ty).to(tl.float32) * inverse
                total = total * tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
            done = total.to(y.dtype.element_ty)
            at = tl.cast(token, tl.int64) * DIM + column
            tl.store(y + at, done, mask=column < DIM)
            if ROUND:
                tl.store(rounded + at, rounded_row(done, BLOCK), mask=column < DIM)
