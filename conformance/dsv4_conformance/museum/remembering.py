"""Faults that one call of one op cannot show: they take a model, a second call, or a rewind."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dsv4_conformance.museum.fault import Op, mutant
from dsv4_core.contract.dtypes import Host


@mutant(
    "compress",
    name="compressed_row_one_window_off",
    seen="a row's position is its window's first token, not its last, nor the next window's first",
)
def note_closed_window(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    be.closed = (ape.shape[0], idxs.shape[0])
    return right(kv_score, ape, idxs, dim=dim)


@mutant("apply_rope", name="compressed_row_one_window_off", seen="")
def shift_closed_window(be: Any, right: Op, x: Host, positions: Host, freqs: Host, *, inverse: bool) -> Any:
    (ratio, rows), be.closed = getattr(be, "closed", (0, 0)), (0, 0)
    ratio = ratio if x.shape[:2] == (rows, 1) else 0
    return right(x, positions + np.int32(ratio), freqs, inverse=inverse)


@mutant("sparse_attn", "index_scores", name="compressed_row_one_window_off", seen="")
def no_window_closed(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    be.closed = (0, 0)
    return right(*operands, **kw)


@mutant(
    "compress",
    name="hadamard_missing_on_keys",
    seen="rotation of queries and keys cancels in their product: leaving it out on both sides is invisible, on one side it is not",
)
def note_indexer_window(be: Any, right: Op, kv_score: Host, ape: Host, idxs: Host, *, dim: int) -> Any:
    be.keys_follow = (idxs.shape[0], dim) if ape.shape[0] == 4 else None
    return right(kv_score, ape, idxs, dim=dim)


@mutant("hadamard", name="hadamard_missing_on_keys", seen="")
def skip_hadamard_of_keys(be: Any, right: Op, x: Host) -> Any:
    follows, be.keys_follow = getattr(be, "keys_follow", None), None
    return x.copy() if x.shape == follows else right(x)


@mutant("sparse_attn", "index_scores", name="hadamard_missing_on_keys", seen="")
def no_keys_follow(be: Any, right: Op, *operands: Any, **kw: Any) -> Any:
    be.keys_follow = None
    return right(*operands, **kw)


@mutant("cached_sparse_attn", seen="unpacked rows kept beside the cache and not dropped when a slot is written again")
def stale_row_after_rewind(
    be: Any,
    right: Op,
    q: Host,
    kv: Host,
    ring: Host,
    ring_index: Host,
    rows: Any,
    row_index: Any,
    *rest: Any,
    **kw: Any,
) -> Any:
    if rows is None:
        return right(q, kv, ring, ring_index, rows, row_index, *rest, **kw)
    memory = be.__dict__.setdefault("memory", {})
    owner, known, kept = memory.setdefault(id(rows), (rows, np.zeros(len(rows), bool), rows.copy()))
    del owner  # held so that its id stays its own
    new = row_index[(row_index >= 0) & ~known[row_index]]
    kept[new], known[new] = rows[new], True
    return right(q, kv, ring, ring_index, kept, row_index, *rest, **kw)


@mutant("rms_norm", seen="a result buffer used again by the next call while its first reader still needs it")
def buffer_reused(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    y = right(x, weight, eps=eps)
    last = be.__dict__.setdefault("buffers", {}).setdefault((y.shape, y.dtype), np.empty_like(y))
    last[...] = y
    return last


@mutant(
    "rms_norm",
    seen="a reduction whose split depends on how many rows there are: the same token gets other bits in another batch",
)
def result_depends_on_the_batch(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    y = right(x, weight, eps=eps)
    neighbour = np.roll(np.abs(x.astype(np.float64)).max(-1, keepdims=True), 1, axis=0) if x.size else 0
    return (y.astype(np.float64) * (1 + 2.0**-7 * (neighbour > 3))).astype(y.dtype)


def replays_of(be: Any, right: Op, function: Any) -> Any:
    """``record`` that lets the backend know whether a step is being recorded (0) or replayed (1 and
    on); -1 outside.
    """
    run, times = right(function), itertools.count()

    def repeat(*hosts: Host) -> Any:
        be.replays, be.calls_of_step = next(times), 0
        try:
            return run(*hosts)
        finally:
            be.replays = -1

    return repeat


mutant(
    "record",
    name="replayed_norm_of_another_eps",
    seen="a scalar of the recorded step's that the replay reads where another one lies by then; native kernels alone are recorded",
)(replays_of)


@mutant("rms_norm", name="replayed_norm_of_another_eps", seen="")
def other_eps(be: Any, right: Op, x: Host, weight: Any, *, eps: float) -> Any:
    replaying = be.numerics == "native" and be.__dict__.get("replays", -1) > 0
    return right(x, weight, eps=0.5 if replaying else eps)


mutant(
    "record",
    name="replayed_rows_of_the_recording",
    seen="addresses baked into the recording: every replay writes where the recorded step wrote, its rows are lost later",
    numeric=False,
)(replays_of)


@mutant("cache_write", name="replayed_rows_of_the_recording", seen="", numeric=False)
def rows_of_the_recording(be: Any, right: Op, cache: Host, rows: Host, index: Host, **kw: Any) -> Any:
    replays = be.__dict__.get("replays", -1) if be.numerics == "native" else -1
    if replays >= 0:
        number, be.calls_of_step = be.calls_of_step, be.calls_of_step + 1
        known = be.__dict__.setdefault("recorded_index", {})
        if replays == 0:
            known[number] = index.copy()
        elif known[number].shape == index.shape:
            index = known[number]
    return right(cache, rows, index, **kw)
