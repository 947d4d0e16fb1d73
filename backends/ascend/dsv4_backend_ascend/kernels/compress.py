"""``compress`` and ``cached_compress``: a softmax for each channel over a window of tokens, in one launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["units", "recent"])
def compress_kernel(
    kv_score, state, slots, ape, windows, y, units, recent,
    DIM: tl.constexpr, WIDTH: tl.constexpr, RATIO: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A unit is one of a window's PARTS of BLOCK channels, whose tokens pass one after another.

    The first ``recent`` tokens are state[slots[token]], a slot of -1 zeros, the others ``kv_score``. WIDTH = 2 DIM: the previous window's tokens use their
    first DIM channels, the current one's their last.
    """
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row = tl.cast(unit // PARTS, tl.int64)
        channel = (unit % PARTS) * BLOCK + tl.arange(0, BLOCK)
        inside = channel < DIM
        top = tl.full((BLOCK,), -3.0e38, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        mixed = tl.zeros((BLOCK,), tl.float32)
        for j in range(SPAN):
            token = tl.load(windows + row * SPAN + j)
            if token >= 0:
                half = channel + tl.where(j >= RATIO, DIM, 0)
                kv = tl.zeros((BLOCK,), tl.float32)
                score = tl.zeros((BLOCK,), tl.float32)
                if token >= recent:
                    now = kv_score + tl.cast(token - recent, tl.int64) * (2 * WIDTH) + half
                    kv = tl.load(now, mask=inside, other=0.0)
                    score = tl.load(now + WIDTH, mask=inside, other=0.0)
                else:
                    slot = tl.load(slots + token)
                    if slot >= 0:
                        then = state + tl.cast(slot, tl.int64) * (2 * WIDTH) + half
                        kv = tl.load(then, mask=inside, other=0.0)
                        score = tl.load(then + WIDTH, mask=inside, other=0.0)
                score = score + tl.load(ape + (j % RATIO) * WIDTH + half, mask=inside, other=0.0)
                higher = tl.maximum(top, score)
                kept = tl.exp(top - higher)
                share = tl.exp(score - higher)
                total = total * kept + share
                mixed = mixed * kept + share * kv
                top = higher
        out = mixed / tl.where(total == 0.0, 1.0, total)
        tl.store(y + row * DIM + channel, out.to(y.dtype.element_ty), mask=inside)
