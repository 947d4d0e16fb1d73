"""Teacher-forced logits: what the model says of a given text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.graph import generate
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.engine import CHUNK
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Step, check_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.graph.model import Model


def every_logits(
    model: Model, tokens: Host, *, chunk: int = CHUNK, progress: Callable[[int, int], None] | None = None
) -> Host:
    """Logits after every one of ``tokens`` [batch, total], fed in chunks: [batch, total, vocab],
    float32 (float64 in float64 mode).
    """
    check_ids(tokens, model.config.vocab_size)
    tokens = model.parallel.mine(tokens)
    batch, total = tokens.shape
    cache = Cache(model.backend, model.config, batch, total, rewindable=0)
    found: list[Host] = []
    for start in range(0, total, chunk):
        step = Step(cache, tokens[:, start : start + chunk])
        logits = model.backend.to_numpy(model.logits(model.forward(step)))
        found.append(logits.reshape(batch, step.seq, -1))
        cache.advance(step.sequences, step.ends)
        if progress:
            progress(min(start + chunk, total), total)
    return model.parallel.joined(np.concatenate(found, axis=1))


def teacher_forced(
    model: Model,
    tokens: Host,
    *,
    prefill: int,
    chunk: int = CHUNK,
    mtp: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Host]:
    """Feed ``tokens`` [batch, total], the first ``prefill`` in chunks, the rest one by one.

    Gives ``logits`` [batch, 1 + total - prefill, vocab], float32 (float64 in float64 mode), and
    where ``mtp`` also ``mtp_logits`` [batch, vocab]: the MTP block over the prompt's streams with
    tokens 1 .. prefill, last position.
    """
    be = model.backend
    total = tokens.shape[1]
    check_ids(tokens, model.config.vocab_size)
    padded = model.parallel.padded(range(len(tokens)), len(tokens), 1)
    tokens = model.parallel.mine(tokens)
    batch = len(tokens)
    cache = Cache(be, model.config, batch, total, rewindable=0)
    following = tokens[:, 1 : prefill + 1] if mtp else None
    done = generate.prefill(model, cache, tokens[:, :prefill], chunk=chunk, mtp_next=following, progress=progress)
    logits, replay = [be.to_numpy(model.logits(done.streams))], Replay(model, cache)
    for i in range(prefill, total):
        step = Step(cache, tokens[:, i : i + 1], padded=padded)
        logits.append(np.array(be.to_numpy(replay.logits(step))))  # a copy: the next step's take their place
        cache.advance(step.sequences, step.ends)
        if progress:
            progress(i + 1, total)
    results = {"logits": np.stack(logits, axis=1)}
    if done.mtp_streams is not None:
        results["mtp_logits"] = be.to_numpy(model.logits(done.mtp_streams, mtp=True))
    return {name: model.parallel.joined(values) for name, values in results.items()}
