"""Prefill, decode, sampling, and speculative decoding with the MTP block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.graph.cache import Cache
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.model import Model

CHUNK = 2048  # tokens of a prefill step: activations and scores of one chunk are alive at a time


@dataclass(frozen=True)
class Sampling:
    """``temperature = 0`` is greedy.

    Each sequence draws from a stream of its own, so that its text does not depend on the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a temperature below 0 or a top-p outside (0, 1]."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1]")


@dataclass
class Prefilled:
    """The last real token's streams of every sequence [n, hc, D], and the MTP block's (where asked for)."""

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
    """Feed ``ids`` [n, S] in chunks; ``counts``: how many of each row are real (padding on the right).

    ``mtp_next`` [n, S]: run the MTP block too, on these next tokens. n = 0 on a rank whose group has no sequence.

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
    sampling: Sampling = Sampling(),
    stop: Collection[int] = (),
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int | None]]:
    """Yield one token per sequence and step, None for a sequence that has stopped; a stop token is yielded, then its
    sequence stops. Of several ranks each yields the tokens of all sequences.

    Raises ``CacheError`` where prompt and ``max_tokens`` exceed the model's positions, ``ValueError`` for ids outside
    the vocabulary.
    """
    batch, mine = len(prompts), model.parallel.mine
    lengths = np.array([len(p) for p in prompts])
    ids = np.zeros((batch, max(lengths)), np.int64)
    cache = Cache(model.backend, model.config, len(mine(lengths)), int(max(lengths)) + max_tokens, rewindable=0)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    counts = mine(lengths).tolist()
    streams = prefill(model, cache, mine(ids), chunk=chunk, counts=counts, progress=progress).streams
    draws = [np.random.default_rng((sampling.seed, b)) for b in range(batch)]
    alive = np.ones(batch, bool)
    logits, replay = model.logits(streams), Replay(model, cache)
    for _ in range(max_tokens):
        uniform = np.array([d.random() for d in draws], np.float32)
        tokens = _sample(model, logits, sampling, mine(uniform))
        yield [int(t) if a else None for t, a in zip(tokens, alive, strict=True)]
        alive &= ~np.isin(tokens, list(stop))
        if not alive.any():
            return
        if (lengths[alive] >= cache.capacity).any():
            return
        step = Step(cache, mine(tokens[:, None]), counts=mine(alive).astype(int).tolist())
        lengths += alive
        logits = replay.logits(step)
        cache.advance(step.sequences, step.ends)


@dataclass
class Drafts:
    """How speculative decoding fared: drafts proposed and accepted."""

    proposed: int = 0
    accepted: int = 0


def speculate(
    model: Model,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    stop: Collection[int] = (),
    chunk: int = CHUNK,
    drafts: Drafts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[int]:
    """Greedy decoding of one sequence, two tokens a step where the MTP block guesses the second one right: yields the
    same tokens as ``generate``.

    The same bits too where the backend is batch invariant; elsewhere a step of two tokens may round differently from
    two of one.
    """
    be, mine, drafts = model.backend, model.parallel.mine, drafts or Drafts()
    here = len(mine(np.zeros(1)))  # 0 on a rank whose group does not have the sequence
    capacity = min(len(prompt) + max_tokens + 1, model.config.max_position_embeddings)
    cache = Cache(be, model.config, here, capacity, rewindable=1)
    *head, last = prompt
    length = len(head)
    if head:
        following = mine(np.array([prompt[1:]]))
        prefill(model, cache, mine(np.array([head])), chunk=chunk, mtp_next=following, progress=progress)
    pending = [last]  # tokens whose keys are not cached yet: the newest certain one, then perhaps a draft
    produced = 0
    while True:
        step = Step(cache, mine(np.array([pending])))
        h = model.forward(step)
        certain = _sample(model, model.logits(h), Sampling(), np.zeros(step.tokens, np.float32))
        accepted = 1 if len(pending) == 1 or certain[0] != pending[1] else 2
        drafts.proposed += len(pending) - 1
        drafts.accepted += accepted - 1
        for token in certain[:accepted].tolist():
            yield token
            produced += 1
            if produced == max_tokens or token in stop:
                return
        m = model.mtp(h, be.from_numpy(certain[: step.tokens]), step)
        cache.advance(step.sequences, step.ends)
        length += accepted
        if here and accepted < len(pending):
            cache.rewind(0, length)
        room = cache.capacity - length
        if room == 0:
            return
        m = m[accepted - 1 : accepted] if here else m
        draft = _sample(model, model.logits(m, mtp=True), Sampling(), np.zeros(here, np.float32))
        pending = [int(certain[accepted - 1]), int(draft[0])][:room]


def _sample(model: Model, logits: Array, sampling: Sampling, uniform: Host) -> Host:
    """Sampled ids int32 on the host, of all ranks' sequences: the one thing that the graph reads back."""
    be = model.backend
    ids = be.sample(logits, be.from_numpy(uniform), temperature=sampling.temperature, top_p=sampling.top_p)
    return model.parallel.joined(be.to_numpy(ids))
