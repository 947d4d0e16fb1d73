"""The laws: what must hold whatever the numbers are. Each returns None, or what is wrong.

Laws about equal results run on the backend's most precise mode (float64, else float32), where
rounding cannot hide an error, within a tolerance that the oracle derives; a backend without exact
modes is held to models of one layer within its noise. Laws about equal *bits* run in the mode that
is judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np

from dsv4_conformance.laws.small_model import (
    ALL,
    VOCAB,
    RandomWeights,
    Stage,
    apart,
    feed,
    feed_drafts,
    full,
    new_cache,
    some_ids,
    weights,
)
from dsv4_core.graph.generate import Drafts, generate, speculate
from dsv4_core.graph.model import Model
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import Host

NATIVE_STEP = 2.0**-6  # of logits' length: the same native arithmetic again, give or take a unit of BF16
FAR = 1 << 20  # max_position_embeddings of the published models


def differ(got: Host, want: Host, bound: float, what: str) -> str | None:
    """Say where two rows of logits [S, vocab] part by more than a bound, or nothing."""
    distance = apart(got, want).reshape(-1)
    if not distance.size or float(distance.max()) <= bound:  # a NaN is not below any bound
        return None
    p = int(np.argmax(~(distance <= bound)))
    count = int((~(distance <= bound)).sum())
    off = f"by {distance[p]:.3g} of its logits' length; tolerance {bound:.3g}"
    return f"{what}: position {p} is the first of {count} that differ, {off}"


def differing_bits(got: Host, want: Host, what: str) -> str | None:
    """Say where two arrays are not the same bits, or nothing."""
    if not want.size:
        return None
    a, b = (np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, -1) for x in (got, want))
    wrong = (a != b).any(-1)
    return (
        f"{what}: {int(wrong.sum())} of {wrong.size} elements have other bits, first {[int(i) for i in np.argwhere(wrong)[0]]}"
        if wrong.any()
        else None
    )


def in_chunks(
    stage: Stage, ratios: Sequence[int], ids: Host, chunks: Sequence[int], *, exact: bool
) -> tuple[Host, Host]:
    """Logits fed in chunks, and all at once."""
    model = stage.model(weights(tuple(ratios)), stage.exact if exact else stage.own)
    cache, ends = new_cache(model, len(ids), ids.shape[1]), np.cumsum(chunks)
    parts = [feed(model, cache, ids[:, end - n : end]) for n, end in zip(chunks, ends, strict=True)]
    return np.concatenate(parts, axis=1), full(model, ids)


def chunked_is_full(stage: Stage, *, ratios: tuple[int, ...], chunks: list[int], seed: int) -> str | None:
    """A prompt in chunks gives what it gives in one."""
    ratios = stage.layers(ratios)
    got, want = in_chunks(stage, ratios, some_ids((1, sum(chunks)), seed), chunks, exact=True)
    return differ(got[0], want[0], stage.tolerance(ratios), f"chunks {chunks} against one prefill")


def prefill_is_decode(stage: Stage, *, ratios: tuple[int, ...], prompt: int, steps: list[int], seed: int) -> str | None:
    """Tokens fed in steps of one, two or three after a prompt give what they give in a prefill."""
    ratios = stage.layers(ratios)
    got, want = in_chunks(stage, ratios, some_ids((2, prompt + sum(steps)), seed), [prompt, *steps], exact=True)
    problems = (
        differ(got[b], want[b], stage.tolerance(ratios), f"prefill of {prompt}, then steps of {steps}, sequence {b}")
        for b in range(2)
    )
    return next((p for p in problems if p), None)


def in_a_batch(
    stage: Stage, ratios: Sequence[int], lengths: list[int], padding: int, more: int, seed: int, *, exact: bool
) -> list[tuple[Host, Host]]:
    """Of every sequence of a ragged, padded batch, then decoded: its logits there, and alone."""
    model = stage.model(weights(tuple(ratios)), stage.exact if exact else stage.own)
    lengths = lengths if any(lengths) else [*lengths[:-1], 1]
    ids = some_ids((len(lengths), max(lengths) + max(padding, more)), seed)
    cache = new_cache(model, len(lengths), ids.shape[1])
    together = [feed(model, cache, ids[:, : max(lengths) + padding], counts=lengths)]
    together += [feed(model, cache, np.array([[ids[b, n + i]] for b, n in enumerate(lengths)])) for i in range(more)]
    pairs = []
    for b, n in enumerate(lengths):
        alone_cache = new_cache(model, 1, ids.shape[1])
        alone = [feed(model, alone_cache, ids[b : b + 1, :n])[0]] if n else []
        alone += [feed(model, alone_cache, ids[b : b + 1, n + i : n + i + 1])[0] for i in range(more)]
        mine = [together[0][b, :n], *(part[b] for part in together[1:])]
        pairs.append((np.concatenate(mine), np.concatenate([np.empty((0, VOCAB)), *alone]).astype(mine[0].dtype)))
    return pairs


def rounded_up(
    stage: Stage, ratios: Sequence[int], ids: Host, chunks: Sequence[int], least: int, *, exact: bool
) -> tuple[Host, Host]:
    """Logits fed in chunks, in steps of no more than they need, and of ``least`` or the next power
    of two.
    """
    model = stage.model(weights(tuple(ratios)), stage.exact if exact else stage.own)
    ends, logits = np.cumsum(chunks), []
    for up in (lambda n: n, lambda n: max(least, 1 << max(0, n - 1).bit_length())):
        with patch.object(model.backend, "round_up", up):
            cache = new_cache(model, len(ids), ids.shape[1])
            parts = [feed(model, cache, ids[:, end - n : end]) for n, end in zip(chunks, ends, strict=True)]
        logits.append(np.concatenate(parts, axis=1))
    return logits[0], logits[1]


def extents_do_not_show(
    stage: Stage, *, ratios: tuple[int, ...], chunks: list[int], least: int, seed: int
) -> str | None:
    """Steps whose extents are rounded up give what steps of no more than they need give."""
    ratios = stage.layers(ratios)
    got, want = rounded_up(stage, ratios, some_ids((2, sum(chunks)), seed), chunks, least, exact=True)
    what = f"chunks {chunks}, as much as needed against at least {least}"
    problems = (differ(got[b], want[b], stage.tolerance(ratios), f"{what}, sequence {b}") for b in range(2))
    return next((p for p in problems if p), None)


def replayed(
    stage: Stage, ratios: Sequence[int], prompts: Sequence[int], moves: Sequence[int], seed: int, *, exact: bool
) -> list[tuple[Host, Host]]:
    """Logits of two sequences' decode steps, replayed and run: of both (move 0), of the first or
    the second alone (1, 2), of both after the first has forgotten a token (3).
    """
    model = stage.model(weights(tuple(ratios)), stage.exact if exact else stage.own)
    room = max(prompts) + len(moves)
    ids, tokens = some_ids((2, max(prompts)), seed), some_ids((len(moves), 2, 1), seed + 1)
    caches = [new_cache(model, 2, room) for _ in range(2)]
    replay = Replay(model, caches[0])
    for cache in caches:
        feed(model, cache, ids, counts=list(prompts))
    pairs = []
    up = model.backend.round_up
    with patch.object(model.backend, "round_up", lambda n: up(max(n, 128))):  # shapes that come back, on any backend
        for move, fed in zip(moves, tokens, strict=True):
            chosen = {1: [0], 2: [1]}.get(move, [0, 1])
            logits = []
            for cache in caches:
                if move == 3:
                    cache.rewind(0, max(int(cache.lengths[0]) - 1, 0))
                step = Step(cache, fed[chosen], sequences=chosen)
                made = replay.logits(step) if cache is replay.cache else model.logits(model.forward(step))
                logits.append(np.array(model.backend.to_numpy(made)))
                cache.advance(step.sequences, step.ends)
            pairs.append((logits[0], logits[1]))
    return pairs


def replay_is_forward(
    stage: Stage, *, ratios: tuple[int, ...], prompts: list[int], moves: list[int], seed: int
) -> str | None:
    """A decode step that is replayed gives what it gives when it is run, whatever was replayed
    before.
    """
    ratios = stage.layers(ratios)
    pairs = replayed(stage, ratios, prompts, moves, seed, exact=True)
    what = f"after prompts of {prompts}, moves {moves}: move"
    problems = (differ(a, b, stage.tolerance(ratios), f"{what} {i}, replayed") for i, (a, b) in enumerate(pairs))
    return next((p for p in problems if p), None)


def batch_and_padding(
    stage: Stage, *, ratios: tuple[int, ...], lengths: list[int], padding: int, more: int, seed: int
) -> str | None:
    """A sequence in a ragged, padded batch gives what it gives alone."""
    ratios = stage.layers(ratios)
    pairs = in_a_batch(stage, ratios, lengths, padding, more, seed, exact=True)
    problems = (
        differ(a, b, stage.tolerance(ratios), f"sequence {i} of lengths {lengths} against alone")
        for i, (a, b) in enumerate(pairs)
    )
    return next((p for p in problems if p), None)


def reach(stage: Stage, *, ratio: int, window: int, changed: int, total: int, seed: int) -> str | None:
    """One layer's output changes with a token exactly where the token is visible: from itself on
    through its window, and from the end of its compressed row on.
    """
    changed = min(changed, total - 1)
    model = stage.model(weights((ratio,), window=window, topk=ALL))
    ids = some_ids((1, total), seed)
    other = ids.copy()
    other[0, changed] = (other[0, changed] + 1) % VOCAB
    distance = apart(full(model, other)[0], full(model, ids)[0])
    p = np.arange(total)
    sees = (p >= changed) & (p < changed + window)
    if ratio:
        sees |= (p + 1) // ratio > changed // ratio
    bound = stage.tolerance((ratio,))
    leaked = ~sees & ~(distance <= bound)
    missed = sees & ~(distance > bound) & (not stage.noisy)
    text = f"ratio {ratio}, window {window}: a change of token {changed}"
    if leaked.any():
        at = int(leaked.argmax())
        return (
            f"{text} reaches position {at}, which must not see it (moved by {distance[at]:.3g}; tolerance {bound:.3g})"
        )
    if missed.any():
        at = int(missed.argmax())
        return (
            f"{text} does not reach position {at}, which sees it (moved by {distance[at]:.3g}; noise up to {bound:.3g})"
        )
    return None


def rewind(stage: Stage, *, ratios: tuple[int, ...], at: int, wrong: list[int], more: int, seed: int) -> str | None:
    """After a rewind everything is as if the forgotten tokens had never been fed; twice, the second
    time over the rows that the first left.
    """
    ratios = stage.layers(ratios)
    model = stage.model(weights(ratios))
    ids, astray = some_ids((1, at + more), seed), some_ids((2, sum(wrong)), seed + 1)
    cache = new_cache(model, 1, at + max(more, sum(wrong)), rewindable=sum(wrong))
    feed(model, cache, ids[:, :at])
    for turn in range(2):
        for end, n in zip(np.cumsum(wrong), wrong, strict=True):
            feed(model, cache, astray[turn : turn + 1, end - n : end])
        cache.rewind(0, at)
    got = feed(model, cache, ids[:, at:])
    return differ(
        got[0],
        full(model, ids)[0, at:],
        stage.tolerance(ratios),
        f"rewound from {at + sum(wrong)} to {at}, tokens after {at}",
    )


def anywhere_as_the_oracle(
    stage: Stage, *, ratios: tuple[int, ...], start: int, chunks: list[int], seed: int
) -> str | None:
    """A model at any position, a million included, computes what the same graph computes on the
    oracle.
    """
    ratios = stage.layers(ratios)
    start = min(
        start, (FAR >> 4 if 4 in ratios else FAR) - sum(chunks)
    )  # with ratio 4, every token of the last 2^20 would read 2^18 keys
    source = weights(ratios, positions=FAR)
    ids, logits = some_ids((1, sum(chunks)), seed), []
    for model, parts in ((stage.model(source), chunks), (stage.model(source, stage.oracle), [sum(chunks)])):
        cache = new_cache(model, 1, start + sum(chunks), start=start)
        logits.append(
            np.concatenate(
                [feed(model, cache, ids[:, end - n : end])[0] for n, end in zip(parts, np.cumsum(parts), strict=True)]
            )
        )
    return differ(
        logits[0],
        logits[1],
        stage.tolerance(ratios),
        f"from position {start} on, in chunks {chunks}, against the oracle",
    )


def speculative_is_greedy(stage: Stage, *, ratios: tuple[int, ...], prompt: int, tokens: int, seed: int) -> str | None:
    """Speculative decoding gives the tokens of greedy decoding."""
    model = stage.model(weights(ratios))
    ids = some_ids((prompt,), seed).tolist()
    greedy = [step[0] for step in generate(model, [ids], max_tokens=tokens)]
    speculative = list(speculate(model, ids, max_tokens=tokens))
    if speculative == greedy:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(speculative, greedy, strict=False)) if a != b),
        min(len(greedy), len(speculative)),
    )
    return f"token {at} after a prompt of {prompt} is {speculative[at : at + 1]} by speculative, {greedy[at : at + 1]} by greedy decoding"


def drafts_are_accepted(stage: Stage, *, ratios: tuple[int, ...], prompt: int, tokens: int, seed: int) -> str | None:
    """Speculative decoding proposes, step for step, what the MTP block says of the text: as many
    drafts are right as the model has right.
    """
    ratios = stage.layers(ratios)
    model = stage.model(weights(ratios))
    start = some_ids((prompt,), seed).tolist()
    drafts = Drafts()
    text = [*start, *speculate(model, start, max_tokens=tokens, drafts=drafts)]
    ids = np.array([text])
    logits = feed_drafts(model, new_cache(model, 1, len(text)), ids[:, :-1], ids[:, 1:])[0]
    right = logits[prompt - 1 :].argmax(-1)[:-1] == ids[0, prompt + 1 :]
    could, at = 0, 0
    while at < len(right) - 1:  # a draft that is right takes the next token's step; none is made for the last
        could += int(right[at])
        at += 2 if right[at] else 1
    if drafts.accepted >= could or stage.noisy:
        return None
    return f"{drafts.accepted} of {drafts.proposed} drafts were accepted; by the MTP block's logits over the same text {could} are right"


def two_models_alive(stage: Stage, *, ratios: tuple[int, ...], prompt: int, steps: int, seed: int) -> str | None:
    """Two models of other weights in one process, fed in turns, give what each gives alone."""
    ratios = stage.layers(ratios)
    ids = some_ids((1, prompt + steps), seed)
    sources = [RandomWeights(weights(ratios).config, seed=n) for n in (seed + 1, seed + 2)]
    for backend in dict.fromkeys((stage.exact, stage.own)):
        alone = [in_steps([Model(s, backend)], ids, prompt)[0] for s in sources]
        together = in_steps([Model(s, backend) for s in sources], ids, prompt)
        for i, (a, b) in enumerate(zip(together, alone, strict=True)):
            bound = stage.tolerance(ratios) if backend is stage.exact else NATIVE_STEP
            if problem := differ(
                a[0], b[0], bound, f"model {i} of two that are fed in turns, {backend.numerics}, against alone"
            ):
                return problem
    return None


def in_steps(models: Sequence[Model], ids: Host, prompt: int) -> list[Host]:
    """Logits of models that take turns: a prompt, then token after token."""
    caches = [new_cache(m, 1, ids.shape[1]) for m in models]
    parts: list[list[Host]] = [[] for _ in models]
    for begin, end in ((0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))):
        for model, cache, mine in zip(models, caches, parts, strict=True):
            mine.append(feed(model, cache, ids[:, begin:end]))
    return [np.concatenate(mine, axis=1) for mine in parts]


def same_bits_twice(stage: Stage, *, ratios: tuple[int, ...], chunks: list[int], seed: int) -> str | None:
    """The same call twice gives the same bits."""
    ids = some_ids((2, sum(chunks)), seed)
    first, second = (in_chunks(stage, ratios, ids, chunks, exact=False) for _ in range(2))
    return differing_bits(first[0], second[0], f"chunks {chunks}, the same twice")


def same_bits_in_chunks(stage: Stage, *, ratios: tuple[int, ...], chunks: list[int], seed: int) -> str | None:
    """A token's logits are the same bits however the prompt is cut."""
    got, want = in_chunks(stage, ratios, some_ids((1, sum(chunks)), seed), chunks, exact=False)
    return differing_bits(got, want, f"chunks {chunks} against one prefill")


def same_bits_replayed(
    stage: Stage, *, ratios: tuple[int, ...], prompts: list[int], moves: list[int], seed: int
) -> str | None:
    """A decode step that is replayed gives the bits that it gives when it is run."""
    pairs = replayed(stage, ratios, prompts, moves, seed, exact=False)
    problems = (differing_bits(a, b, f"move {i} of {moves}, replayed") for i, (a, b) in enumerate(pairs))
    return next((p for p in problems if p), None)


def same_bits_rounded_up(
    stage: Stage, *, ratios: tuple[int, ...], chunks: list[int], least: int, seed: int
) -> str | None:
    """A token's logits are the same bits however far a step's extents are rounded up."""
    got, want = rounded_up(stage, ratios, some_ids((2, sum(chunks)), seed), chunks, least, exact=False)
    return differing_bits(got, want, f"chunks {chunks}, as much as needed against at least {least}")


def same_bits_in_a_batch(
    stage: Stage, *, ratios: tuple[int, ...], lengths: list[int], padding: int, more: int, seed: int
) -> str | None:
    """A token's logits are the same bits whatever else is in the batch."""
    pairs = in_a_batch(stage, ratios, lengths, padding, more, seed, exact=False)
    problems = (
        differing_bits(a, b, f"sequence {i} of lengths {lengths} against alone") for i, (a, b) in enumerate(pairs)
    )
    return next((p for p in problems if p), None)
