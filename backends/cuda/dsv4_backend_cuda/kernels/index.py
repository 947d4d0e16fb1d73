"""The lightning indexer: scores of keys, plain or packed, and the selection of the best rows with ties to the lower one."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import parts
from dsv4_backend_cuda.kernels.formats import bf16_of_e2m1
from dsv4_backend_cuda.kernels.tiles import in_order
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2

SIDE_BY_SIDE = 1024  # programs of pieces: eight a multiprocessor, whose passes hide each other's waiting
PIECE = 8192  # rows of a piece, four blocks of a pass
LEAST_PIECES = 4  # fewer save less than the second launch and its list cost


@triton.jit(do_not_specialize=["seq", "rows", "tokens", "pieces"])
def index_scores_kernel(
    q, weights, keys, slots, scores, seq, heads, rows, tokens, pieces, scale,
    DIM: tl.constexpr, PACKED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program scores BLOCK keys for one token: relu per head, then the weighted sum over heads. PACKED: keys are cache rows keys[slots[b, n]].

    ``weights`` may come in ``pieces``.
    """
    token = tl.program_id(0).to(tl.int64)
    batch = token // seq
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.arange(0, BLOCK_H)
    live_h, live_n = h < heads, n < rows
    query = q + ((token * heads + h) * DIM)[:, None]
    if PACKED:
        WIDTH: tl.constexpr = DIM // 2 + DIM // 32
        byte = tl.arange(0, DIM // 2)
        slot = tl.load(slots + batch * rows + n, mask=live_n, other=-1)
        there = (slot >= 0)[:, None]
        row = slot.to(tl.int64)[:, None] * WIDTH
        code = tl.load(keys + row + byte[None, :], mask=there, other=0).to(tl.uint16)
        exponent = tl.load(keys + row + DIM // 2 + (byte // 16)[None, :], mask=there, other=127)
        even = tl.load(query + 2 * byte[None, :], mask=live_h[:, None], other=0.0)
        odd = tl.load(query + 2 * byte[None, :] + 1, mask=live_h[:, None], other=0.0)
        hit = tl.dot(even, tl.trans(bf16_of_e2m1(code, exponent)))
        hit = tl.dot(odd, tl.trans(bf16_of_e2m1(code >> 4, exponent)), hit)
    else:
        c = tl.arange(0, DIM)
        key = tl.load(keys + (batch * rows + n)[:, None] * DIM + c[None, :], mask=live_n[:, None], other=0.0)
        hit = tl.dot(tl.load(query + c[None, :], mask=live_h[:, None], other=0.0), tl.trans(key))
    share = in_order(weights, token * heads + h, live_h, tl.cast(tokens, tl.int64) * heads, pieces) * scale
    tl.store(scores + token * rows + n, tl.sum(tl.maximum(hit, 0.0, propagate_nan=tl.PropagateNan.ALL) * share[:, None], axis=0), mask=live_n)


@triton.jit
def sortable(scores, listed, n, count, LISTED: tl.constexpr):
    """Rows n of a token (LISTED: listed[n], -1 for none) and their scores as unsigned integers of the same order, NaN above all, -0 as +0; what is not
    there is 0, below all.
    """
    row = n
    if LISTED:
        row = tl.load(listed + n, mask=n < count, other=-1)
    live = (row >= 0) & (n < count)
    x = tl.load(scores + row, mask=live, other=0.0) + 0.0
    x = tl.where(x != x, float("inf"), x)
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return row, tl.where(live, key, 0)


@triton.jit
def radix_pass(scores, listed, count, bound, left, LISTED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Fix the eight bits from SHIFT on of the bound, the ``left``-th largest of the keys that agree with it above them; give it and what is left of ``left``."""
    histogram = tl.zeros((256,), tl.int32)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        _, key = sortable(scores, listed, n, count, LISTED)
        alike = key != 0
        if SHIFT < 24:
            alike = alike & ((key >> (SHIFT + 8)) == (bound >> (SHIFT + 8)))
        histogram += tl.histogram(((key >> SHIFT) & 0xFF).to(tl.int32), 256, mask=alike)
    above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # keys with a larger digit
    chosen = tl.minimum(tl.sum((above >= left).to(tl.int32), axis=0), 255)  # the largest digit with fewer than ``left`` above it
    left -= tl.sum(tl.where(tl.arange(0, 256) == chosen, above, 0), axis=0)
    return bound | (chosen.to(tl.uint32) << SHIFT), left


@triton.jit(do_not_specialize=["rows", "topk", "length"])
def index_select_kernel(scores, visible, offset, listed, picks, rows, topk, length, WHOLE: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """A program picks of one token's rows: the k-th key by radix, eight bits a pass, then all above it and the first of its equals, in order.

    WHOLE: of all rows, and ``offset`` is added; else of piece program_id(1), ``length`` rows. LISTED: of the ``length`` rows that the pieces' programs
    picked, which are in rising order, so that the first of equals is still the lowest.
    """
    token = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + token)
    seen = tl.minimum(seen, rows)
    first, base, count = 0, 0, seen
    if WHOLE:
        base = tl.load(offset + token)
        picks += token * topk
    else:
        first = tl.program_id(1) * length
        count = tl.minimum(tl.maximum(seen - first, 0), length)
        base = first
        picks += (token * tl.num_programs(1) + tl.program_id(1)) * topk
    wanted = tl.minimum(count, topk)
    scores += token * rows + first
    if LISTED:
        count = length
        listed += token * length
    bound, left = radix_pass(scores, listed, count, tl.zeros((), tl.uint32), wanted, LISTED, 24, BLOCK)
    bound, left = radix_pass(scores, listed, count, bound, left, LISTED, 16, BLOCK)
    bound, left = radix_pass(scores, listed, count, bound, left, LISTED, 8, BLOCK)
    bound, left = radix_pass(scores, listed, count, bound, left, LISTED, 0, BLOCK)
    place, equals = 0, 0
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        row, key = sortable(scores, listed, n, count, LISTED)
        level = ((key == bound) & (key != 0)).to(tl.int32)
        early = level * ((equals + tl.cumsum(level, axis=0)) <= left).to(tl.int32)
        take = (key > bound).to(tl.int32) + early
        at = place + tl.cumsum(take, axis=0) - 1
        tl.store(picks + at, row + base, mask=(take > 0) & (at < wanted))
        place += tl.sum(take, axis=0)
        equals += tl.sum(level, axis=0)
    for start in range(0, topk, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tl.store(picks + k, tl.full((BLOCK,), -1, tl.int32), mask=(k >= wanted) & (k < topk))


def _scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor | None, rows: int, scale: float) -> torch.Tensor:
    batch, seq, heads, dim = q.shape
    scores, weights = torch.empty((batch, seq, rows), dtype=torch.float32, device=q.device), parts(weights)
    options = launch.options("index_scores", q)
    index_scores_kernel[(batch * seq, cdiv(rows, options["BLOCK"]))](
        q, weights, keys, weights if slots is None else slots, scores, seq, heads, rows,
        batch * seq, weights.shape[0], scale, DIM=dim, PACKED=slots is not None, BLOCK_H=max(16, next_power_of_2(heads)), **options,
    )  # fmt: skip
    return scores


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, *, scale: float) -> torch.Tensor:
    """``ops/attention.py: index_scores`` for BF16 q and keys, dim a power of two."""
    return _scores(q, weights, keys, None, keys.shape[1], scale)


def cached_index_scores(q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor, index: torch.Tensor, *, scale: float) -> torch.Tensor:
    """``index_scores`` over packed keys ``cache[index]`` (uint8), ``index`` [batch * rows] int32, -1 for a key of zeros."""
    return _scores(q, weights, cache, index, index.shape[0] // q.shape[0], scale)


def index_select(scores: torch.Tensor, visible: torch.Tensor, offset: torch.Tensor, *, topk: int) -> torch.Tensor:
    """``ops/attention.py: index_select``; picks come in rising order.

    A long context of few tokens is cut in pieces: each piece's best rows are picked side by side, and of those the best.
    """
    batch, seq, rows = scores.shape
    tokens = batch * seq
    picks = torch.empty((batch, seq, topk), dtype=torch.int32, device=scores.device)
    options, length = launch.options("index_select", scores), max(PIECE, 2 * next_power_of_2(topk))
    pieces = cdiv(rows, length)
    if tokens * pieces > SIDE_BY_SIDE or pieces < LEAST_PIECES:
        index_select_kernel[(tokens,)](scores, visible, offset, picks, picks, rows, topk, 0, WHOLE=True, LISTED=False, **options)
        return picks
    some = torch.empty((tokens, pieces * topk), dtype=torch.int32, device=scores.device)
    index_select_kernel[(tokens, pieces)](scores, visible, offset, picks, some, rows, topk, length, WHOLE=False, LISTED=False, **options)
    index_select_kernel[(tokens,)](scores, visible, offset, some, picks, rows, topk, pieces * topk, WHOLE=True, LISTED=True, **options)
    return picks


SPECS = (
    *(
        KernelSpec(
            name="index_scores",
            kernel=index_scores_kernel,
            looped=False,
            signature={"q": "*bf16", "weights": "*fp32", "keys": kind, "slots": "*i32", "scores": "*fp32", "seq": "i32", "heads": "i32:16", "rows": "i32",
                       "tokens": "i32", "pieces": "i32", "scale": "fp32"},
            variants={variant: {"DIM": 128, "PACKED": variant == "packed", "BLOCK_H": 64}},
            mma={80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC.*MMA", 120: "HMMA"},
            work=lambda c: Work(bytes=c["BLOCK"] * ((68 if c["PACKED"] else 256) + 4.0), flops=2.0 * 64 * 128 * c["BLOCK"]),
        )
        for variant, kind in (("plain", "*bf16"), ("packed", "*u8"))
    ),
    KernelSpec(
        name="index_select",
        kernel=index_select_kernel,
        signature={"scores": "*fp32", "visible": "*i32", "offset": "*i32", "listed": "*i32", "picks": "*i32", "rows": "i32", "topk": "i32", "length": "i32"},
        variants={"any": {"WHOLE": True, "LISTED": False}, "piece": {"WHOLE": False, "LISTED": False}, "listed": {"WHOLE": True, "LISTED": True}},
        work=lambda c: Work(bytes=4.0 * c["BLOCK"]),
    ),
)
