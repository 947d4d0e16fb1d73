"""``gate`` and ``gate_hash`` after the router's product, in one launch."""

import triton
import triton.language as tl


@triton.jit
def sqrt_softplus(x):
    """sqrt(log(1 + e^x)). The logarithm's argument is rounded, and so is what is divided by: the two errors leave together."""
    e = tl.exp(-tl.abs(x))
    sum_ = 1.0 + e
    less = sum_ - 1.0
    small = tl.where(less == 0.0, e, tl.log(sum_) * (e / tl.where(less == 0.0, 1.0, less)))
    return tl.sqrt(tl.maximum(x, 0.0) + small)


@triton.jit(do_not_specialize=["tokens"])
def gate_kernel(
    logits, bias, tid2eid, ids, weights, picks, tokens, route_scale,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, TOPK: tl.constexpr, PADDED: tl.constexpr, HASH: tl.constexpr,
):  # fmt: skip
    """A unit is a token: its TOPK best experts by score and ``bias``, of equals the lower; or those of its id."""
    expert = tl.arange(0, BLOCK)
    k = tl.arange(0, PADDED)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = tl.cast(token, tl.int64)
        scores = sqrt_softplus(tl.load(logits + row * EXPERTS + expert, mask=expert < EXPERTS, other=0.0))
        if not HASH:
            left = tl.where(
                expert < EXPERTS, scores + tl.load(bias + expert, mask=expert < EXPERTS, other=0.0), float("-inf")
            )
        chosen = tl.zeros((PADDED,), tl.int32)
        shares = tl.zeros((PADDED,), tl.float32)
        for n in range(TOPK):
            if HASH:
                pick = tl.load(tid2eid + tl.cast(tl.load(ids + token), tl.int64) * TOPK + n).to(tl.int32)
            else:
                best = tl.max(left, axis=0)
                pick = tl.min(tl.where(left == best, expert, BLOCK), axis=0)
                left = tl.where(expert == pick, float("-inf"), left)
            chosen = tl.where(k == n, pick, chosen)
            shares = tl.where(k == n, tl.sum(tl.where(expert == pick, scores, 0.0), axis=0), shares)
        shares = shares / tl.sum(shares, axis=0) * route_scale
        tl.store(weights + row * TOPK + k, shares, mask=k < TOPK)
        tl.store(picks + row * TOPK + k, chosen, mask=k < TOPK)
