"""The law of functional contracts: what is written may be another array, and nobody reads the one
that was given again.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.laws.of_models import differ
from dsv4_conformance.laws.small_model import Stage, feed, new_cache, some_ids, weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_core.contract.backend import Backend


@contextmanager
def moving(backend: Backend) -> Iterator[None]:
    """Within, every write goes to a copy, and the array that was given stays as it was: stale for
    whoever still reads it.
    """
    write = backend.cache_write

    def written(cache: Any, *operands: Any, **scalars: Any) -> Any:
        return write(backend.from_numpy(np.array(backend.to_numpy(cache))), *operands, **scalars)

    backend.cache_write = written  # type: ignore[method-assign]
    try:
        yield
    finally:
        del backend.cache_write


def arrays_may_move(stage: Stage, *, ratios: tuple[int, ...], chunks: list[int], seed: int) -> str | None:
    """A model whose every write gives another array computes what it computes in place: chunks, and
    a rewind between them.
    """
    ratios, total = stage.layers(ratios), sum(chunks)
    model, ids = stage.model(weights(ratios)), some_ids((1, total), seed)

    def run() -> Sequence[Any]:
        cache, at, parts = new_cache(model, 1, max(total, 1)), 0, []
        for n in chunks:
            feed(model, cache, ids[:, at : at + n])
            cache.rewind(0, max(at, at + n - 2))
            back = int(cache.lengths[0])
            parts.append(feed(model, cache, ids[:, back : at + n]))
            at += n
        return parts

    in_place = run()
    with moving(model.backend):
        moved = run()
    found = (
        differ(a[0], b[0], stage.tolerance(ratios), f"chunk {i} of {chunks}, where every write gives another array")
        for i, (a, b) in enumerate(zip(moved, in_place, strict=True))
    )
    return next((problem for problem in found if problem), None)
