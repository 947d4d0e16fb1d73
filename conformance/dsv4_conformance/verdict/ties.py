"""Ties that are broken otherwise: the same choice with the lower of equal scores in it.

A model whose scores tie (a ReLU over few heads gives many zeros) goes another way with every tie
rule, and all are right. What compares models puts the published rule's picks in place of another
rule's; a pick that is no tie stays as it is.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.verdict.calls import Call
from dsv4_conformance.verdict.discrete import scores_of
from dsv4_core.contract import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Host

CHOOSERS = ("index_select", "index_topk", "cached_index_topk")


def lowest(picks: Host, value: Host, certain: Host, visible: Host) -> Host:
    """Picks [rows, k] with the lowest of the scores that equal the last place's; ascending, -1 at
    the end.
    """
    rows, n = value.shape
    chosen = np.zeros((rows, n + 1), bool)
    np.put_along_axis(chosen, np.where(picks < 0, n, picks), True, axis=1)
    picked, seen = chosen[:, :n], np.arange(n) < visible[:, None]
    level = np.where(picked, value, np.inf).min(1, keepdims=True, initial=np.inf)
    tied = (value == level) & certain & seen
    count = (picked & tied).sum(1, keepdims=True)
    kept = (picked & ~tied) | (tied & (np.cumsum(tied, axis=1) <= count))
    place = np.where(kept, np.arange(n), n)
    ordered = np.sort(place, axis=1)[:, : picks.shape[1]]
    return np.where(ordered == n, -1, ordered)


@contextmanager
def to_the_lower(backend: Backend) -> Iterator[list[int]]:
    """Within, the backend's choosers break ties to the lower row; gives a list whose length grows
    by one with each choice moved.
    """
    oracle, moved = registry.oracle(backend.numerics, {}), list[int]()

    def choosing(op: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def chooser(*operands: Any, **scalars: Any) -> Any:
            result = method(*operands, **scalars)
            picks = np.asarray(backend.to_numpy(result))
            if not picks.size:
                return result
            call = Call(op, [np.asarray(backend.to_numpy(o)) for o in operands], scalars)
            scores, named = scores_of(call, oracle, backend), call.named()
            offset = named["offset"].reshape(-1, 1)
            flat = picks.reshape(len(offset), -1).astype(np.int64)
            local = np.where(flat < 0, -1, flat - offset)
            canonical = lowest(local, scores.value, scores.certain, named["visible"].reshape(-1))
            changed = (np.sort(local, axis=1) != np.sort(canonical, axis=1)).any(1)
            moved.extend([1] * int(changed.sum()))
            back = np.where(canonical < 0, -1, canonical + offset).astype(np.int32).reshape(picks.shape)
            return backend.from_numpy(back) if changed.any() else result

        return chooser

    for op in CHOOSERS:
        setattr(backend, op, choosing(op, getattr(backend, op)))
    try:
        yield moved
    finally:
        for op in CHOOSERS:
            delattr(backend, op)
