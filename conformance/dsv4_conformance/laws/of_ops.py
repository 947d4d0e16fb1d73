"""Laws of single ops: routing, dispatch, experts over ranks, Sinkhorn. Each returns None, or what
is wrong.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv4_conformance.laws.of_models import NATIVE_STEP, differ, differing_bits
from dsv4_conformance.verdict.budget import SAFETY, roundoff
from dsv4_core.contract.dtypes import (
    BFLOAT16,
    FP4_GROUP,
    KV_BLOCK,
    Experts,
    Host,
    RowLayout,
    numpy_dtype,
    quantise_weight,
)
from dsv4_core.contract.ops import EveryOp

if TYPE_CHECKING:
    from dsv4_conformance.laws.small_model import Stage
    from dsv4_core.contract.backend import Backend

DIM, INTER, EXPERTS, LIMIT = 128, 128, 6, 10.0
HC, EPS = 4, 1e-6


def _experts(rng: np.random.Generator) -> list[Experts]:
    """w1, w3, w2 of every expert."""
    shapes = ((INTER, DIM), (INTER, DIM), (DIM, INTER))
    return [
        Experts([quantise_weight(rng.standard_normal(s) * s[1] ** -0.5, "e2m1") for _ in range(EXPERTS)])
        for s in shapes
    ]


def _tokens(rng: np.random.Generator, backend: Backend, tokens: int) -> Host:
    return rng.standard_normal((tokens, DIM)).astype(numpy_dtype(backend.activation_dtype))


def _moe(backend: Backend, x: Host, weights: Any, indices: Host, experts: list[Experts], first: int) -> Host:
    """Routed experts alone, wide, on the host."""
    loaded = [backend.load_experts(e) for e in experts]
    y = backend.moe(
        backend.from_numpy(x),
        weights,
        backend.from_numpy(indices),
        None,
        *loaded,
        first_expert=first,
        limit=LIMIT,
        out_dtype=backend.wide_dtype,
    )
    return np.asarray(backend.to_numpy(y))


def expert_permutation(stage: Stage, *, tokens: int, topk: int, seed: int) -> str | None:
    """Experts in another order, with their rows of the gate and their biases, give the same
    result.
    """
    be, rng = stage.exact, np.random.default_rng(seed)
    x, experts = _tokens(rng, be, tokens), _experts(rng)
    gate = (rng.standard_normal((EXPERTS, DIM)) * DIM**-0.5).astype(numpy_dtype("bfloat16"))
    bias = (0.1 * rng.standard_normal(EXPERTS)).astype(np.float32)
    order = rng.permutation(EXPERTS)
    results = []
    for order_ in (np.arange(EXPERTS), order):
        loaded = be.load(np.ascontiguousarray(gate[order_])), be.load(np.ascontiguousarray(bias[order_]))
        weights, indices = be.gate(be.from_numpy(x), *loaded, topk=topk, route_scale=1.5)
        ordered = [Experts([e[int(i)] for i in order_]) for e in experts]
        results.append(_moe(be, x, weights, np.asarray(be.to_numpy(indices)), ordered, 0))
    return differ(results[1], results[0], stage.tolerance((0,)), f"experts in the order {order.tolist()}")


def experts_over_ranks(stage: Stage, *, tokens: int, cuts: list[int], seed: int) -> str | None:
    """The sum over ranks, each with some of the experts, is what one rank gives; a rank whose
    experts nobody chose gives zeros.
    """
    be, rng = stage.exact, np.random.default_rng(seed)
    edges = sorted({0, EXPERTS, *(1 + c % (EXPERTS - 1) for c in cuts)})
    ranks = list(pairwise(edges))
    idle = ranks[int(rng.integers(len(ranks)))] if len(ranks) > 1 else (EXPERTS, EXPERTS)
    used = [e for e in range(EXPERTS) if not idle[0] <= e < idle[1]]
    topk = min(2, len(used))
    indices = np.array([rng.permutation(used)[:topk] for _ in range(tokens)], np.int32).reshape(tokens, topk)
    x, experts = _tokens(rng, be, tokens), _experts(rng)
    weights = be.from_numpy(rng.random((tokens, topk)).astype(numpy_dtype(be.wide_dtype)))
    parts = {
        (a, b): _moe(be, x, weights, indices, [Experts(list(e)[a:b]) for e in map(_listed, experts)], a)
        for a, b in ranks
    }
    if idle in parts and np.any(parts[idle] != 0):
        return (
            f"rank with experts {idle[0]} .. {idle[1] - 1}, which no token chose, gives "
            f"{int(np.count_nonzero(parts[idle]))} elements that are not 0"
        )
    want = _moe(be, x, weights, indices, experts, 0)
    got = np.sum([p.astype(np.float64) for p in parts.values()], axis=0)
    return differ(got, want, stage.tolerance((0,)), f"experts split at {edges[1:-1]}, summed over ranks")


def _listed(experts: Experts) -> list[Any]:
    return [experts[i] for i in range(experts.shape[0])]


def combine_undoes_dispatch(stage: Stage, *, tokens: int, topk: int, seed: int) -> str | None:
    """Dispatched and combined untouched, every token comes back: as many times as it was copied,
    bit for bit (powers of two, so that no sum rounds).
    """
    be, rng = stage.own, np.random.default_rng(seed)
    topk = (1, 2, 4)[topk % 3]
    x = _tokens(rng, be, tokens)
    indices = np.array([rng.permutation(EXPERTS)[:topk] for _ in range(tokens)], np.int32).reshape(tokens, topk)
    weights = rng.random((tokens, topk)).astype(numpy_dtype(be.wide_dtype))
    rows, _, order, offsets = be.dispatch(*map(be.from_numpy, (x, weights, indices)), first_expert=0, n_experts=EXPERTS)
    y = be.combine(rows, order, offsets, None, topk=topk, out_dtype=be.activation_dtype)
    return differing_bits(
        np.asarray(be.to_numpy(y)), (x * x.dtype.type(topk)).astype(x.dtype), f"{tokens} tokens, {topk} copies each"
    )


def sinkhorn(stage: Stage, *, tokens: int, spread: int, seed: int) -> str | None:
    """``comb`` is nearly doubly stochastic: columns, divided last, sum to one but for eps; rows by
    Birkhoff's theorem.

    Scaling rows, then columns, of a positive matrix brings the row sums nearer to each other by
    tanh(D/4)^2 in Hilbert's metric, where D is the largest |log| of a ratio K[i,j] K[k,l] / (K[i,l]
    K[k,j]). ``spread``: the mixes lie between -spread/4 and spread/4.
    """
    be, rng = stage.own, np.random.default_rng(seed)
    iters, wide = 20, numpy_dtype(be.wide_dtype)
    mixes = rng.uniform(-spread / 4, spread / 4, (tokens, HC * (HC + 2))).astype(wide)
    scale, base = np.ones(3, np.float32), np.zeros(HC * (HC + 2), np.float32)
    operands = (be.from_numpy(mixes), be.load(scale), be.load(base))
    comb = np.asarray(be.to_numpy(be.hc_split_sinkhorn(*operands, hc=HC, eps=EPS, iters=iters)[2])).astype(np.float64)
    rounding = SAFETY * roundoff(be.wide_dtype) * HC
    columns = np.abs(comb.sum(1) - 1)
    if not (columns <= 2 * EPS + rounding).all():
        t, n = (int(i) for i in np.argwhere(~(columns <= 2 * EPS + rounding))[0])
        return (
            f"token {t}: column {n} of comb sums to {comb[t, :, n].sum():.9g}; "
            f"columns are divided last and sum to 1 within {2 * EPS + rounding:.3g}"
        )
    logits = mixes[:, 2 * HC :].astype(np.float64).reshape(-1, HC, HC)
    kernel = np.exp(logits - logits.max(-1, keepdims=True))
    kernel = np.log(kernel / kernel.sum(-1, keepdims=True) + EPS)
    cross = (
        kernel[:, :, None, :, None]
        + kernel[:, None, :, None, :]
        - kernel[:, :, None, None, :]
        - kernel[:, None, :, :, None]
    )
    contraction = np.tanh(np.abs(cross).max((1, 2, 3, 4)) / 4) ** 2
    first = np.exp(kernel) / np.exp(kernel).sum(1, keepdims=True)
    apart = np.log(first.sum(2)).max(-1) - np.log(first.sum(2)).min(-1)
    bound = np.expm1(apart * contraction ** (iters - 1)) + iters * (2 * EPS + rounding)
    rows = np.abs(comb.sum(2) - 1).max(-1)
    if not (rows <= bound).all():
        t = int(np.argmax(~(rows <= bound)))
        return (
            f"token {t}: rows of comb sum to {np.round(comb[t].sum(1), 7).tolist()}; "
            f"after {iters} iterations they are within {bound[t]:.3g} of 1"
        )
    return None


def packing_rounds(stage: Stage, *, tokens: int, keys: int, seed: int) -> str | None:
    """What is read back of a packed row is ``act_qdq`` of what was written, so that the graph need
    not round rows that only a packed cache reads. ``keys``: the indexer's rows, not key/value rows.
    """
    be, rng = stage.own, np.random.default_rng(seed)
    kind: Literal["kv", "key"] = "key" if keys else "kv"
    form, block, turned = ("e2m1", FP4_GROUP, 0) if keys else ("e4m3", KV_BLOCK, 64)
    packed = be.numerics == "native"
    layout = RowLayout(kind, DIM, turned) if packed else RowLayout("plain", DIM)
    x = (_tokens(rng, be, tokens) * 2.0 ** rng.integers(-12, 13, (tokens, 1))).astype(numpy_dtype(be.activation_dtype))
    cache = be.zeros((tokens, layout.width), "uint8" if packed else be.activation_dtype)
    index = be.from_numpy(np.arange(tokens, dtype=np.int32))
    back = be.cache_read(be.cache_write(cache, be.from_numpy(x), index, layout=layout), index, layout=layout)
    want = be.act_qdq(be.from_numpy(x), format=form, block=block, channels=DIM - turned)  # type: ignore[arg-type]
    got, want = np.asarray(be.to_numpy(back)), np.asarray(be.to_numpy(want))
    wrong = int((got != want).sum())
    return f"{wrong} of {got.size} channels of {kind} rows read back are not act_qdq's" if wrong else None


def fused_is_composed(stage: Stage, *, tokens: int, seed: int) -> str | None:
    """A backend's own way of a fused op gives what the op's default makes of the backend's required
    ops: to the bit where the same sums are taken of rows that lie elsewhere, else to the mode's
    rounding.
    """
    bounds = ((stage.own, NATIVE_STEP), (stage.exact, stage.tolerance((0,))))
    return next(filter(None, (_fused(be, tokens, seed, bound) for be, bound in bounds)), None)


def _fused(be: Backend, tokens: int, seed: int, bound: float) -> str | None:
    rng = np.random.default_rng(seed)
    act, wide = (numpy_dtype(name) for name in (be.activation_dtype, be.wide_dtype))

    def array(*shape: int, dtype: Any = act) -> Any:
        return be.from_numpy(rng.standard_normal(shape).astype(dtype))

    def weight(*shape: int, dtype: Any = BFLOAT16) -> Any:
        return be.load(rng.standard_normal(shape).astype(dtype))

    def numbers(low: int, high: int, *shape: int) -> Any:
        return be.from_numpy(rng.integers(low, high, shape).astype(np.int32))

    freqs = be.from_numpy((1e4 ** (-np.arange(32) / 32)).astype(np.float32))
    window = numbers(-1, tokens + 9, tokens, 8)
    calls: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = (
        ("rms_norm_rope", (array(tokens, 2, DIM), weight(DIM), numbers(0, 9999, tokens), freqs), {"eps": EPS}),
        ("kv_score", (array(tokens, DIM), weight(64, DIM), weight(64, DIM)), {}),
        (
            "cached_compress",
            (
                array(tokens, 2 * DIM, dtype=wide),
                array(12, 2 * DIM, dtype=wide),
                numbers(-1, 12, 9),
                weight(4, DIM, dtype=np.float32),
                window,
            ),
            {"dim": DIM // 2},
        ),
    )
    for op, operands, scalars in calls:
        own, composed = getattr(be, op)(*operands, **scalars), getattr(EveryOp, op)(be, *operands, **scalars)
        got, want = (np.asarray(be.to_numpy(y)).reshape(tokens, -1) for y in (own, composed))
        what = f"{op} and its parts, {be.numerics}"
        if problem := differing_bits(got, want, what) if op == "cached_compress" else differ(got, want, bound, what):
            return problem
    return None
