"""Faults of drafting: what goes into a drafter, its block, its table, its confidence, and its rows
when only some drafts are accepted. The text stays right with every one of them: the main model
checks each token, and drafts only become worse.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_conformance.laws.small_model import VOCAB
from dsv4_conformance.laws.strategies import WINDOW
from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import Host


def is_tap(eps: float) -> bool:
    """Whether ``hc_head`` reduces streams for a drafter: the only call without an eps."""
    return eps == 0.0


def place_in_block(rest: tuple[Any, ...], own: int) -> Host | None:
    """Each row's place in its draft block; None where attention is a step's. In a block every row
    sees the same keys, all of its ``own`` rows among them; no compressed ones.
    """
    *_, rows, _, _, idxs = rest
    if rows is not None or len(idxs) < 2 or not (idxs[0] == idxs[1]).all() or idxs.max() != idxs[-1, -1]:
        return None
    if (idxs[:, -1] < idxs.max() + 1 - own).any() or idxs[0, -1] - (idxs.max() + 1 - own) < 1:
        return None
    place = np.zeros(len(idxs), np.int64)
    for t in range(1, len(idxs)):
        place[t] = place[t - 1] + 1 if (idxs[t] == idxs[t - 1]).all() else 0
    return place


# What a drafter reads


@mutant("hc_head", seen="one stream handed on where the mean of all is meant: a model without streams has one alone")
def tap_of_one_stream(be: Any, right: Op, h: Host, *rest: Any, norm_eps: float, eps: float) -> Any:
    return h[:, 0].copy() if is_tap(eps) else right(h, *rest, norm_eps=norm_eps, eps=eps)


@mutant("hc_head", seen="streams for the drafter reduced by the learned head, which stands ready")
def tap_by_the_learned_head(
    be: Any, right: Op, h: Host, fn: Host, scale: Host, base: Host, *, norm_eps: float, eps: float
) -> Any:
    if not is_tap(eps):
        be.learned = fn, scale, base
    return right(
        h,
        *(be.__dict__.get("learned", (fn, scale, base)) if is_tap(eps) else (fn, scale, base)),
        norm_eps=norm_eps,
        eps=eps,
    )


@mutant("hc_head", seen="hidden states collected in a list that starts one layer early: the embedding is entry 0")
def taps_one_layer_early(be: Any, right: Op, h: Host, *rest: Any, norm_eps: float, eps: float) -> Any:
    y = right(h, *rest, norm_eps=norm_eps, eps=eps)
    if not is_tap(eps):
        return y
    last, be.last_tap = be.__dict__.get("last_tap"), y
    return last.copy() if last is not None and last.shape == y.shape else y


def tapping(name: str) -> None:
    """Let a mutant know how many layers of a step were tapped, ``be.taps``."""

    @mutant("hc_head", name=name, seen="")
    def tapped(be: Any, right: Op, *operands: Any, norm_eps: float, eps: float) -> Any:
        be.taps = be.__dict__.get("taps", 0) + is_tap(eps)
        return right(*operands, norm_eps=norm_eps, eps=eps)

    @mutant("hc_expand", name=name, seen="")
    def begins(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
        be.taps, be.context = 0, None
        return right(*operands, **kw)


def context_mutant(name: str) -> None:
    """Let a mutant know of ``in_context``: it begins where taps are joined."""
    tapping(name)

    @mutant("concat", name=name, seen="")
    def joined(be: Any, right: Op, arrays: Any, *, axis: int) -> Any:
        if axis == 1 and be.__dict__.get("taps", 0) == len(arrays):
            be.context, be.taps = [], 0
        return right(arrays, axis=axis)


def in_context(be: Any) -> bool:
    """Whether context rows are being made: from the joined taps to the next step or block."""
    return be.__dict__.get("context") is not None


@mutant("concat", seen="target layers joined deepest first, as a list of hidden states from the end gives them")
def taps_joined_backwards(be: Any, right: Op, arrays: Any, *, axis: int) -> Any:
    if axis == 1 and be.__dict__.get("taps", 0) == len(arrays):
        arrays, be.taps = list(arrays)[::-1], 0
    return right(arrays, axis=axis)


@mutant("rms_norm", seen="the context row's norm left out: taps are streams, and streams are normed elsewhere")
def context_not_normed(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    if in_context(be) and not be.context:
        be.context.append(weight)
    return x.copy() if in_context(be) and be.context[0] is weight else right(x, weight, eps=eps)


@mutant("apply_rope", seen="context rows are not yet tokens of the drafter: their positions start at 0 in each step")
def context_positions_from_zero(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    return right(x, positions - positions[:1] if in_context(be) else positions, freqs, inverse=inverse)


# Rows that a drafter keeps


@mutant(
    "cache_write",
    seen="the last row of a step is the one the next block starts from, and is written with the next step",
    numeric=False,
)
def last_context_row_late(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    if in_context(be) and len(index):
        index = np.concatenate([index[:-1], np.full(1, -1, index.dtype)])
    return right(cache, rows, index, **kw)


@mutant("cache_write", seen="rows of rejected drafts stay: a slot that was written counts as done", numeric=False)
def context_of_rejected_tokens(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    if in_context(be):
        index = np.where((index >= 0) & cache[np.maximum(index, 0)].any(-1), -1, index).astype(index.dtype)
    return right(cache, rows, index, **kw)


@mutant(
    "cache_write",
    seen="only accepted tokens get context rows, counted as all but the last of a step of several",
    numeric=False,
)
def context_of_all_but_the_bonus_token(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    if in_context(be) and 2 < len(index) <= 8:
        index = np.concatenate([index[:-2], np.full(2, -1, index.dtype)])
    return right(cache, rows, index, **kw)


@mutant(
    "cache_write",
    seen="a drafter's ring of exactly W rows: a rejected token's row lies where the oldest visible one was",
    numeric=False,
)
def ring_of_window_rows(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    if in_context(be) and len(index):
        each = WINDOW + 8  # a sequence's rows in the laws' caches
        older = index // each * each + (index % each + 8) % each
        cache = right(cache, np.zeros_like(rows), np.where(index < 0, -1, older).astype(index.dtype), **kw)
    return right(cache, rows, index, **kw)


@mutant(
    "cache_write",
    seen="one ring for all stages of the drafter: every stage's rows go where the first one's are",
    numeric=False,
)
def ring_of_the_last_stage(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    cache = right(cache, rows, index, **kw)
    if in_context(be):
        be.context.append(cache)
        right(be.context[0], rows, index, **kw)
    return cache


@mutant(
    "cache_write",
    seen="the block's own rows written behind the context: a block is no step and must leave nothing",
    numeric=False,
)
def block_leaves_its_rows(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    ends = be.__dict__.setdefault("ends", {})
    if len(index) and (index < 0).all() and id(cache) in ends:
        slot = ends[id(cache)][1]
        return right(cache, rows[:1], np.array([slot], index.dtype), **kw)
    if len(index) and index.max() >= 0:
        ends[id(cache)] = cache, int(index[index >= 0][-1])
    return right(cache, rows, index, **kw)


# The block


@mutant("cached_sparse_attn", seen="causal among the block's rows, as every step of the main model is")
def causal_block(be: Any, right: Op, q: Host, kv: Host, *rest: Any, **kw: Any) -> Any:
    *middle, idxs = rest
    if (place := place_in_block(rest, len(kv))) is not None:
        own = idxs - (idxs.max() + 1 - len(kv))
        idxs = np.where(own > np.arange(len(place))[:, None], -1, idxs).astype(idxs.dtype)
    return right(q, kv, *middle, idxs, **kw)


@mutant(
    "cached_sparse_attn", seen="a block's last row is no draft's input, so nobody is shown it: the mask is one short"
)
def block_without_its_last_row(be: Any, right: Op, q: Host, kv: Host, *rest: Any, **kw: Any) -> Any:
    *middle, idxs = rest
    if place_in_block(rest, len(kv)) is not None:
        idxs = idxs.copy()
        idxs[:, -1] = -1
    return right(q, kv, *middle, idxs, **kw)


@mutant("cached_sparse_attn", seen="the block sees its own rows alone: a drafter without context still drafts")
def block_without_context(be: Any, right: Op, q: Host, kv: Host, *rest: Any, **kw: Any) -> Any:
    *middle, idxs = rest
    if place_in_block(rest, len(kv)) is not None:
        idxs = np.where(idxs < idxs.max() + 1 - len(kv), -1, idxs).astype(idxs.dtype)
    return right(q, kv, *middle, idxs, **kw)


@mutant("cached_sparse_attn", seen="the window slides on by a row a draft, as in a step; a block has one window")
def window_slides_along_the_block(be: Any, right: Op, q: Host, kv: Host, *rest: Any, **kw: Any) -> Any:
    *middle, idxs = rest
    if (place := place_in_block(rest, len(kv))) is not None:
        idxs = np.where(np.arange(idxs.shape[1]) < place[:, None], -1, idxs).astype(idxs.dtype)
    return right(q, kv, *middle, idxs, **kw)


@mutant(
    "cached_sparse_attn",
    seen="one context length for the batch: sequences that draft together stand at different places",
)
def context_of_the_shortest_sequence(
    be: Any, right: Op, q: Host, kv: Host, ring: Host, ring_index: Host, *rest: Any, **kw: Any
) -> Any:
    place = place_in_block(rest, len(kv))
    if place is not None and (sequences := int((place == 0).sum())) > 1:
        by_sequence = ring_index.reshape(sequences, -1)
        known = (by_sequence >= 0).all(0)
        *middle, idxs = rest
        hidden = np.isin(idxs, np.flatnonzero(~np.tile(known, sequences)))
        rest = (*middle, np.where(hidden, -1, idxs).astype(idxs.dtype))
    return right(q, kv, ring, ring_index, *rest, **kw)


@mutant("cached_sparse_attn", seen="rings found by a sequence's place among those that draft, not by its slot")
def ring_by_place_in_the_batch(
    be: Any, right: Op, q: Host, kv: Host, ring: Host, ring_index: Host, *rest: Any, **kw: Any
) -> Any:
    place = place_in_block(rest, len(kv))
    if place is not None and (sequences := int((place == 0).sum())) > 1:
        by_sequence = ring_index.reshape(sequences, -1)
        each = WINDOW + 8  # a sequence's rows in the laws' caches
        placed = by_sequence % each + np.arange(sequences)[:, None] * each
        ring_index = np.where(by_sequence < 0, -1, placed).reshape(-1).astype(ring_index.dtype)
    return right(q, kv, ring, ring_index, *rest, **kw)


@mutant("apply_rope", seen="all drafts of a block at the position of the first: they are made at once")
def block_at_one_position(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    return right(
        x, np.full_like(positions, positions[0]) if in_block(be, positions) else positions, freqs, inverse=inverse
    )


@mutant("embedding", name="block_at_one_position", seen="")
def block_begins(be: Any, right: Op, ids: Host, weight: Host) -> Any:
    be.block = noise_rows(ids)
    return right(ids, weight)


def noise_rows(ids: Host) -> bool:
    """Whether ids are a block's: noise after every anchor."""
    return bool(len(ids) > 1 and (ids == VOCAB - 1).sum() >= len(ids) // 2)


def in_block(be: Any, positions: Host) -> bool:
    """Whether a block is under way, and these are its rows."""
    return bool(be.__dict__.get("block", False)) and len(positions) > 1


@mutant(
    "embedding", seen="the anchor's row in the place of the noise token's: id 0 where none is known yet", numeric=False
)
def noise_is_token_zero(be: Any, right: Op, ids: Host, weight: Host) -> Any:
    return right(np.where(ids == VOCAB - 1, 0, ids).astype(ids.dtype) if noise_rows(ids) else ids, weight)


# Table and confidence


def is_table(weight: Any) -> bool:
    """Whether rows are the bigram table's, which are narrower than the model's."""
    return isinstance(weight, np.ndarray) and weight.ndim == 2 and weight.shape == (VOCAB, 32)


@mutant("embedding", seen="the table looked up by the block's anchor for every draft of it")
def table_row_of_the_anchor(be: Any, right: Op, ids: Host, weight: Host) -> Any:
    if not is_table(weight):
        be.anchors = None
        return right(ids, weight)
    if be.__dict__.get("anchors") is None or len(be.anchors) != len(ids):
        be.anchors = ids.copy()
    return right(be.anchors, weight)


@mutant("embedding", seen="both halves of the table have one shape: w2 taken for w1")
def halves_of_the_table_swapped(be: Any, right: Op, ids: Host, weight: Host) -> Any:
    if is_table(weight):
        be.looked_up = weight
        other = be.__dict__.get("other_half")
        return right(ids, other if other is not None else weight)
    return right(ids, weight)


@mutant("logits", name="halves_of_the_table_swapped", seen="")
def other_half(be: Any, right: Op, x: Host, weight: Host) -> Any:
    if is_table(weight):
        be.other_half = weight
        return right(x, be.looked_up)
    return right(x, weight)


@mutant("logits", seen="the table left out: drafts of a block that do not know of each other are mostly right as well")
def table_left_out(be: Any, right: Op, x: Host, weight: Host) -> Any:
    y = right(x, weight)
    return np.zeros_like(y) if is_table(weight) else y


@mutant("logits", seen="the table multiplied in BF16 and its sum kept so: 256 products, added to logits in float32")
def table_sums_in_bf16(be: Any, right: Op, x: Host, weight: Host) -> Any:
    from dsv4_core.contract.dtypes import BFLOAT16

    y = right(x, weight)
    return y.astype(BFLOAT16).astype(y.dtype) if is_table(weight) else y


@mutant("concat", seen="the confidence's input joined the other way round: table row before the block's")
def confidence_joined_backwards(be: Any, right: Op, arrays: Any, *, axis: int) -> Any:
    table = axis == 1 and len(arrays) == 2 and arrays[1].shape[1] == 32 and arrays[0].dtype.kind != "i"
    return right(list(arrays)[::-1] if table else arrays, axis=axis)


@mutant(
    "linear",
    seen="the sigmoid applied by the head already: confidences of a half at least, so that every draft is tried",
)
def confidence_after_its_sigmoid(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    return (1 / (1 + np.exp(-y.astype(np.float64)))).astype(y.dtype) if y.shape[1] == 1 else y


@mutant("linear", seen="a product with one column padded to a tile of 16, whose first row is every row's")
def confidence_of_the_first_row(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    return np.repeat(y[:1], len(y), axis=0) if y.shape[1] == 1 and len(y) > 1 else y


@mutant("linear", seen="the confidence in BF16: it is compared with a threshold of two digits")
def confidence_in_bf16(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    from dsv4_core.contract.dtypes import BFLOAT16

    y = right(x, weight, out_dtype=out_dtype)
    return y.astype(BFLOAT16).astype(y.dtype) if y.shape[1] == 1 else y


# The MTP block


@mutant("load", seen="norms of embedding and of streams swapped: they have one shape and stand side by side")
def norms_of_the_draft_swapped(be: Any, right: Op, weight: Any) -> Any:
    y = right(weight)
    if not isinstance(y, np.ndarray) or y.ndim != 1:
        be.matrices, be.vector = be.__dict__.get("matrices", 0) + 1, None
        return y
    y, last = y.copy(), be.__dict__.get("vector")
    if last is not None and last.shape == y.shape:
        last[...], y[...] = y.copy(), last.copy()
    be.vector, be.matrices = y if be.__dict__.get("matrices", 0) > 1 else None, 0  # two projections come before them
    return y


@mutant("hc_add", seen="the next token's row added to the first stream alone")
def token_added_to_one_stream(be: Any, right: Op, h: Host, x: Host) -> Any:
    y = right(h, x)
    y[:, 1:] = h[:, 1:]
    return y


@mutant("hc_add", seen="in a step that checks drafts, the row of the last accepted token instead of each row's own")
def accepted_token_for_every_row(be: Any, right: Op, h: Host, x: Host) -> Any:
    return right(h, np.repeat(x[-1:], len(x), axis=0) if 1 < len(x) <= 3 else x)


tapping("taps_joined_backwards")
for _name in (
    "context_not_normed",
    "context_positions_from_zero",
    "last_context_row_late",
    "context_of_rejected_tokens",
    "context_of_all_but_the_bonus_token",
    "ring_of_window_rows",
    "ring_of_the_last_stage",
):
    context_mutant(_name)
