"""What a request gives: its events as they come, and what they add up to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, cast

from dsv4_core.graph.engine import Engine, Request
from dsv4_core.graph.generate import Drafts
from dsv4_core.text.stopping import StopTexts
from dsv4_core.text.tokenizer import PieceStream, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer
    from typing_extensions import Self

    from dsv4_core.graph.model import Model
    from dsv4_core.graph.sampling import Sampling

Finish = Literal["stop", "length"]
"""Why a sequence ended: a stop token or text, or as many tokens as were asked for."""


@dataclass(frozen=True)
class Event:
    """One new token of one sequence.

    ``sequence``: which prompt, counted from 0. ``text``: what has become certain with this token;
    it may be empty, where a character is not whole yet or a stop text may have begun, and always is
    without a tokenizer. Of control tokens there is no text. ``finish``: set on the last event of a
    sequence.
    """

    sequence: int
    token: int
    text: str
    finish: Finish | None = None


@dataclass
class _Written:
    """What has come of one sequence."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None


class Generation(Iterator[Event]):
    """The events of a request, as they come; what has come is kept.

    ``prompts``: the ids that were read. ``tokens``, ``texts``, ``finish``: of each sequence, so
    far. ``prefill_seconds``: until the first token; ``decode_seconds``: from there. ``drafts``: how
    speculation fared.

    ``load`` gives the model with the weights that the request needs, when the first event is taken.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        tokenizer: Tokenizer | None,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        ends: set[int],
        *,
        drafting: tuple[int, float],
        chunk: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.prompts, self.max_tokens, self.drafts = prompts, max_tokens, Drafts()
        self.prefill_seconds = self.decode_seconds = 0.0
        self._load, self._sampling, self._ends, self._chunk = load, sampling, ends, chunk
        self._progress = progress
        self._written = [_Written() for _ in prompts]
        vocabulary = Vocabulary(tokenizer) if tokenizer else None
        self._streams = [PieceStream(vocabulary) if vocabulary else None for _ in prompts]
        self._stops = [StopTexts(stop) for _ in prompts]
        self._events = self._timed(*drafting)

    @property
    def tokens(self) -> list[list[int]]:
        """New ids of each sequence, the stop token included."""
        return [written.tokens for written in self._written]

    @property
    def texts(self) -> list[str]:
        """New text of each sequence, without a stop text."""
        return [written.text for written in self._written]

    @property
    def finish(self) -> list[Finish | None]:
        """Why each sequence ended; None while it has not."""
        return [written.finish for written in self._written]

    def __next__(self) -> Event:
        """Give the next event."""
        return next(self._events)

    def run(self) -> Self:
        """Take all events; give this, with its texts."""
        for _ in self:
            pass
        return self

    def summary(self) -> str:
        """Counts and times in one line for people."""
        prompt, new = sum(map(len, self.prompts)), sum(map(len, self.tokens))
        many = f"{len(self.prompts)} sequences: " if len(self.prompts) > 1 else ""
        line = f"{many}{prompt} prompt tokens in {self.prefill_seconds:.2f} s"
        steps = max(map(len, self.tokens))
        if steps > 1:
            per = 1000 * self.decode_seconds / (new - 1 if len(self.prompts) == 1 else steps - 1)
            line += f", {new} generated, {per:.0f} ms per {'step' if many else 'token'} after the first"
        if self.drafts.proposed:
            rate = self.drafts.tokens / self.drafts.steps
            line += f"; {self.drafts.accepted} of {self.drafts.proposed} drafts accepted, {rate:.2f} tokens a step"
        return line

    def _timed(self, count: int, confidence: float) -> Iterator[Event]:
        model = self._load()  # which is no part of the times
        began = first = time.perf_counter()
        for event in self._stepped(model, count, confidence):
            if not self.prefill_seconds:
                first = time.perf_counter()
                self.prefill_seconds = first - began
            self.decode_seconds = time.perf_counter() - first
            yield event

    def _stepped(self, model: Model, count: int, confidence: float) -> Iterator[Event]:
        """Run all sequences in one engine, in which they all begin in the first step."""
        lengths = [len(prompt) for prompt in self.prompts]
        most = model.config.max_position_embeddings
        engine = Engine(
            model,
            slots=len(lengths),
            capacity=min(max(lengths) + self.max_tokens + (count > 0), most),
            chunk=self._chunk,
            budget=sum(lengths) + len(lengths),
            drafts=count,
            confidence=confidence,
            reuse=False,
            progress=self._progress,
        )
        numbers: dict[int, int] = {}
        for sequence, prompt in enumerate(self.prompts):
            own = replace(self._sampling, seed=(cast("int", self._sampling.seed), sequence))
            numbers[engine.submit(Request(tuple(prompt), self.max_tokens, own, frozenset(self._ends)))] = sequence
        while not engine.idle:
            for event in engine.step():
                if event.error:
                    raise event.error
                sequence = numbers[event.id]
                if event.chosen is None or self._written[sequence].finish:
                    continue  # of a sequence that a stop text has ended
                yield self._event(sequence, event.chosen.token, cast("Finish | None", event.finish))
                if self._stops[sequence].found:
                    engine.cancel(event.id)
            seen = engine.stats
            self.drafts = Drafts(seen.drafted, seen.accepted, seen.generated, seen.generated - seen.accepted)

    def _event(self, sequence: int, token: int, finish: Finish | None) -> Event:
        """Note a token: its text, and whether it is the sequence's last."""
        written, stops, stream = self._written[sequence], self._stops[sequence], self._streams[sequence]
        written.tokens.append(token)
        pieces = [*stream.push(token), *(stream.finish() if finish else ())] if stream else []
        text = stops.push("".join(piece.text for piece in pieces if not piece.control))
        written.finish = "stop" if stops.found else finish
        if written.finish:
            text += stops.finish()
        written.text += text
        return Event(sequence, token, text, written.finish)
