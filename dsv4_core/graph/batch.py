"""One step of some slots: rows of tokens in; what follows each, and drafts, out. Knows ranks and
padding, not requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.graph.dspark import block_step
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.sampling import Choice, Sampling, choice, drawn, packed
from dsv4_core.graph.step import Joined, Step

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

PADDING = 8
"""Tokens of padding that cost less than a rectangle more, which attends by calls of its own."""


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
    """``chosen``: per row what follows its last tokens, one of each choice, in their order.
    ``begins``: where the tokens of each row that is here stand among the step's.
    """

    chosen: list[list[Chosen]]
    step: Step | Joined
    begins: Sequence[int]
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
        few = bool(self.drafting) and model.dspark is None and width <= DRAFTED  # of one shape, to be replayed
        step, begins = self._step(rows, here, width, padding=math.inf if few else PADDING)
        wanted = [len(row.choices) for row in rows]
        h = None
        taps: list[Array] = []
        if isinstance(step, Step) and width == 1 and not self.drafting and all(wanted):
            logits = self._replay.logits(step)
        else:
            if self.drafting and model.dspark:
                h = model.forward(step, taps)
            else:
                h = self._replay.streams(step) if few and isinstance(step, Step) else model.forward(step)
            if not any(wanted):
                return Outcome([[] for _ in rows], step, begins, h, taps)
            ends = [begin + len(row.tokens) for begin, row in zip(begins, here, strict=True)]
            at = [np.arange(end - len(row.choices), end) for end, row in zip(ends, here, strict=True)]
            logits = model.logits(self._picked(h, np.concatenate([np.zeros(0, int), *at])))
        return Outcome(self._chosen(logits, rows), step, begins, h, taps)

    def _step(
        self, rows: Sequence[Row], here: Sequence[Row], width: int, *, padding: float
    ) -> tuple[Step | Joined, list[int]]:
        """The rows that are here as rectangles of like widths, and where each row's tokens begin.
        ``width``: of the widest, here or on another rank.
        """
        steps, begins, begin = list[Step](), [0] * len(here), 0
        padded = self.model.parallel.padded([row.slot for row in rows], self.slots, width)
        for places in _rectangles([len(row.tokens) for row in here], padding) or [[]]:
            counts = [len(here[i].tokens) for i in places]
            ids = np.zeros((len(places), max(counts, default=width)), np.int64)
            for line, i in zip(ids, places, strict=True):
                line[: len(here[i].tokens)] = here[i].tokens
                begins[i], begin = begin, begin + len(line)
            steps.append(Step(self.cache, ids, [here[i].slot - self.first for i in places], counts, padded=padded))
        return steps[0] if len(steps) == 1 else Joined(steps), begins

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
        assert outcome.streams is not None
        model, be, step = self.model, self.model.backend, outcome.step
        here = [(row, line) for row, line in zip(rows, chosen, strict=True) if self._has(row.slot)]
        following = np.zeros(step.tokens, np.int32)
        ends = []
        for begin, (row, line) in zip(outcome.begins, here, strict=True):
            known = (*row.following, *line)[: len(row.tokens)]
            following[begin : begin + len(known)] = known
            if line:
                ends.append(begin + len(known) - 1)
        m = model.mtp(outcome.streams, be.from_numpy(following), step)
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
        dspark = model.dspark
        assert dspark is not None
        dspark.remember(outcome.taps, outcome.step)
        proposed: list[list[int]] = [[] for _ in rows]
        asked = [i for i, (line, wish) in enumerate(zip(chosen, wishes, strict=True)) if line and wish and wish.uniform]
        if not asked:
            return proposed
        here = [i for i in asked if self._has(rows[i].slot)]
        at = np.array([rows[i].slot - self.first for i in here], np.int64)
        stands = np.array([len((*rows[i].following, *chosen[i])[: len(rows[i].tokens)]) for i in here], np.int64)
        ids = np.full((len(here), c.dspark_block_size), c.dspark_noise_token_id, np.int64)
        ids[:, 0] = [chosen[i][-1] for i in here]
        block = block_step(self.cache, ids, at, self.cache.lengths[at] + stands)
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
        self.cache.advance(outcome.step.sequences, outcome.step.ends)
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
        """Rows ``at``; neighbours in one slice."""
        if len(at) == rows.shape[0] and (at == np.arange(len(at))).all():
            return rows
        if not len(at):
            return rows[0:0]
        parts = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1)
        return self.model.backend.concat([rows[int(p[0]) : int(p[-1]) + 1] for p in parts], axis=0)


def _rectangles(widths: Sequence[int], padding: float) -> list[list[int]]:
    """Places of rows, those of like width together: at most so many tokens of padding in each."""
    groups: list[list[int]] = []
    for i in sorted(range(len(widths)), key=lambda i: widths[i]):
        if groups and sum(widths[i] - widths[j] for j in groups[-1]) <= padding:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [sorted(group) for group in groups]
