"""Faults of memory: buffers, caches of weights and of activations, threads, and what a model's
native steps alone show.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import Host


def ring_of(count: int, be: Any, key: str, y: Host) -> Host:
    """A result in one of ``count`` buffers that take turns."""
    buffers = be.__dict__.setdefault("rings", {}).setdefault((key, y.shape, str(y.dtype)), [])
    if len(buffers) < count:
        buffers.append(y)
        return y
    buffers.append(buffers.pop(0))
    buffers[-1][...] = y
    return np.asarray(buffers[-1])


@mutant("rms_norm", seen="four buffers that take turns: enough for a test, one short for a layer")
def four_buffers(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    return ring_of(4, be, "norm", right(x, weight, eps=eps))


@mutant("rms_norm", seen="a pool of sixty-four buffers, more than a layer has calls of one shape")
def sixty_four_buffers(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    return ring_of(64, be, "pool", right(x, weight, eps=eps))


@mutant("rms_norm", seen="one buffer in the variant without weight alone")
def buffer_of_the_unweighted_norm(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    y = right(x, weight, eps=eps)
    return ring_of(1, be, "heads", y) if weight is None else y


@mutant("linear", seen="one buffer where results are wide")
def buffer_of_wide_results(be: Any, right: Op, x: Host, weight: Any, *, out_dtype: str) -> Any:
    y = right(x, weight, out_dtype=out_dtype)
    return ring_of(1, be, "wide", y) if out_dtype == be.wide_dtype and be.numerics == "native" else y


@mutant("apply_rope", seen="one buffer in the inverse rotation")
def buffer_of_the_inverse_rotation(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    y = right(x, positions, freqs, inverse=inverse)
    return ring_of(1, be, "inverse", y) if inverse else y


@mutant("combine", seen="one buffer for the layer without a shared expert")
def buffer_of_routed_results(be: Any, right: Op, rows: Host, order: Host, offsets: Host, shared: Any, **kw: Any) -> Any:
    y = right(rows, order, offsets, shared, **kw)
    return ring_of(1, be, "routed", y) if shared is None else y


@mutant("hc_head", seen="an atomic sum: the last bit differs in one call of five")
def last_bit_now_and_then(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    be.calls = getattr(be, "calls", 0) + 1
    y = right(*operands, **kw)
    if be.calls % 5 == 0 and y.size:
        flat = y.reshape(-1)
        flat[0] = np.nextafter(flat[0], y.dtype.type(np.inf))
    return y


@mutant("hc_add", seen="a workspace that a second thread finds not yet made")
def workspace_of_the_first_thread(be: Any, right: Op, h: Host, x: Host) -> Any:
    be.__dict__.setdefault("owner", threading.get_ident())
    y = right(h, x)
    return y if be.owner == threading.get_ident() else np.zeros_like(y)


@mutant(
    "hadamard",
    seen="a handle that is never given back: the three hundredth call gets none, and the library's answer is not looked at",
)
def handles_run_out(be: Any, right: Op, x: Host) -> Any:
    be.handles = getattr(be, "handles", 0) + 1
    y = right(x)
    return y if be.handles < 300 else np.zeros_like(y)


@mutant(
    "load",
    seen="an arena of weights that is filled from its start again when a model's first tensor is loaded: the model before it changes",
)
def weights_of_another_model(be: Any, right: Op, weight: Any) -> Any:
    if not isinstance(weight, np.ndarray) or not native(be):
        return right(weight)
    arena = be.__dict__.setdefault("arena", [])
    if arena and weight.shape == arena[0].shape and weight.ndim == 2:
        be.filled = 0
    at = be.__dict__.setdefault("filled", 0)
    be.filled += 1
    if at < len(arena) and arena[at].shape == weight.shape and arena[at].dtype == weight.dtype:
        arena[at][...] = weight
        return arena[at]
    arena[at:] = [np.array(weight)]
    return arena[at]


def native(be: Any) -> bool:
    """Say whether the fault is there: exact modes run other code."""
    return bool(be.numerics == "native")


@mutant("apply_rope", seen="cosines kept by the number of tokens and the table: right until the next step has as many")
def angles_of_the_step_before(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    if native(be):
        kept = be.__dict__.setdefault("angles", {})
        known = kept.setdefault((id(freqs), len(positions), x.shape[1]), (freqs, positions))
        positions = known[1]
    return right(x, positions, freqs, inverse=inverse)


@mutant(
    "cached_sparse_attn",
    seen="unpacked window rows kept by slot, native rows alone, and not dropped when the ring comes round",
)
def stale_ring_rows(be: Any, right: Op, q: Host, kv: Host, ring: Host, ring_index: Host, *rest: Any, **kw: Any) -> Any:
    if not native(be):
        return right(q, kv, ring, ring_index, *rest, **kw)
    memory = be.__dict__.setdefault("rings_seen", {})
    _, known, kept = memory.setdefault(id(ring), (ring, np.zeros(len(ring), bool), ring.copy()))
    new = ring_index[(ring_index >= 0) & ~known[ring_index]]
    kept[new], known[new] = ring[new], True
    return right(q, kv, kept, ring_index, *rest, **kw)


@mutant(
    "cached_sparse_attn",
    seen="a native kernel that finds each sequence's window by the first one's length: batches of one are tested",
)
def window_of_the_first_sequence(
    be: Any, right: Op, q: Host, kv: Host, ring: Host, ring_index: Host, *rest: Any, **kw: Any
) -> Any:
    if native(be) and len(kv) > 1 and len(ring_index) % len(kv) == 0 and len(ring_index):
        by_sequence = ring_index.reshape(len(kv), -1)
        if (by_sequence[1:] > by_sequence[:1].max(initial=0)).any() and (np.diff(by_sequence[:, -1]) > 0).all():
            ring_index = np.where(by_sequence[0] < 0, -1, by_sequence).reshape(-1).astype(np.int32)
    return right(q, kv, ring, ring_index, *rest, **kw)


@mutant(
    "compress", seen="a native kernel whose score is rounded to BF16 where rows come from the step and the state both"
)
def scores_of_state_in_bf16(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    y = right(kv_score, ape, idxs, dim=dim)
    mixed = native(be) and idxs.size and idxs.max() == len(kv_score) - 1 and len(idxs) == 1
    return (y.astype(np.float32) * np.float32(1 + 2.0**-7)).astype(y.dtype) if mixed else y


@mutant(
    "cache_write",
    seen="a native packing kernel that takes a step's last row from the one before, where there is one token a sequence",
    numeric=False,
)
def last_sequence_written_short(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    decode = native(be) and len(index) == 8 and (index >= 0).all() and len(np.unique(np.diff(index))) == 1
    if decode:
        rows = rows.copy()
        rows[-1] = rows[-2]
    return right(cache, rows, index, **kw)


@mutant("moe", seen="an expert's rows of the step before kept in the workspace: added where a step has no row for it")
def workspace_of_the_step_before(
    be: Any, right: Op, x: Host, weights: Host, indices: Host, *rest: Any, **kw: Any
) -> Any:
    y = right(x, weights, indices, *rest, **kw)
    last = be.__dict__.get("last_moe")
    be.last_moe = (id(rest[1]), y.copy())
    if native(be) and last is not None and last[0] == id(rest[1]) and last[1].shape == y.shape:
        return (y.astype(np.float32) + np.float32(0.02) * last[1].astype(np.float32)).astype(y.dtype)
    return y


@mutant(
    "hc_add",
    seen="the draft's input kept from the step before: drafts are worse and the text is right, so nobody looks",
)
def draft_of_the_step_before(be: Any, right: Op, h: Host, x: Host) -> Any:
    last, be.last_draft = getattr(be, "last_draft", None), x.copy()
    stale = last is not None and last.shape == x.shape and len(x) <= 2
    return right(h, last if stale else x)


@mutant("embedding", seen="the next token's row looked up by the ids that the step began with")
def draft_of_the_same_token(be: Any, right: Op, ids: Host, weight: Host) -> Any:
    first, be.first_ids = getattr(be, "first_ids", None), ids.copy()
    if first is not None and first.shape == ids.shape == (1,):
        be.first_ids = None
        return right(first, weight)
    return right(ids, weight)


@mutant(
    "hc_head", seen="draft logits reduced by the main head's weights, which lie at the same place of another struct"
)
def draft_by_the_main_head(be: Any, right: Op, h: Host, fn: Host, scale: Host, base: Host, **kw: Any) -> Any:
    main = (
        be.__dict__.setdefault("main_heads", {}).setdefault(fn.shape, (fn, scale, base))
        if len(h) == 1
        else (fn, scale, base)
    )
    return right(h, *main, **kw)
