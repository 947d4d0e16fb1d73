"""Launchers bound to the contracts, for what ``rules`` lets through. Importing this imports Triton
and the kernels.

Operands may be views, kernels take contiguous ones: ``contiguous`` is free in the graph, whose
arrays all are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import (
    Attended,
    Carrying,
    Grid,
    Gridded,
    Normed,
    Product,
    Shared,
    Sum,
    Waiting,
    awaited,
    carrying,
    settle,
    waiting,
)
from dsv4_backend_cuda.kernels import (
    add_pieces,
    cache,
    compress,
    dense_matmul,
    index,
    input_matmul,
    mhc,
    moe,
    moe_matmul,
    norm,
    norm_rope,
    quant,
    rope,
    scaled_matmul,
    sparse_attn,
    unpack,
)
from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, KV_BLOCK, Experts, RowLayout, ScaledArray
from dsv4_core.contract.ops.attention import SCORES_AT_ONCE

PARTIALS = 1 << 24  # elements of attention's pieces that exist at a time: 64 MB
MODULES = (
    add_pieces,
    cache,
    norm,
    norm_rope,
    rope,
    quant,
    scaled_matmul,
    dense_matmul,
    input_matmul,
    moe_matmul,
    moe,
    compress,
    index,
    unpack,
    sparse_attn,
    mhc,
)
"""Every kernel module; their ``SPECS`` say what is compiled."""


class Settings(Protocol):
    """What launchers ask of the backend."""

    batch_invariant: bool
    few_tokens: int


Quantised = tuple[Tensor, Tensor]
Mixed = tuple[Tensor, Tensor, Tensor]


def _few(be: Settings, array: Tensor) -> Tensor:
    """``array``, which may wait for its reader if it is of few tokens: of many, what each reader
    would do again costs more than a launch, and bits could depend on their number.
    """
    if be.batch_invariant or array.shape[0] > be.few_tokens:
        settle(array)
    return array


def _fp4(weight: ScaledArray) -> bool:
    return weight.format == "e2m1"


def _quantise(x: Tensor, *, fp4: bool) -> Quantised:
    """Codes of an activation in the order that its weight's format asks for, and scale bytes: the
    norm's that made it, or new ones.
    """
    paired = scaled_matmul.paired(x, fp4=fp4)
    known: dict[bool, Quantised] = getattr(x, "codes", {})
    if paired in known:
        return known[paired]
    return quant.act_quant(x.contiguous(), block=FP8_BLOCK, paired=paired)


def _with_codes(y: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The result of a norm with its FP8 codes [orders, tokens, dim], which its own launch made."""
    return carrying(y, codes={bool(paired): (part, scales) for paired, part in enumerate(codes)})


def _parts(weight: ScaledArray) -> scaled_matmul.Weight:
    return weight.data.contiguous(), weight.scale.contiguous()


def _product(
    be: Settings, x: Quantised, weight: ScaledArray, out_dtype: torch.dtype, room: Tensor | None = None
) -> Tensor:
    how = {"out_dtype": out_dtype, "fp4": _fp4(weight), "split": not be.batch_invariant, "room": room}
    return scaled_matmul.linear(*x, *_parts(weight), **how)


def _stack(weight: Any) -> ScaledArray:
    return weight.stack  # type: ignore[no-any-return] # every Experts that this backend loads is one stack


def rms_norm(be: Settings, x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    del be
    if weight is not None and x.shape[1] % FP8_BLOCK == 0:
        y, *codes = norm.rms_norm_quant(x, weight.contiguous(), eps=eps)
        return _with_codes(y, codes[0][None], codes[1])
    return norm.rms_norm(x, None if weight is None else weight.contiguous(), eps=eps)


def apply_rope(be: Settings, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool) -> Tensor:
    positions, freqs = positions.contiguous(), freqs.contiguous()
    if inverse and (of := awaited(x, Attended)):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sparse_attn.combine(of, y, positions, freqs)
        return y
    return _few(be, rope.apply_rope(x.contiguous(), positions, freqs, inverse=inverse))


def rms_norm_rope(
    be: Settings, x: Tensor, weight: Tensor | None, positions: Tensor, freqs: Tensor, *, eps: float
) -> Tensor:
    gain = None if weight is None else weight.contiguous()
    of = norm_rope.norm_rope(x, gain, positions.contiguous(), freqs.contiguous(), eps=eps)
    return _few(be, waiting(of.room, of))


def act_quant(be: Settings, x: Tensor, *, block: int) -> Quantised:
    del be
    return quant.act_quant(x.contiguous(), block=block)


def act_qdq(be: Settings, x: Tensor, *, format: str, block: int, channels: int) -> Tensor:
    del be
    known: dict[Grid, Tensor] = getattr(x, "grids", {})
    if (format, block, channels) in known:
        return known[format, block, channels]
    of = x.later if isinstance(x, Waiting) else None
    same = isinstance(of, Normed) and of.room.shape[-1] == x.shape[1]
    if same and of.grid is not None and (format, block, channels) == ("e4m3", KV_BLOCK, of.plain):
        grid = of.grid.reshape(x.shape)
        return waiting(grid, Gridded(grid, lambda _: of.made(), of)) if of.waits else grid
    return quant.act_qdq(x.contiguous(), format=format, block=block, channels=channels)


def hadamard(be: Settings, x: Tensor) -> Tensor:
    del be
    y, grid = quant.hadamard(x)
    return y if grid is None else carrying(y, grids={("e2m1", FP4_GROUP, x.shape[1]): grid})


def _launch_together(x: Carrying) -> None:
    """Launch as many of the products that wait for one input as a launch takes of each kind."""

    def taken(of_fp8: bool, most: int) -> list[Product]:
        waits = next((ps for (kind, _), ps in x.products.items() if kind == of_fp8 and ps), [])
        some: list[Product] = []
        while waits and sum(len(p.weights) for p in (*some, waits[0])) <= most:
            some.append(waits.pop(0))
        return some

    scaled, plain = taken(True, scaled_matmul.TOGETHER), taken(False, dense_matmul.TOGETHER)
    weights, rooms = [_parts(p.weights[0]) for p in scaled], [p.of.room for p in scaled]
    pairs, others = [p.weights for p in plain], [p.of.room for p in plain]
    if not scaled:
        parts = dense_matmul.together(x.contiguous(), pairs, others)
    elif not plain:
        parts = scaled_matmul.together(_quantise(x, fp4=False), weights, rooms)
    else:
        parts = input_matmul.together(_quantise(x, fp4=False), weights, rooms, x.contiguous(), pairs, others)
    for product, part in zip([*scaled, *plain], parts, strict=True):
        if part.shape[0] == 1:
            product.of.done()
        else:
            product.of.pieces = part


def _together(be: Settings, x: Tensor, weights: list[Any], dtype: torch.dtype) -> Tensor | None:
    """A product of few tokens that another of the same input may follow: the first that is read is
    launched with all that are there by then. None where the input is not one of the graph's norms.
    """
    if not isinstance(x, Carrying) or be.batch_invariant or not 0 < x.shape[0] <= be.few_tokens:
        return None
    waits = x.products.setdefault((isinstance(weights[0], ScaledArray), dtype), [])
    room = torch.empty((x.shape[0], sum(w.shape[0] for w in weights)), dtype=dtype, device=x.device)

    def begin() -> None:
        while waits:
            _launch_together(x)

    later = Sum(room, add_pieces.add_up, None, begin)
    waits.append(Product(later, weights))
    return waiting(room, later)


def linear(be: Settings, x: Tensor, weight: Any, *, out_dtype: str) -> Tensor:
    dtype = getattr(torch, out_dtype)
    if (
        not (isinstance(weight, ScaledArray) and _fp4(weight))
        and (product := _together(be, x, [weight], dtype)) is not None
    ):
        return product
    if isinstance(weight, ScaledArray):
        return _product(be, _quantise(x, fp4=_fp4(weight)), weight, dtype)
    return dense_matmul.linear(x.contiguous(), weight.contiguous(), out_dtype=dtype, split=not be.batch_invariant)


def grouped_linear(be: Settings, x: Tensor, weight: Any) -> Tensor:
    del be
    if isinstance(weight, ScaledArray):
        return dense_matmul.grouped_linear(x.contiguous(), weight.data.contiguous(), weight.scale.contiguous())
    return dense_matmul.grouped_linear(x.contiguous(), weight.contiguous(), None)


def expert_linear(be: Settings, x: Tensor, weight: Experts, offsets: Tensor) -> Tensor:
    del be
    stack = _stack(weight)
    return scaled_matmul.expert_products(
        *_quantise(x, fp4=_fp4(stack)), [(stack.data, stack.scale)], offsets.contiguous(), fp4=_fp4(stack)
    )


def _logits(be: Settings, x: Tensor, weight: Any) -> Tensor:
    """The router's logits in pieces, which its kernel adds up."""
    if isinstance(weight, ScaledArray):
        return linear(be, x, weight, out_dtype="float32")[None]
    split = not be.batch_invariant
    weights = [weight.contiguous()]
    return dense_matmul.products(x.contiguous(), weights, out_dtype=torch.float32, split=split, reader=True)


def gate(be: Settings, x: Tensor, weight: Any, bias: Tensor, *, topk: int, route_scale: float) -> Quantised:
    return _routed(moe.route(_logits(be, x, weight), bias.contiguous(), topk=topk, route_scale=route_scale))


def gate_hash(be: Settings, x: Tensor, weight: Any, tid2eid: Tensor, ids: Tensor, *, route_scale: float) -> Quantised:
    table, ids = tid2eid.contiguous(), ids.contiguous()
    logits = _logits(be, x, weight)
    return _routed(moe.route(logits, None, topk=table.shape[1], route_scale=route_scale, tid2eid=table, ids=ids))


def _routed(made: tuple[Tensor, Tensor, moe.Sorted | None]) -> Quantised:
    weights, indices, order = made
    return weights, indices if order is None else carrying(indices, order=order)


def dispatch(
    be: Settings, x: Tensor, weights: Tensor, indices: Tensor, *, first_expert: int, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del be
    return moe.dispatch(
        x.contiguous(), weights.contiguous(), indices.contiguous(), first_expert=first_expert, n_experts=n_experts
    )


def swiglu(be: Settings, gate: Tensor, up: Tensor, weights: Tensor | None, *, limit: float) -> Tensor:
    del be
    return moe.swiglu(
        gate.contiguous(), up.contiguous(), None if weights is None else weights.contiguous(), limit=limit
    )


def combine(
    be: Settings, rows: Tensor, order: Tensor, offsets: Tensor, shared: Tensor | None, *, topk: int, out_dtype: str
) -> Tensor:
    shared = None if shared is None else shared.contiguous()
    place = moe.invert(order.contiguous())
    dtype = getattr(torch, out_dtype)
    return _few(be, moe.combine(rows.contiguous(), place, offsets.contiguous(), shared, topk=topk, out_dtype=dtype))


def ffn(be: Settings, x: Tensor, w1: ScaledArray, w3: ScaledArray, w2: ScaledArray, *, limit: float) -> Tensor:
    """The input is quantised once, w1 and w3 are one launch, whose pieces SwiGLU adds up; it hands
    w2 its codes. With FP8 weights all of it may wait for the routed experts.
    """
    codes, both = _quantise(x, fp4=_fp4(w1)), [_parts(w1), _parts(w3)]
    room = torch.empty((x.shape[0], w2.shape[0]), dtype=x.dtype, device=x.device)

    def make(_: Shared) -> None:
        how = {"out_dtype": x.dtype, "fp4": _fp4(w1), "split": not be.batch_invariant, "reader": True}
        hidden = moe.swiglu_quant(
            scaled_matmul.products(*codes, both, **how), limit=limit, paired=scaled_matmul.paired(x, fp4=_fp4(w2))
        )
        settle(_product(be, hidden, w2, x.dtype, room))

    shared = waiting(room, Shared(room, make, codes, both, _parts(w2), limit))
    if _fp4(w1) or _fp4(w2):
        settle(shared)
    return _few(be, shared)


def _sorted(indices: Tensor, *, first_expert: int, n_experts: int) -> moe.Sorted:
    """Copies by expert: the router's, where all experts that it knows are here, or sorted anew."""
    known: moe.Sorted | None = getattr(indices, "order", None)
    if known is not None and first_expert == 0 and known[2].shape[0] == n_experts + 1:
        return known
    return moe.sort(indices.contiguous(), first_expert=first_expert, n_experts=n_experts)


def routed(
    be: Settings, x: Tensor, weights: Tensor, indices: Tensor, shared: Tensor | None, w1: Experts, w3: Experts, w2: Experts,
    *, first_expert: int, limit: float, out_dtype: str,
) -> Tensor:  # fmt: skip
    """``moe``: tokens are quantised once and never copied to their experts: w1 and w3, one launch,
    read them where they are. The shared expert's part is in the same launches, if it waits and is
    as wide.
    """
    gate, up, down = (_stack(w) for w in (w1, w3, w2))
    topk = indices.shape[1]
    order, place, offsets = _sorted(indices, first_expert=first_expert, n_experts=w1.shape[0])
    of = None if shared is None else awaited(shared, Shared)
    if of and (of.limit != limit or of.both[0][0].shape != gate.shape[1:]):
        of = None
    codes, both = _quantise(x, fp4=_fp4(gate)), [_parts(gate), _parts(up)]
    how = {"fp4": _fp4(gate), "order": order, "topk": topk}
    early = None
    if of:
        rows, early = moe_matmul.products(codes, both, offsets, of.codes, of.both, **how)
    else:
        rows = scaled_matmul.expert_products(*codes, both, offsets, **how)
    paired = scaled_matmul.paired(x, fp4=_fp4(down))
    hidden, own = moe.swiglu_experts(rows, weights.contiguous(), order, early, limit=limit, paired=paired)
    if of:
        rows, parts = moe_matmul.products(hidden, [_parts(down)], offsets, own, [of.down], fp4=_fp4(down), room=of.room)
        shared = add_pieces.total(parts, of.room.dtype, of.room)
        of.done()
    else:
        rows = scaled_matmul.expert_products(*hidden, [_parts(down)], offsets, fp4=_fp4(down))
    shared = None if shared is None else shared.contiguous()
    return _few(be, moe.combine(rows, place, offsets, shared, topk=topk, out_dtype=getattr(torch, out_dtype)))


def cache_write(be: Settings, cache_: Tensor, rows: Tensor, index: Tensor, *, layout: RowLayout) -> Tensor:
    del be
    cache.cache_write(cache_, rows, index.contiguous(), layout=layout)
    return cache_


def cache_read(be: Settings, cache_: Tensor, index: Tensor, *, layout: RowLayout) -> Tensor:
    del be, layout
    return cache.cache_read(cache_.contiguous(), index.contiguous())


def compressed(be: Settings, kv_score: Tensor, ape: Tensor, window_idxs: Tensor, *, dim: int) -> Tensor:
    del be
    return compress.compress(kv_score, ape.contiguous(), window_idxs.contiguous(), dim=dim)


def kv_score(be: Settings, x: Tensor, wkv: Any, wgate: Any) -> Tensor:
    weights = wkv.contiguous(), wgate.contiguous()
    if (product := _together(be, x, [*weights], torch.float32)) is not None:
        return product
    return dense_matmul.linear(x.contiguous(), *weights, out_dtype=torch.float32, split=not be.batch_invariant)


def cached_compress(
    be: Settings, kv_score: Tensor, state: Tensor, index: Tensor, ape: Tensor, window_idxs: Tensor, *, dim: int
) -> Tensor:
    del be
    held = {"state": state.contiguous(), "slots": index.contiguous()}
    return compress.compress(kv_score, ape.contiguous(), window_idxs.contiguous(), dim=dim, **held)


def index_scores(be: Settings, q: Tensor, weights: Tensor, keys: Tensor, *, scale: float) -> Tensor:
    del be
    return index.index_scores(q.contiguous(), weights, keys.contiguous(), scale=scale)


def index_select(be: Settings, scores: Tensor, visible: Tensor, offset: Tensor, *, topk: int) -> Tensor:
    del be
    return index.index_select(scores.contiguous(), visible.contiguous(), offset.contiguous(), topk=topk)


def _topk(
    score: Callable[[Tensor, Tensor], Tensor],
    q: Tensor,
    weights: Tensor,
    visible: Tensor,
    offset: Tensor,
    rows: int,
    topk: int,
    select: Callable[..., Tensor] = index.index_select,
) -> Tensor:
    """Selection in blocks of tokens, so that scores of a long context never exist at once."""
    batch, seq = visible.shape
    step = max(1, SCORES_AT_ONCE // (batch * rows))
    if seq <= step:
        scores = score(q.contiguous(), weights)
        return select(scores, visible.contiguous(), offset.contiguous(), topk=topk)
    picks = []
    for i in range(0, seq, step):
        part = slice(i, i + step)
        scores = score(q[:, part].contiguous(), weights[:, part])
        picks.append(select(scores, visible[:, part].contiguous(), offset[:, part].contiguous(), topk=topk))
    return torch.cat(picks, 1)


def index_topk(
    be: Settings,
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    visible: Tensor,
    offset: Tensor,
    *,
    scale: float,
    topk: int,
) -> Tensor:
    del be
    keys = keys.contiguous()
    return _topk(
        lambda q, w: index.index_scores(q, w, keys, scale=scale), q, weights, visible, offset, keys.shape[1], topk
    )


def cached_index_topk(
    be: Settings,
    q: Tensor,
    weights: Tensor,
    cache: Tensor,
    slots: Tensor,
    visible: Tensor,
    offset: Tensor,
    *,
    layout: RowLayout,
    scale: float,
    topk: int,
    select: Callable[..., Tensor] = index.index_select,
) -> Tensor:
    """``select``: who picks rows of given scores."""
    del be, layout
    cache, slots = cache.contiguous(), slots.contiguous()
    rows = slots.shape[0] // q.shape[0]

    def score(q: Tensor, weights: Tensor) -> Tensor:
        return index.cached_index_scores(q, weights, cache, slots, scale=scale)

    return _topk(score, q, weights, visible, offset, rows, topk, select)


def _in_blocks(
    be: Settings, q: Tensor, picks: Tensor, kernel: str, attend: Callable[[Tensor, Tensor, bool], Tensor]
) -> Tensor:
    """Attention in pieces of every token's list, some tokens at a time; whole lists only where bits
    may depend on how many tokens there are.
    """
    q, picks = q.contiguous(), picks.contiguous()
    tokens, heads, dim = q.shape
    if not be.batch_invariant and tokens > be.few_tokens:
        return attend(q, picks, False)
    pieces = launch.cdiv(picks.shape[1], launch.options(kernel, q)["SPLIT"])
    step = max(1, PARTIALS // (pieces * heads * dim))
    if tokens <= step:
        return _few(be, attend(q, picks, True))
    return torch.cat([attend(q[i : i + step], picks[i : i + step], True) for i in range(0, tokens, step)])


def selected(
    be: Settings, q: Tensor, kv: Tensor, attn_sink: Tensor, topk_idxs: Tensor, *, softmax_scale: float
) -> Tensor:
    """``sparse_attn``."""
    kv, sink = kv.contiguous(), attn_sink.contiguous()

    def attend(q: Tensor, picks: Tensor, split: bool) -> Tensor:
        return sparse_attn.sparse_attn(q, kv, sink, picks, softmax_scale=softmax_scale, split=split)

    return _in_blocks(be, q, topk_idxs, "sparse_attn", attend)


def _norms(q: Tensor, kv: Tensor) -> None:
    """Make queries and key/value rows that wait for their norms in one launch."""
    of, grid = awaited(q, Normed), awaited(kv, Gridded)
    if of and grid and grid.of.waits and norm_rope.together(of, grid.of):
        norm_rope.make(of, grid.of)
        for each in (of, grid.of, grid):
            each.done()


def cached_sparse_attn(
    be: Settings, q: Tensor, kv: Tensor, ring: Tensor, ring_index: Tensor, rows: Tensor | None, row_index: Tensor | None,
    attn_sink: Tensor, topk_idxs: Tensor, *, layout: RowLayout, softmax_scale: float,
) -> Tensor:  # fmt: skip
    _norms(q, kv)
    kv, ring, ring_index, sink = (t.contiguous() for t in (kv, ring, ring_index, attn_sink))
    rows, row_index = (None if t is None else t.contiguous() for t in (rows, row_index))

    def attend(q: Tensor, picks: Tensor, split: bool) -> Tensor:
        return sparse_attn.cached_sparse_attn(
            q,
            kv,
            ring,
            ring_index,
            rows,
            row_index,
            sink,
            picks,
            rope_dim=layout.rope_dim,
            softmax_scale=softmax_scale,
            split=split,
        )

    return _in_blocks(be, q, topk_idxs, "sparse_attn", attend)


def hc_pre(
    be: Settings, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float, iters: int
) -> Mixed:
    del be
    return mhc.hc_pre(
        h, fn.contiguous(), scale.contiguous(), base.contiguous(), norm_eps=norm_eps, eps=eps, iters=iters
    )


def hc_pre_norm(
    be: Settings,
    h: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    weight: Tensor,
    *,
    norm_eps: float,
    eps: float,
    iters: int,
) -> Mixed:
    del be
    arrays = (t.contiguous() for t in (fn, scale, base, weight))
    paired = scaled_matmul.paired(h, fp4=True)
    y, post, comb, codes = mhc.hc_pre_norm(h, *arrays, norm_eps=norm_eps, eps=eps, iters=iters, paired=paired)
    return _with_codes(y, *codes) if codes else y, post, comb


def hc_head(be: Settings, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, norm_eps: float, eps: float) -> Tensor:
    del be
    return mhc.hc_head(h, fn.contiguous(), scale.contiguous(), base.contiguous(), norm_eps=norm_eps, eps=eps)


def hc_post(be: Settings, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return _few(be, mhc.hc_post(y, h.contiguous(), post.contiguous(), comb.contiguous()))


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "rms_norm_rope": rms_norm_rope,
    "rms_norm": rms_norm, "apply_rope": apply_rope, "act_quant": act_quant, "act_qdq": act_qdq, "hadamard": hadamard, "linear": linear,
    "grouped_linear": grouped_linear, "expert_linear": expert_linear, "gate": gate, "gate_hash": gate_hash, "dispatch": dispatch, "swiglu": swiglu,
    "combine": combine, "ffn": ffn, "moe": routed, "compress": compressed, "kv_score": kv_score, "cached_compress": cached_compress,
    "cache_write": cache_write, "cache_read": cache_read,
    "index_scores": index_scores, "index_select": index_select, "index_topk": index_topk, "cached_index_topk": cached_index_topk,
    "sparse_attn": selected, "cached_sparse_attn": cached_sparse_attn, "hc_pre": hc_pre, "hc_pre_norm": hc_pre_norm, "hc_head": hc_head, "hc_post": hc_post,
}  # fmt: skip
