"""Prefill; generation and speculative decoding of some prompts: users of the engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.graph.engine import CHUNK, Engine, Request
from dsv4_core.graph.sampling import GREEDY, Sampling
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.model import Model


@dataclass
class Prefilled:
    """The last real token's streams of every sequence [n, hc, D], and the MTP block's (where asked
    for).
    """

    streams: Array
    mtp_streams: Array | None


def prefill(
    model: Model,
    cache: Cache,
    ids: Host,
    *,
    chunk: int = CHUNK,
    counts: Sequence[int] | None = None,
    mtp_next: Host | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prefilled:
    """Feed ``ids`` [n, S] in chunks; ``counts``: how many of each row are real (padding on the
    right).

    ``mtp_next`` [n, S]: run the MTP block too, on these next tokens. n = 0 on a rank whose group
    has no sequence.

    ``progress(done, of)`` is called after each chunk, in tokens per sequence.
    """
    batch, total = ids.shape
    h = mtp = None
    lengths = np.full(batch, total) if counts is None else np.asarray(counts)
    last: list[Array | None] = [None] * batch
    last_mtp: list[Array | None] = [None] * batch
    for start in range(0, total, chunk):
        part = ids[:, start : start + chunk]
        step = Step(cache, part, counts=np.clip(lengths - start, 0, part.shape[1]).tolist())
        h = model.forward(step)
        mtp = None
        if mtp_next is not None:
            following = np.ascontiguousarray(mtp_next[:, start : start + chunk].reshape(-1), np.int32)
            mtp = model.mtp(h, model.backend.from_numpy(following), step)
        cache.advance(step.sequences, step.ends)
        for b in range(batch):
            if 0 < lengths[b] - start <= part.shape[1]:
                at = b * step.seq + int(lengths[b]) - start - 1
                last[b] = h[at : at + 1]
                last_mtp[b] = None if mtp is None else mtp[at : at + 1]
        if progress:
            progress(min(start + chunk, total), total)
    if batch == 0 and h is not None:
        return Prefilled(h, mtp)
    joined = [
        model.backend.concat([row for row in rows if row is not None], axis=0) if rows and rows[0] is not None else None
        for rows in (last, last_mtp)
    ]
    if joined[0] is None:
        raise ValueError(
            "prefill: a sequence has no token; a prompt needs at least one (the tokenizer's begin-of-sentence token)"
        )
    return Prefilled(joined[0], joined[1])


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int | None]]:
    """Yield one token per sequence and step, None for a sequence that has stopped; a stop token is
    yielded, then its sequence stops. Of several ranks each yields the tokens of all sequences.
    Sequence b draws by seed (seed, b).

    Raises ``CacheError`` where prompt and ``max_tokens`` exceed the model's positions,
    ``ValueError`` for ids outside the vocabulary.
    """
    lengths = [len(p) for p in prompts]
    engine = Engine(
        model,
        slots=len(prompts),
        capacity=max(lengths) + max_tokens,
        chunk=chunk,
        budget=sum(lengths) + len(prompts),  # all begin in the first step
        reuse=False,
        progress=progress,
    )
    numbers = {}
    for b, prompt in enumerate(prompts):
        own = replace(sampling, seed=(*np.atleast_1d(sampling.seed).tolist(), b))
        numbers[engine.submit(Request(tuple(prompt), max_tokens, own, frozenset(stop)))] = b
    lines: list[deque[int]] = [deque() for _ in prompts]
    alive = set(numbers)
    while not engine.idle:
        for event in engine.step():
            if event.error:
                raise event.error
            if event.chosen:
                lines[numbers[event.id]].append(event.chosen.token)
            if event.finish:
                alive.remove(event.id)
        while any(lines) and all(lines[numbers[i]] for i in alive):
            yield [line.popleft() if line else None for line in lines]


@dataclass
class Drafts:
    """How speculative decoding fared: drafts proposed and accepted, tokens given, and the steps
    that gave them.
    """

    proposed: int = 0
    accepted: int = 0
    tokens: int = 0
    steps: int = 0


def speculate(
    model: Model,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    chunk: int = CHUNK,
    count: int | None = None,
    confidence: float = 0.0,
    drafts: Drafts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[int]:
    """Decode one sequence with up to ``count`` drafts a step (as many as the drafter makes where
    None): yields the same tokens as ``generate``, sampled ones too, as far as the model's positions
    go.

    The same bits where the backend is batch invariant; elsewhere a step of several tokens may round
    differently from several of one. ``confidence``: see ``Engine``. Raises ``ValueError`` where the
    model has no drafter, or one of fewer drafts.
    """
    capacity = min(len(prompt) + max_tokens + 1, model.config.max_position_embeddings)
    engine = Engine(
        model,
        slots=1,
        capacity=capacity,
        chunk=chunk,
        drafts=max(1, model.drafts) if count is None else count,
        confidence=confidence,
        reuse=False,
        progress=progress,
    )
    room = max(1, capacity - len(prompt) + 1)
    own = replace(sampling, seed=(*np.atleast_1d(sampling.seed).tolist(), 0))
    engine.submit(Request(tuple(prompt), min(max_tokens, room), own, frozenset(stop)))
    while not engine.idle:
        for event in engine.step():
            if drafts:
                seen = engine.stats
                drafts.proposed, drafts.accepted = seen.drafted, seen.accepted
                drafts.tokens, drafts.steps = seen.generated, seen.generated - seen.accepted
            if event.error:
                raise event.error
            if event.chosen:
                yield event.chosen.token
