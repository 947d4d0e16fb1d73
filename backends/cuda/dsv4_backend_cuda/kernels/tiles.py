"""Tiles of rows that are grouped by expert; several weights in one launch; sums that several programs take in pieces."""

import triton
import triton.language as tl


@triton.jit
def locate(pid, offsets, rows, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tile ``pid`` of rows sorted by expert -> (expert, first row, end row); the ``rows`` end with other ranks', one more group, expert EXPERTS."""
    e = tl.arange(0, SLOTS)
    start = tl.load(offsets + e, mask=e <= EXPERTS, other=0)
    stop = tl.load(offsets + e + 1, mask=e < EXPERTS, other=0)
    stop = tl.where(e == EXPERTS, rows, stop)
    tiles = tl.where(e <= EXPERTS, (stop - start + BLOCK_T - 1) // BLOCK_T, 0)
    after = tl.cumsum(tiles, axis=0)
    expert = tl.sum((after <= pid).to(tl.int32), axis=0)
    mine = e == expert
    row = tl.sum(tl.where(mine, start + (pid - (after - tiles)) * BLOCK_T, 0), axis=0)
    return expert, row, tl.sum(tl.where(mine, stop, 0), axis=0)


@triton.jit
def following(tile, tiles, w, ws, y, N, stride, w2, ws2, y2, N2, stride2):
    """Tile and operands of a product with several weights: from ``tiles``, those of the weight so far, on it is the next one's."""
    if tile >= tiles:
        tile -= tiles
        w, ws, y, N, stride = w2, ws2, y2, N2, stride2
    return tile, w, ws, y, N, stride


@triton.jit
def in_order(partial, at, inside, stride, pieces):
    """Sum of the pieces of a product at ``at``, first to last; a piece is ``stride`` elements."""
    total = tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)
    for piece in range(1, pieces):
        total += tl.load(partial + piece * stride + at, mask=inside, other=0.0)
    return total
