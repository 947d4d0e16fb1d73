"""One step of some slots: rows of tokens in; what follows each, and drafts, out. Knows ranks and
padding, not requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.graph.dspark import block_step
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.sampling import Choice, Sampling, choice, drawn, packed
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.model import Model
    from dsv4_core.graph.sampling import Chosen

DRAFTED = (
    8  # tokens a row up to which steps of a drafting model are replayed: a token and its drafts, not a prompt's chunk
)


@dataclass(frozen=True)
class Row:
    """Tokens that a slot is fed; what follows the last of them is chosen, by one of ``choices``
    each. ``following``: the ids that come after the tokens, as far as they are known.
    """

    slot: int
    tokens: tuple[int, ...]
    choices: Sequence[Choice]
    following: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wish:
    """How a row's next tokens will be chosen: the sampling, and a uniform number for each that may
    be drafted.
    """

    sampling: Sampling
    uniform: Sequence[float]


@dataclass(frozen=True)
class Outcome:
    """``chosen``: per row what follows its last tokens, one of each choice, in their order."""

    chosen: list[list[Chosen]]
    step: Step | None = None
    streams: Array | None = None
    taps: Sequence[Array] = ()


class Batch:
    """Runs rows on a model and its cache, whose sequences are the slots from ``first`` on, of
    ``slots`` that all ranks have together.
    """

    def __init__(
        self, model: Model, cache: Cache, *, first: int, slots: int, drafts: int, confidence: float = 0.0
    ) -> None:
        self.model, self.cache, self.first, self.slots, self.drafting = model, cache, first, slots, drafts
        self.confidence = confidence
        self._replay = Replay(model, cache)

    def forward(self, rows: Sequence[Row]) -> Outcome:
        """Feed rows, sorted by slot, and choose. The cache's rows are written, its lengths are not.

        On a rank that has none of the slots it takes part in the exchanges alone.
        """
        model = self.model
        here = [row for row in rows if self._has(row.slot)]
        width = max(len(row.tokens) for row in rows)
        ids = np.zeros((len(here), width), np.int64)
        for line, row in zip(ids, here, strict=True):
            line[: len(row.tokens)] = row.tokens
        counts = [len(row.tokens) for row in here]
        padded = model.parallel.padded([row.slot for row in rows], self.slots, width)
        step = Step(self.cache, ids, [row.slot - self.first for row in here], counts, padded=padded)
        wanted = [len(row.choices) for row in rows]
        h = None
        taps: list[Array] = []
        if width == 1 and not self.drafting and all(wanted):
            logits = self._replay.logits(step)
        else:
            if self.drafting and model.dspark:
                h = model.forward(step, taps)
            else:
                h = self._replay.streams(step) if self.drafting and width <= DRAFTED else model.forward(step)
            if not any(wanted):
                return Outcome([[] for _ in rows], step, h, taps)
            ends = [i * width + len(row.tokens) for i, row in enumerate(here)]
            at = [np.arange(end - len(row.choices), end) for end, row in zip(ends, here, strict=True)]
            logits = model.logits(self._picked(h, np.concatenate([np.zeros(0, int), *at])))
        return Outcome(self._chosen(logits, rows), step, h, taps)

    def _chosen(self, logits: Array, rows: Sequence[Row]) -> list[list[Chosen]]:
        """Choose from logits of those rows' choices whose slots are here: greedy ones in one call,
        all others in another.
        """
        model, be, vocab = self.model, self.model.backend, self.model.config.vocab_size
        choices = [each for row in rows if self._has(row.slot) for each in row.choices]
        tokens = np.zeros(len(choices), np.int32)
        greedy = np.array([i for i, each in enumerate(choices) if each.greedy], int)
        if greedy.size:
            zeros = be.from_numpy(np.zeros(len(greedy), np.float32))
            tokens[greedy] = be.to_numpy(be.sample(self._picked(logits, greedy), zeros, temperature=0.0, top_p=1.0))
        asked = [each.logprobs for row in rows for each in row.choices if each.logprobs is not None]
        likely = min(vocab, max(asked, default=0))
        told = np.zeros((len(choices), 1 + 2 * likely), be.wide_dtype)  # ids below 2^24 are exact in it
        others = np.array([i for i, each in enumerate(choices) if not each.greedy], int)
        if others.size:
            *operands, allowed = packed([choices[i] for i in others], vocab)
            uniform, heat, top_p, top_k, min_p, ids, added = map(be.from_numpy, operands)
            mask = None if allowed is None else be.from_numpy(allowed)
            lines = self._picked(logits, others)
            found = be.sample_each(lines, uniform, heat, top_p, top_k, min_p, ids, added, mask, likely=likely)
            tokens[others], *columns = map(be.to_numpy, found)
            told[others] = np.concatenate([column.reshape(len(others), -1) for column in columns], axis=1)
        tokens = model.parallel.joined(tokens)
        reports = model.parallel.joined(told).tolist() if asked else [()] * len(tokens)
        every = iter(zip(tokens.tolist(), reports, strict=True))
        return [[each.told(*next(every)) for each in row.choices] for row in rows]

    def drafts(
        self,
        rows: Sequence[Row],
        outcome: Outcome,
        chosen: Sequence[Sequence[int]],
        wishes: Sequence[Wish | None],
    ) -> list[list[int]]:
        """Let the drafter see the same tokens; give what it proposes after each row's ``chosen``
        tokens, if there are any.

        ``wishes``: how each row's next tokens will be chosen, None where no draft is wanted.
        """
        if not self.drafting:
            return [[] for _ in rows]
        if self.model.dspark:
            return self._block_drafts(rows, outcome, chosen, wishes)
        assert outcome.step is not None
        assert outcome.streams is not None
        model, be, step = self.model, self.model.backend, outcome.step
        here = [(row, line) for row, line in zip(rows, chosen, strict=True) if self._has(row.slot)]
        following = np.zeros((step.batch, step.seq), np.int32)
        ends = []
        for i, (row, line) in enumerate(here):
            known = (*row.following, *line)[: len(row.tokens)]
            following[i, : len(known)] = known
            if line:
                ends.append(i * step.seq + len(known) - 1)
        m = model.mtp(outcome.streams, be.from_numpy(following.reshape(-1)), step)
        if not any(chosen):
            return [[] for _ in rows]
        logits = model.logits(self._picked(m, np.array(ends, int)), mtp=True)
        greedy = be.sample(logits, be.from_numpy(np.zeros(len(ends), np.float32)), temperature=0.0, top_p=1.0)
        proposed = iter(model.parallel.joined(be.to_numpy(greedy)).tolist())
        return [[token for token in (next(proposed),) if token >= 0] if line else [] for line in chosen]

    def _block_drafts(
        self,
        rows: Sequence[Row],
        outcome: Outcome,
        chosen: Sequence[Sequence[int]],
        wishes: Sequence[Wish | None],
    ) -> list[list[int]]:
        """DSpark: context rows of all tokens (those of rejected ones are written again), then a
        block a sequence.

        A draft is drawn as the token will be, with the same uniform number, so that the two agree
        where the distributions do. The confidence of a draft is judged before it is drawn.
        """
        model, be, c = self.model, self.model.backend, self.model.config
        dspark, step = model.dspark, outcome.step
        assert dspark is not None
        assert step is not None
        dspark.remember(outcome.taps, step)
        proposed: list[list[int]] = [[] for _ in rows]
        asked = [i for i, (line, wish) in enumerate(zip(chosen, wishes, strict=True)) if line and wish and wish.uniform]
        if not asked:
            return proposed
        here = [i for i in asked if self._has(rows[i].slot)]
        places = {row.slot: b for b, row in enumerate(row for row in rows if self._has(row.slot))}
        at = np.array([places[rows[i].slot] for i in here], int)
        stands = np.array([len((*rows[i].following, *chosen[i])[: len(rows[i].tokens)]) for i in here], np.int64)
        ids = np.full((len(here), c.dspark_block_size), c.dspark_noise_token_id, np.int64)
        ids[:, 0] = [chosen[i][-1] for i in here]
        block = block_step(self.cache, ids, step.sequences[at], step.starts[at] + stands)
        g, logits = dspark.block(block)
        base = model.parallel.joined(be.to_numpy(logits)).reshape(len(asked), c.dspark_block_size, -1)
        last = {i: chosen[i][-1] for i in asked}
        survives = dict.fromkeys(asked, 1.0)
        alive = set(asked)
        for k in range(min(self.drafting, c.dspark_block_size)):
            rows_k = self._picked(g, np.arange(len(here)) * c.dspark_block_size + k)
            tokens = np.array([last[i] for i in here], np.int32)
            added, sure = (model.parallel.joined(be.to_numpy(x)) for x in dspark.after(be.from_numpy(tokens), rows_k))
            for n, i in enumerate(asked):
                wish = wishes[i]
                assert wish is not None
                survives[i] *= float(1 / (1 + np.exp(-np.float64(sure[n, 0]))))
                if k >= len(wish.uniform) or survives[i] < self.confidence:
                    alive.discard(i)
                if i in alive:
                    token = drawn(base[n, k] + added[n], choice(wish.sampling, wish.uniform[k], {}))
                    if token < 0:
                        alive.discard(i)
                    else:
                        last[i] = token
                        proposed[i].append(token)
            if not alive:
                break
        return proposed

    def advance(self, rows: Sequence[Row], outcome: Outcome, stands: Sequence[int]) -> None:
        """Note that of each row's tokens the first ``stands`` ones stand; the others were drafts
        that are forgotten.
        """
        step = outcome.step
        assert step is not None
        self.cache.advance(step.sequences, step.ends)
        for row, count in zip(rows, stands, strict=True):
            if count < len(row.tokens) and self._has(row.slot):
                here = row.slot - self.first
                self.cache.rewind(here, int(self.cache.lengths[here]) - len(row.tokens) + count)

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        if self._has(slot):
            self.cache.rewind(slot - self.first, 0)

    def _has(self, slot: int) -> bool:
        return 0 <= slot - self.first < self.cache.sequences

    def _picked(self, rows: Array, at: Host) -> Array:
        """Rows ``at``, ascending; neighbours in one slice."""
        if len(at) == rows.shape[0]:
            return rows
        if not len(at):
            return rows[0:0]
        parts = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1)
        return self.model.backend.concat([rows[int(p[0]) : int(p[-1]) + 1] for p in parts], axis=0)
