"""Laws of DSpark: what a block of drafts is computed from, on the backend against the oracle."""

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
    new_cache,
    some_ids,
    weights,
)
from dsv4_conformance.verdict.budget import SAFETY
from dsv4_core.graph.dspark import block_step
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def _remembered(model: Model, cache: Cache, ids: Host) -> None:
    """Run a step with its context rows."""
    assert model.dspark
    step = Step(cache, ids)
    taps: list[Array] = []
    model.forward(step, taps)
    model.dspark.remember(taps, step)
    cache.advance(step.sequences, step.ends)


def blocks(model: Model, ids: Host, steps: Sequence[int], true: Host, *, rejected: int) -> tuple[Host, Host]:
    """Logits [n, BLOCK, vocab] and confidences before the sigmoid [n, BLOCK] of the block after
    ``ids`` [n, total].

    ``ids`` come in ``steps``, each after ``rejected`` other tokens that are taken back. ``true``
    [n, BLOCK]: the tokens that stand before each draft, the anchor first.
    """
    be, (n, total) = model.backend, ids.shape
    assert model.dspark
    cache = new_cache(model, n, total + rejected)
    for end, size in zip(np.cumsum(steps), steps, strict=True):
        if rejected:
            _remembered(model, cache, (ids[:, :1] + 1 + np.arange(rejected)) % VOCAB)
            for sequence in range(n):
                cache.rewind(sequence, int(end) - size)
        _remembered(model, cache, ids[:, end - size : end])
    block = np.full((n, BLOCK), model.config.dspark_noise_token_id)
    block[:, 0] = true[:, 0]
    g, base = model.dspark.block(block_step(cache, block, np.arange(n), np.full(n, total)))
    added, sure = model.dspark.after(be.from_numpy(true.reshape(-1).astype(np.int32)), g)
    logits = be.to_numpy(base).astype(np.float64) + be.to_numpy(added)
    return logits.reshape(n, BLOCK, VOCAB), be.to_numpy(sure).astype(np.float64).reshape(n, BLOCK)


@functools.cache
def tolerance(numerics: Numerics, ratios: tuple[int, ...]) -> float:
    """How far apart the logits of two correct drafters may lie: as ``small_model.tolerance``, for
    the block.
    """
    source, ids = drafting(ratios), some_ids((1, 60 + BLOCK), 0)
    asked = (ids[:, :60], [60], ids[:, 60:])
    exact, _ = blocks(Model(source, OracleBackend(numerics=numerics)), *asked, rejected=0)
    found = (
        blocks(Model(source, OracleBackend(numerics=numerics, perturbation=i)), *asked, rejected=0)[0] for i in range(3)
    )
    return SAFETY * float(max(apart(logits, exact).max() for logits in found))


def blocks_are_the_oracles(
    stage: Stage, *, ratios: tuple[int, ...], steps: list[int], rejected: int, seed: int
) -> str | None:
    """DSpark's block after a prompt in steps, each after tokens that were taken back, is the
    oracle's after one prefill.
    """
    ratios = stage.layers(ratios)
    source, total = drafting(ratios), sum(steps)
    ids = some_ids((2, total + BLOCK), seed)
    known, true = ids[:, :total], ids[:, total:]
    got = blocks(stage.model(source), known, steps, true, rejected=rejected)
    want = blocks(stage.model(source, stage.oracle), known, [total], true, rejected=0)
    bound = tolerance(stage.exact.numerics, ratios)
    text = f"after {total} tokens in steps of {steps}, {rejected} rejected before each, against the oracle"
    for sequence in range(2):
        if wrong := differ(got[0][sequence], want[0][sequence], bound, f"draft logits {text}"):
            return wrong
    return differ(got[1], want[1], bound, f"confidences {text}")
