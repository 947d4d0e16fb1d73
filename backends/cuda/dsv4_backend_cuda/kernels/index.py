"""The lightning indexer: scores of keys, plain or packed, and the selection of the best rows with ties to the lower one."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels.formats import bf16_of_e2m1
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["seq", "rows"])
def index_scores_kernel(
    q, weights, keys, slots, scores, seq, heads, rows, scale,
    DIM: tl.constexpr, PACKED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program scores BLOCK keys for one token: relu per head, then the weighted sum over heads. PACKED: keys are cache rows keys[slots[b, n]]."""
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
    share = tl.load(weights + token * heads + h, mask=live_h, other=0.0) * scale
    tl.store(scores + token * rows + n, tl.sum(tl.maximum(hit, 0.0, propagate_nan=tl.PropagateNan.ALL) * share[:, None], axis=0), mask=live_n)


@triton.jit
def sortable(scores, n, visible):
    """Scores as unsigned integers of the same order, NaN above all, -0 as +0; what is not visible is 0, below all."""
    x = tl.load(scores + n, mask=n < visible, other=0.0) + 0.0
    x = tl.where(x != x, float("inf"), x)
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(n < visible, key, 0)


@triton.jit
def radix_pass(scores, count, bound, left, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Fix the eight bits from SHIFT on of the bound, the ``left``-th largest of the keys that agree with it above them; give it and what is left of ``left``."""
    histogram = tl.zeros((256,), tl.int32)
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        key = sortable(scores, n, count)
        alike = n < count
        if SHIFT < 24:
            alike = alike & ((key >> (SHIFT + 8)) == (bound >> (SHIFT + 8)))
        histogram += tl.histogram(((key >> SHIFT) & 0xFF).to(tl.int32), 256, mask=alike)
    above = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0)  # keys with a larger digit
    chosen = tl.minimum(tl.sum((above >= left).to(tl.int32), axis=0), 255)  # the largest digit with fewer than ``left`` above it
    left -= tl.sum(tl.where(tl.arange(0, 256) == chosen, above, 0), axis=0)
    return bound | (chosen.to(tl.uint32) << SHIFT), left


@triton.jit(do_not_specialize=["rows", "topk"])
def index_select_kernel(scores, visible, offset, picks, rows, topk, BLOCK: tl.constexpr):
    """A program picks one token's rows: the k-th key by radix, eight bits a pass, then all above it and the first of its equals, in order."""
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(visible + token)
    count = tl.minimum(count, rows)
    base = tl.load(offset + token)
    scores += token * rows
    picks += token * topk
    wanted = tl.minimum(count, topk)
    bound, left = radix_pass(scores, count, tl.zeros((), tl.uint32), wanted, 24, BLOCK)
    bound, left = radix_pass(scores, count, bound, left, 16, BLOCK)
    bound, left = radix_pass(scores, count, bound, left, 8, BLOCK)
    bound, left = radix_pass(scores, count, bound, left, 0, BLOCK)
    place, equals = 0, 0
    for start in range(0, count, BLOCK):
        n = start + tl.arange(0, BLOCK)
        key = sortable(scores, n, count)
        level = ((key == bound) & (n < count)).to(tl.int32)
        first = level * ((equals + tl.cumsum(level, axis=0)) <= left).to(tl.int32)
        take = ((key > bound) & (n < count)).to(tl.int32) + first
        at = place + tl.cumsum(take, axis=0) - 1
        tl.store(picks + at, n + base, mask=(take > 0) & (at < wanted))
        place += tl.sum(take, axis=0)
        equals += tl.sum(level, axis=0)
    for start in range(0, topk, BLOCK):
        k = start + tl.arange(0, BLOCK)
        tl.store(picks + k, tl.full((BLOCK,), -1, tl.int32), mask=(k >= wanted) & (k < topk))


def _scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor | None, rows: int, scale: float) -> torch.Tensor:
    batch, seq, heads, dim = q.shape
    scores = torch.empty((batch, seq, rows), dtype=torch.float32, device=q.device)
    options = launch.options("index_scores", q)
    index_scores_kernel[(batch * seq, cdiv(rows, options["BLOCK"]))](
        q, weights, keys, weights if slots is None else slots, scores, seq, heads, rows, scale,
        DIM=dim, PACKED=slots is not None, BLOCK_H=max(16, next_power_of_2(heads)), **options,
    )  # fmt: skip
    return scores


def index_scores(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, *, scale: float) -> torch.Tensor:
    """``ops/attention.py: index_scores`` for BF16 q and keys, dim a power of two."""
    return _scores(q, weights, keys, None, keys.shape[1], scale)


def cached_index_scores(q: torch.Tensor, weights: torch.Tensor, cache: torch.Tensor, index: torch.Tensor, *, scale: float) -> torch.Tensor:
    """``index_scores`` over packed keys ``cache[index]`` (uint8), ``index`` [batch * rows] int32, -1 for a key of zeros."""
    return _scores(q, weights, cache, index, index.shape[0] // q.shape[0], scale)


def index_select(scores: torch.Tensor, visible: torch.Tensor, offset: torch.Tensor, *, topk: int) -> torch.Tensor:
    """``ops/attention.py: index_select``; picks come in rising order."""
    batch, seq, rows = scores.shape
    picks = torch.empty((batch, seq, topk), dtype=torch.int32, device=scores.device)
    index_select_kernel[(batch * seq,)](scores, visible, offset, picks, rows, topk, **launch.options("index_select", scores))
    return picks


SPECS = (
    *(
        KernelSpec(
            name="index_scores",
            kernel=index_scores_kernel,
            looped=False,
            signature={"q": "*bf16", "weights": "*fp32", "keys": kind, "slots": "*i32", "scores": "*fp32", "seq": "i32", "heads": "i32:16", "rows": "i32", "scale": "fp32"},
            variants={variant: {"DIM": 128, "PACKED": variant == "packed", "BLOCK_H": 64}},
            mma={80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC.*MMA", 120: "HMMA"},
            work=lambda c: Work(bytes=c["BLOCK"] * ((68 if c["PACKED"] else 256) + 4.0), flops=2.0 * 64 * 128 * c["BLOCK"]),
        )
        for variant, kind in (("plain", "*bf16"), ("packed", "*u8"))
    ),
    KernelSpec(
        name="index_select",
        kernel=index_select_kernel,
        signature={"scores": "*fp32", "visible": "*i32", "offset": "*i32", "picks": "*i32", "rows": "i32", "topk": "i32"},
        variants={"any": {}},
        work=lambda c: Work(bytes=4.0 * c["BLOCK"]),
    ),
)
