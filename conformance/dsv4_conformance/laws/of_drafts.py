"""Laws of drafters, on the backend against the oracle: DSpark's blocks and the MTP block's logits,
in decode and after drafts that were taken back.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dsv4_conformance.laws.of_models import differ
from dsv4_conformance.laws.small_model import (
    VOCAB,
    OracleBackend,
    RandomWeights,
    Stage,
    apart,
    feed_drafts,
    new_cache,
    some_ids,
    weights,
)
from dsv4_conformance.verdict.budget import SAFETY
from dsv4_core.graph.dspark import block_step
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array, Numerics
    from dsv4_core.graph.cache import Cache

BLOCK, STAGES = 3, 2


@functools.lru_cache(maxsize=64)
def drafting(ratios: tuple[int, ...]) -> RandomWeights:
    """Layers of these compress ratios, of which the last two are tapped, and DSpark of two stages;
    the same object each time.
    """
    config = weights(ratios).config
    layers = len(ratios)
    return RandomWeights(
        replace(
            config,
            compress_ratios=(*ratios, *(0 for _ in range(STAGES))),
            dspark_block_size=BLOCK,
            dspark_noise_token_id=VOCAB - 1,
            dspark_target_layer_ids=tuple(range(max(0, layers - 2), layers)),
            dspark_markov_rank=32,
        )
    )


def _remembered(model: Model, cache: Cache, ids: Host, counts: Sequence[int] | None = None) -> None:
    """Run a step with its context rows."""
    assert model.dspark
    step = Step(cache, ids, counts=counts)
    taps: list[Array] = []
    model.forward(step, taps)
    model.dspark.remember(taps, step)
    cache.advance(step.sequences, step.ends)


def _drafted(model: Model, cache: Cache, true: Host) -> tuple[Host, Host]:
    """Logits [n, BLOCK, vocab] and confidences before the sigmoid [n, BLOCK] of a block a sequence,
    the last sequence first, draft after draft as an engine asks for them.
    """
    be, n = model.backend, len(true)
    assert model.dspark
    order = np.arange(n)[::-1]
    block = np.full((n, BLOCK), model.config.dspark_noise_token_id)
    block[:, 0] = true[order, 0]
    g, base = model.dspark.block(block_step(cache, block, order, cache.lengths[order]))
    logits, sure = be.to_numpy(base).astype(np.float64).reshape(n, BLOCK, VOCAB), np.empty((n, BLOCK))
    for k in range(BLOCK):
        rows = be.concat([g[i * BLOCK + k : i * BLOCK + k + 1] for i in range(n)], axis=0)
        added, certain = model.dspark.after(be.from_numpy(np.ascontiguousarray(true[order, k], np.int32)), rows)
        logits[:, k] += be.to_numpy(added)
        sure[:, k] = be.to_numpy(certain)[:, 0]
    return logits[order], sure[order]


def blocks(
    model: Model, ids: Host, steps: Sequence[int], true: Host, *, rejected: int, behind: int = 0
) -> tuple[Host, Host]:
    """Logits [n, BLOCK, vocab] and confidences before the sigmoid [n, BLOCK] of the block after
    ``ids`` [n, total]; the last sequence has ``behind`` tokens fewer (one at least).

    ``ids`` come in ``steps``, each after a block that is drafted and as many as ``rejected`` other
    tokens, which are taken back. ``true`` [n, BLOCK]: the tokens that stand before each draft, the
    anchor first.
    """
    n, total = ids.shape
    cache = new_cache(model, n, total + rejected)
    short = min(behind, steps[0] - 1)
    counts = [*[steps[0]] * (n - 1), steps[0] - short]
    _remembered(model, cache, ids[:, : steps[0]], counts)
    for size in steps[1:]:
        at = cache.lengths[:n].copy()
        if rejected:
            _drafted(model, cache, (true + 1) % VOCAB)
            _remembered(model, cache, (ids[:, :1] + 1 + np.arange(rejected)) % VOCAB)
            for sequence in range(n):
                cache.rewind(sequence, int(at[sequence]))
        _remembered(model, cache, np.stack([ids[b, at[b] : at[b] + size] for b in range(n)]))
    return _drafted(model, cache, true)


def spread(numerics: Numerics, source: RandomWeights, logits: Callable[[Model], Host]) -> float:
    """How far apart the logits of two correct drafters may lie: as ``small_model.tolerance``."""
    exact = logits(Model(source, OracleBackend(numerics=numerics)))
    found = (logits(Model(source, OracleBackend(numerics=numerics, perturbation=i))) for i in range(3))
    return SAFETY * float(max(apart(one, exact).max() for one in found))


@functools.cache
def tolerance(numerics: Numerics, ratios: tuple[int, ...]) -> float:
    """Of blocks."""
    ids = some_ids((1, 60 + BLOCK), 0)
    return spread(numerics, drafting(ratios), lambda m: blocks(m, ids[:, :60], [60], ids[:, 60:], rejected=0)[0])


@functools.cache
def mtp_tolerance(numerics: Numerics, ratios: tuple[int, ...]) -> float:
    """Of the MTP block's logits."""
    ids = some_ids((1, 151), 0)
    return spread(numerics, weights(ratios), lambda m: feed_drafts(m, new_cache(m, 1, 150), ids[:, :-1], ids[:, 1:]))


def blocks_are_the_oracles(
    stage: Stage, *, ratios: tuple[int, ...], steps: list[int], rejected: int, behind: int, seed: int
) -> str | None:
    """DSpark's blocks of two sequences, the second of which is behind, after a prompt and steps
    each after tokens that were taken back, are the oracle's after one prefill.
    """
    ratios = stage.layers(ratios)
    source, total = drafting(ratios), sum(steps)
    ids = some_ids((2, total + BLOCK), seed)
    known, true = ids[:, :total], ids[:, total:]
    got = blocks(stage.model(source), known, steps, true, rejected=rejected, behind=behind)
    short = min(behind, steps[0] - 1)
    want = blocks(stage.model(source, stage.oracle), known, [total], true, rejected=0, behind=short)
    bound = tolerance(stage.exact.numerics, ratios)
    text = f"after {total} tokens in steps of {steps}, {rejected} rejected before each, the second {short} behind, against the oracle"
    for sequence in range(2):
        if wrong := differ(got[0][sequence], want[0][sequence], bound, f"draft logits {text}"):
            return wrong
    return differ(got[1], want[1], bound, f"confidences {text}")


def drafts_in_decode(stage: Stage, *, ratios: tuple[int, ...], prompt: int, steps: list[int], seed: int) -> str | None:
    """The MTP block's logits of two sequences in steps after a prompt, each after a draft that was
    taken back, are the oracle's of one prefill.
    """
    ratios = stage.layers(ratios)
    source, total = weights(ratios), prompt + sum(steps)
    model, oracle = stage.model(source), stage.model(source, stage.oracle)
    ids = some_ids((2, total + 1), seed)
    whole = feed_drafts(oracle, new_cache(oracle, 2, total), ids[:, :total], ids[:, 1:])
    cache = new_cache(model, 2, total + 2, rewindable=2)
    parts, at = [feed_drafts(model, cache, ids[:, :prompt], ids[:, 1 : prompt + 1])], prompt
    for n in steps:
        astray = np.stack([ids[:, at], (ids[:, at] + 1) % VOCAB], axis=1)
        feed_drafts(model, cache, astray, astray)
        for sequence in range(2):
            cache.rewind(sequence, at)
        parts.append(feed_drafts(model, cache, ids[:, at : at + n], ids[:, at + 1 : at + n + 1]))
        at += n
    got, bound = np.concatenate(parts, axis=1), mtp_tolerance(stage.exact.numerics, ratios)
    text = f"draft logits after a prompt of {prompt} in steps of {steps}, each after a draft that was taken back"
    return next((p for b in range(2) if (p := differ(got[b], whole[b], bound, f"{text}, sequence {b}"))), None)
