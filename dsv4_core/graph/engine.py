"""Many requests on one model: continuous batching, chunked prefill beside decodes, prefix reuse,
drafts.

No threads, no clock, no HTTP: ``submit``, ``cancel``, ``step``, ``stats``. Everything is decided by
the calls and their order alone, so laws can drive it, and ranks that are called alike do alike.

In batch-invariant mode a request's tokens do not depend on its company, on slots, chunks or
budgets.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.graph.batch import Batch, Row, Wish
from dsv4_core.graph.cache import SHARED, Cache, CacheError, Snapshot
from dsv4_core.graph.sampling import GREEDY, Choice, Chosen, Constraint, NoNumberError, Sampling, choice, packed_bits
from dsv4_core.graph.step import check_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from dsv4_core.graph.model import Model

CHUNK = 2048  # tokens of a prefill step: activations and scores of one chunk are alive at a time
_MANY = 1 << 31
FAR = 4096  # a long prompt leaves a snapshot at each multiple of it, beside the one near its end

Likely = tuple[tuple[int, float], ...]


class BusyError(RuntimeError):
    """The queue is full: try again later."""


@dataclass(frozen=True)
class Request:
    """What to continue, and how.

    ``stop``: ids that end it; the stop id is given out. ``draft``: take drafts, where the engine
    makes them: they change its speed, not its tokens. ``prompt_logprobs``: report the prompt's own
    log-probabilities, with so many likely ids.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: Collection[int] = frozenset()
    constraint: Constraint | None = field(default=None, compare=False)
    draft: bool = True
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class Event:
    """A token of request ``id`` was chosen, or it is over, or both.

    ``finish``: "stop", "length", "cancelled" or "error" (``error`` is what was raised). With the
    first token come ``prompt``, the prompt's tokens' log-probabilities where asked for (the first
    token has none), and ``hit``, how many of the prompt's tokens were not computed again.
    """

    id: int
    chosen: Chosen | None = None
    finish: str | None = None
    error: Exception | None = None
    prompt: tuple[tuple[float | None, Likely], ...] | None = None
    hit: int = 0


@dataclass
class Stats:
    """Counts since the engine was made; ``waiting``, ``running`` and ``free`` (slots) are of
    now.
    """

    waiting: int = 0
    running: int = 0
    free: int = 0
    steps: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    finished: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class _Run:
    """A request under way. ``rows``: its tokens whose rows are cached. ``draft``: what may follow
    its newest token.
    """

    id: int
    request: Request
    draws: np.random.Generator
    slot: int = -1
    rows: int = 0
    hit: int = 0
    out: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    uniforms: deque[float] = field(default_factory=deque)
    told: list[tuple[float | None, Likely]] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and what was generated."""
        return (*self.request.prompt, *self.out)

    @property
    def free(self) -> int:
        """How many of the next tokens no constraint narrows."""
        return _MANY if self.request.constraint is None else self.request.constraint.free()

    def uniform(self, ahead: int) -> float:
        """The draw for the ``ahead``-th token from now: one for each token, whatever is drafted and
        rejected.
        """
        while len(self.uniforms) <= ahead:
            self.uniforms.append(self.draws.random())
        return self.uniforms[ahead]


@dataclass(eq=False)
class _Kept:
    """A prefix that can be taken up again. ``slot`` holds its compressed rows, ``snapshot`` the
    rest.
    """

    tokens: tuple[int, ...]
    slot: int
    snapshot: Snapshot


class Engine:
    """Runs requests in ``slots`` sequences of up to ``capacity`` tokens each."""

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        capacity: int,
        chunk: int = CHUNK,
        budget: int | None = None,
        queue: int | None = None,
        drafts: int = 0,
        confidence: float = 0.0,
        reuse: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``budget``: tokens in one step, decodes first (default: one chunk). ``queue``: how many
        may wait (default: any).

        ``drafts``: how many tokens a step the MTP block (one) or DSpark (as many as its block has)
        may propose. ``confidence``: DSpark's drafts end where the chance that all of them are kept
        falls below it.

        ``reuse``: take up prefixes that slots still hold (alone, or where ranks share every
        sequence). ``progress(done, of)`` is called after each chunk of a prompt.

        Raises ``CacheError`` where the capacity exceeds the model's positions, ``ValueError`` for
        numbers below 1 and for drafts without an MTP block.
        """
        for name, value in (("slots", slots), ("chunk", chunk), ("budget", budget), ("queue", queue)):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be 1 or more")
        most = model.drafts
        if drafts and not most:
            raise ValueError("this checkpoint has no MTP block and no DSpark drafter, so that nothing proposes tokens")
        if not 0 <= drafts <= most:
            raise ValueError(f"drafts = {drafts}: the drafter of this checkpoint proposes 1 to {most} tokens a step")
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence = {confidence} must be in [0, 1)")
        if confidence and model.dspark is None:
            raise ValueError(f"confidence = {confidence}: an MTP block gives none; leave it out")
        self.model, self.slots, self.capacity = model, slots, capacity
        self.chunk, self.queue, self.progress = chunk, queue, progress
        self.budget = chunk if budget is None else budget
        self.drafts = drafts
        self.reuse = reuse and model.parallel.sequences is None
        mine = model.parallel.mine(np.arange(slots))
        self.cache = Cache(model.backend, model.config, len(mine), capacity, rewindable=drafts)
        self._batch = Batch(
            model,
            self.cache,
            first=int(mine[0]) if len(mine) else 0,
            slots=slots,
            drafts=drafts,
            confidence=confidence,
        )
        self._free = list(range(slots))
        self._held: dict[int, tuple[int, ...]] = {}  # what free slots still hold
        self._kept: list[_Kept] = []  # the one taken up last is the last
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []
        self._events: list[Event] = []
        self._ids = 0
        self._stats = Stats()

    @property
    def stats(self) -> Stats:
        """Counts so far."""
        now = self._stats
        now.waiting, now.running, now.free = len(self._waiting), len(self._running), len(self._free)
        return now

    @property
    def idle(self) -> bool:
        """Whether ``step`` has nothing to do."""
        return not (self._waiting or self._running or self._events)

    def submit(self, request: Request) -> int:
        """Queue a request and give its id; nothing is computed yet.

        Raises ``CacheError`` where prompt and ``max_tokens`` do not fit, ``ValueError`` for an
        empty prompt or ids outside the vocabulary, ``BusyError`` where the queue is full.
        """
        prompt, vocab = request.prompt, self.model.config.vocab_size
        if not prompt:
            raise ValueError("a prompt needs at least one token (the tokenizer's begin-of-sentence token)")
        check_ids(np.array([prompt]), vocab)
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens = {request.max_tokens} must be 1 or more")
        if outside := [i for i in request.sampling.bias if not 0 <= i < vocab]:
            raise ValueError(f"bias: token id {outside[0]} is outside the vocabulary 0 .. {vocab - 1}")
        if len(prompt) + request.max_tokens - 1 > self.capacity:
            raise CacheError(
                f"context too long: {len(prompt)} prompt tokens and {request.max_tokens} to generate; a sequence has room for "
                f"{self.capacity} (the last token needs none); shorten the prompt or ask for fewer tokens"
            )
        if self.queue is not None and len(self._waiting) - len(self._free) >= self.queue:
            raise BusyError(f"{len(self._waiting)} requests wait, and {self.queue} may; try again later")
        self._ids += 1
        self._waiting.append(_Run(self._ids, request, np.random.default_rng(request.sampling.seed)))
        return self._ids

    def cancel(self, id: int) -> None:
        """End a request, waiting or running; its slot is free at once. One that is over or unknown
        is no error.
        """
        for run in (*self._waiting, *self._running):
            if run.id == id:
                self._end(run, "cancelled")
                return

    def step(self) -> list[Event]:
        """Admit what waits, decode a token for each running request, prefill within the budget;
        give what happened.
        """
        while self._waiting and self._free and not self._soon_shared(self._waiting[0].request):
            self._admit(self._waiting.popleft())
        fed = [(run, row) for run in [*self._running] if run.out and (row := self._row(run))]
        left = max(1, self.budget - sum(len(row.tokens) for _, row in fed))
        while True:
            reading = [run for run in self._running if not run.out]
            for run in reading:
                if left > 0 and (row := self._row(run, left)):
                    fed.append((run, row))
                    left -= len(row.tokens)
            if not fed:
                break
            fed.sort(key=lambda one: one[0].slot)
            self._forward([run for run, _ in fed], [row for _, row in fed])
            if self.progress:
                for run in (run for run, row in fed if run in reading):
                    self.progress(run.rows, len(run.request.prompt))
            fed = []
        events, self._events = self._events, []
        return events

    # rows of a step

    def _row(self, run: _Run, left: int = 0) -> Row | None:
        """What a request is fed next; one whose constraint fails ends here, and there is none."""
        try:
            return self._decode_row(run) if run.out else self._prefill_row(run, left)
        except Exception as error:  # noqa: BLE001  it goes to the one who asked
            self._end(run, "error", error=error)
            return None

    def _decode_row(self, run: _Run) -> Row:
        tokens = (run.out[-1], *run.draft)
        return Row(run.slot, tokens, self._choices(run, run.draft))

    def _choices(self, run: _Run, drafted: Sequence[int] = ()) -> list[Choice]:
        """How the next token is chosen, and those after each draft, should it be right."""
        request, counts, choices = run.request, run.counts, list[Choice]()
        for ahead in range(len(drafted) + 1):
            allowed = request.constraint.allowed() if request.constraint and run.free <= ahead else None
            choices.append(choice(request.sampling, run.uniform(ahead), counts, allowed))
            if ahead < len(drafted):
                counts = counts + Counter(drafted[ahead : ahead + 1])
        return choices

    def _prefill_row(self, run: _Run, left: int) -> Row:
        """The next tokens of a prompt: a chunk or what the budget leaves, and no further than the
        next snapshot.
        """
        prompt, start = run.request.prompt, run.rows
        end = min(start + min(self.chunk, left), len(prompt))
        if self.reuse:
            marks = (_near_end(prompt), (start // FAR + 1) * FAR)
            known = {len(k.tokens) for k in self._kept if k.tokens == prompt[: len(k.tokens)]}
            end = min((m for m in marks if start < m < end and m not in known), default=end)
        following = (*prompt[start + 1 : end + 1],)
        choices = self._choices(run) if end == len(prompt) else []
        if run.request.prompt_logprobs is not None:  # of the prompt's own tokens, each the only one allowed
            vocab, count = self.model.config.vocab_size, run.request.prompt_logprobs
            told = [Choice(GREEDY, 0.0, allowed=packed_bits([token], vocab), logprobs=count) for token in following]
            choices = told + choices
        return Row(run.slot, prompt[start:end], choices, following)

    def _forward(self, runs: list[_Run], rows: list[Row]) -> None:
        """One step. Where it fails, each row is tried alone: a request that cannot be served harms
        no other.
        """
        try:
            outcome = self._batch.forward(rows)
            chosen = [self._choose(run, row, seen) for run, row, seen in zip(runs, rows, outcome.chosen, strict=True)]
            told = [[c.token for c in line] for line in chosen]
            drafts = self._batch.drafts(
                rows, outcome, told, [self._wish(r, n) for r, n in zip(runs, told, strict=True)]
            )
        except Exception as error:
            if self.model.parallel.sequences is not None or self.model.parallel.gather_logits is not None:
                raise  # the other ranks wait in an exchange
            lost = [self._lost(run, row) for run, row in zip(runs, rows, strict=True)]
            if len(rows) == 1:
                self._end(runs[0], "error", error=error)
                return
            for run, row, again in zip(runs, rows, lost, strict=True):
                if not again:
                    self._forward([run], [row])
                while again and run in self._running and not run.out and (new := self._row(run, self.budget)):
                    self._forward([run], [new])
            return
        stands = [len(line if run.out else row.tokens) for run, row, line in zip(runs, rows, chosen, strict=True)]
        self._batch.advance(rows, outcome, stands)
        self._stats.steps += 1
        self._stats.rows += sum(len(row.tokens) for row in rows)
        for run, row, seen, line, draft in zip(runs, rows, outcome.chosen, chosen, drafts, strict=True):
            self._tell(run, row, seen)
            self._commit(run, row, line, draft)

    def _lost(self, run: _Run, row: Row) -> bool:
        """Whether a step that failed half way may have written a chunk's tokens where older ones
        were that the chunk reads: the prompt is read from its beginning then.
        """
        if not run.rows or len(row.tokens) <= 1 + self.drafts:
            return False
        self._stats.hit_tokens -= run.hit
        run.rows = run.hit = 0
        run.told.clear()
        self._forget(run.slot, 0)
        self._batch.clear(run.slot)
        return True

    def _choose(self, run: _Run, row: Row, seen: Sequence[Chosen]) -> list[Chosen]:
        """The tokens that follow: one, and one more for each draft that was right. Changes
        nothing.
        """
        request, line = run.request, list[Chosen]()
        if not run.out:
            for i, chosen in enumerate(seen):
                if chosen.token < 0:
                    raise NoNumberError(run.rows + len(row.tokens) - len(seen) + 1 + i)
            return [*seen[-1:]] if run.rows + len(row.tokens) == len(request.prompt) else line
        drafted = row.tokens[1:]
        room = request.max_tokens - len(run.out)
        for j, chosen in enumerate(seen):
            if chosen.token < 0:
                raise NoNumberError(len(request.prompt) + len(run.out) + j)
            line.append(chosen)
            right = j < len(drafted) and drafted[j] == chosen.token
            if not right or len(line) == room or chosen.token in request.stop:
                break
        return line

    def _wish(self, run: _Run, line: list[int]) -> Wish | None:
        """How the tokens after ``line`` will be chosen, as far as a drafter can follow; None where
        drafts are not wanted.
        """
        request = run.request
        room = request.max_tokens - len(run.out) - len(line) - 1
        if not request.draft or not line or line[-1] in request.stop:
            return None
        count = max(0, min(self.drafts, room, run.free - len(line) - 1))
        return Wish(request.sampling, [run.uniform(len(line) + k) for k in range(count)])

    def _tell(self, run: _Run, row: Row, seen: Sequence[Chosen]) -> None:
        """Note the log-probabilities of the prompt's tokens after those that were fed, where they
        are asked for.
        """
        if run.request.prompt_logprobs is None or run.out:
            return
        if not run.told:
            run.told.append((None, ()))
        run.told += [(chosen.logprob, chosen.likely) for chosen, _ in zip(seen, row.following, strict=False)]

    def _commit(self, run: _Run, row: Row, line: list[Chosen], draft: list[int]) -> None:
        request = run.request
        if run.out:
            self._stats.drafted += len(row.tokens) - 1
            self._stats.accepted += len(line) - 1
            run.rows += len(line)
        else:
            run.rows += len(row.tokens)
            self._keep(run)
        for chosen in line:
            if run.uniforms:
                run.uniforms.popleft()
            first = not run.out
            run.out.append(chosen.token)
            run.counts[chosen.token] += 1
            if request.constraint:
                request.constraint.accept(chosen.token)
            self._stats.generated += 1
            finish = (
                "stop" if chosen.token in request.stop else "length" if len(run.out) == request.max_tokens else None
            )
            if finish:
                self._end(run, finish, chosen=chosen, first=first)
                return
            self._events.append(self._event(run, chosen, first=first))
        room = min(request.max_tokens - len(run.out) - 1, self.capacity - run.rows - 1, run.free - 1)
        run.draft = draft[: max(0, room)] if request.draft else []

    def _event(
        self,
        run: _Run,
        chosen: Chosen | None,
        finish: str | None = None,
        error: Exception | None = None,
        *,
        first: bool,
    ) -> Event:
        told = tuple(run.told) if first and run.request.prompt_logprobs is not None else None
        return Event(run.id, chosen, finish, error, told, run.hit if first else 0)

    def _end(
        self,
        run: _Run,
        finish: str,
        *,
        error: Exception | None = None,
        chosen: Chosen | None = None,
        first: bool = False,
    ) -> None:
        if run in self._running:
            self._running.remove(run)
            self._free.append(run.slot)
            self._held[run.slot] = run.tokens[: run.rows]
        else:
            self._waiting.remove(run)
        self._stats.finished[finish] += 1
        self._events.append(self._event(run, chosen, finish, error, first=first))

    # slots and prefixes

    def _admit(self, run: _Run) -> None:
        prompt = run.request.prompt
        reuse = self.reuse and run.request.prompt_logprobs is None
        kept = max(
            (k for k in self._kept if reuse and _begins(prompt, k.tokens)), key=lambda k: len(k.tokens), default=None
        )
        whole = [s for s in self._free if reuse and _begins(prompt, self._held.get(s, ()))]
        slot = max(whole, key=lambda s: len(self._held[s]), default=None)
        if slot is not None and (kept is None or len(self._held[slot]) >= len(kept.tokens)):
            run.rows = len(self._held[slot])
            self._take(slot, run.rows)
        elif kept is not None:
            slot = kept.slot if kept.slot in self._free else self._any_free()
            run.rows = len(kept.tokens)
            self._take(slot, run.rows if slot == kept.slot else 0)
            self.cache.restore(slot, kept.snapshot, donor=kept.slot)
            self._kept.remove(kept)
            self._kept.append(kept)
        else:
            slot = self._any_free()
            self._take(slot, 0)
            self._batch.clear(slot)
        run.slot, run.hit = slot, run.rows
        self._running.append(run)
        self._stats.prompt_tokens += len(prompt)
        self._stats.hit_tokens += run.hit

    def _soon_shared(self, request: Request) -> bool:
        """Whether a prompt that is being read will leave a prefix that this one can take up: it is
        read once for all who wait for it, as the replies to one prompt do.
        """
        if not self.reuse or request.prompt_logprobs is not None:
            return False
        prompt = request.prompt
        prefixes = [k.tokens for k in self._kept] + [self._held.get(slot, ()) for slot in self._free]
        known = max((len(tokens) for tokens in prefixes if _begins(prompt, tokens)), default=0)
        for run in self._running:
            if not run.out:
                other, end = run.request.prompt, _near_end(run.request.prompt)
                marks = {end, *range((run.rows // FAR + 1) * FAR, end, FAR)}
                if any(mark > max(known, run.rows) and _begins(prompt, other[:mark]) for mark in marks):
                    return True
        return False

    def _any_free(self) -> int:
        """The free slot that holds least; where groups of ranks have slots of their own, one far
        from those in use.
        """
        used = [s for s in range(self.slots) if s not in self._free]
        if self.model.parallel.sequences is not None and used:
            return max(self._free, key=lambda s: (min(abs(s - u) for u in used), -s))
        return min(self._free, key=lambda s: (len(self._held.get(s, ())), s))

    def _take(self, slot: int, stays: int) -> None:
        """Take a free slot, of which the first ``stays`` tokens stay."""
        self._free.remove(slot)
        self._held.pop(slot, None)
        self._forget(slot, stays)

    def _forget(self, slot: int, stays: int) -> None:
        """Prefixes of more than ``stays`` tokens that lie in a slot move or are forgotten."""
        for kept in [k for k in self._kept if k.slot == slot and len(k.tokens) > stays]:
            others = {**self._held, **{run.slot: run.tokens[: run.rows] for run in self._running}}
            other = next((s for s, tokens in others.items() if tokens[: len(kept.tokens)] == kept.tokens), None)
            if other is None:
                self._kept.remove(kept)
            else:
                kept.slot = other

    def _keep(self, run: _Run) -> None:
        """Keep a prefix where a prompt stands now, near its end or far from the last one."""
        tokens = run.request.prompt[: run.rows]
        if not self.reuse or not (run.rows == _near_end(run.request.prompt) or run.rows % FAR == 0) or not run.rows:
            return
        if any(k.tokens == tokens for k in self._kept):
            return
        self._kept.append(_Kept(tokens, run.slot, self.cache.snapshot(run.slot)))
        del self._kept[: len(self._kept) - 4 * self.slots]


def _near_end(prompt: tuple[int, ...]) -> int:
    """The last point before a prompt's last token at which a prefix can be shared."""
    return (len(prompt) - 1) // SHARED * SHARED


def _begins(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    return 0 < len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens
