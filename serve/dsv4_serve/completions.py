"""``/v1/completions``: text or ids to continue, with echo and log-probabilities. Control tokens
spelt in a text are words.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsv4_core.graph.engine import Request
from dsv4_core.graph.sampling import Sampling
from dsv4_core.text.markers import Piece
from dsv4_core.text.tokenizer import PieceStream
from dsv4_serve.forms import BODIES
from dsv4_serve.refusal import RefusedError
from dsv4_serve.schema import check
from dsv4_serve.wishes import wishes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.graph.engine import Event
    from dsv4_serve.served import Served

Ids = tuple[int, ...]


def asked(body: dict[str, Any], served: Served) -> list[Completion]:
    """Read a request's body: ``n`` completions a prompt; raise ``RefusedError`` for what is wrong
    or not supported.
    """
    check(body, BODIES["completions"])
    served.check_model(body["model"])
    body = {name: value for name, value in body.items() if value is not None}
    echo, logprobs = body.get("echo", False), body.get("logprobs")
    asked_tokens = body.get("max_tokens", 16)
    if asked_tokens == 0 and not echo:
        raise RefusedError("max_tokens = 0 generates nothing; it needs echo", param="max_tokens")
    if "stream_options" in body and not body.get("stream"):
        raise RefusedError("stream_options needs stream = true", param="stream_options")
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    n, seed = body.get("n", 1), body.get("seed")
    seed = served.draw_seed() if seed is None else seed
    sampling = Sampling(seed=seed, logprobs=logprobs, **wishes(body, served))
    ends = frozenset() if body.get("ignore_eos") else served.ends
    result = []
    for ids in _prompts(body["prompt"], served):
        room = served.engine.capacity - len(ids) + 1
        if len(ids) > served.engine.capacity or max(1, asked_tokens) > room:
            raise RefusedError(
                f"the context holds {served.engine.capacity} tokens; {len(ids)} in the prompt and {asked_tokens} to generate are more",
                param="max_tokens",
            )
        for i in range(n):
            own = replace(sampling, seed=(seed, i)) if i else sampling
            request = Request(ids, max(1, asked_tokens), own, ends, prompt_logprobs=logprobs if echo else None)
            result.append(Completion(request, served, stop, echo=echo, generate=asked_tokens != 0, first=not i))
    return result


def _prompts(prompt: Any, served: Served) -> list[Ids]:
    """One prompt or several, of text or ids."""
    if isinstance(prompt, str):
        prompt = [prompt]
    most = max(4096, served.engine.capacity)
    if isinstance(prompt, list) and len(prompt) > most:
        raise RefusedError(
            f"prompt: {len(prompt)} of them; the context holds {served.engine.capacity} tokens, and a request 4096 prompts",
            param="prompt",
        )
    if not isinstance(prompt, list) or not prompt or (len(prompt) > 4096 and not _is_ids(prompt)):
        raise RefusedError(
            "prompt must be a text, a list of texts, a list of ids or a list of such lists", param="prompt"
        )
    if _is_ids(prompt):
        prompt = [prompt]
    found: list[Ids] = []
    for one in prompt:
        if isinstance(one, str):
            served.check_length([Piece(one)])
            try:
                ids = tuple(served.vocabulary.words(one))
            except ValueError as error:
                raise RefusedError(f"prompt: {error}", param="prompt") from None
        elif _is_ids(one):
            ids = tuple(one)
        else:
            raise RefusedError(
                "prompt must be a text, a list of texts, a list of ids or a list of such lists", param="prompt"
            )
        vocab = served.engine.model.config.vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < vocab:
            raise RefusedError(f"prompt: it needs a token at least, and ids in 0 .. {vocab - 1}", param="prompt")
        found.append(ids)
    return found


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    )


class Completion:
    """One prompt's completion under way: events in, text and log-probabilities out."""

    def __init__(
        self, request: Request, served: Served, stop: Sequence[str], *, echo: bool, generate: bool, first: bool = True
    ) -> None:
        """``first``: of the replies to one prompt, the one with which the prompt's tokens are
        counted.
        """
        self.first = first
        self.request, self._served, self._stop = request, served, stop
        self._echo, self._generate = echo, generate
        self._stream = PieceStream(served.vocabulary)
        self._held = ""
        self._length = 0
        self.text = ""
        self.finish: str | None = None
        self.generated = 0
        self.logprobs: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def push(self, event: Event) -> str:
        """Take an event; give the text that is certain now. ``finish`` is set when the completion
        is over.
        """
        new = ""
        if event.chosen and self.generated == 0 and self._echo:
            for i, token in enumerate(self.request.prompt):
                logprob, likely = event.prompt[i] if event.prompt else (None, ())
                self._note(token, logprob, likely)
            new += self._served.vocabulary.text(self.request.prompt)
        if event.chosen and self._generate:
            self.generated += 1
            token = event.chosen.token
            if token not in self.request.stop:
                self._note(token, event.chosen.logprob, event.chosen.likely)
                self._held += "".join(piece.text for piece in self._stream.push(token))
        if event.finish:
            self.finish = event.finish if self._generate else "length"
            self._held += "".join(piece.text for piece in self._stream.finish())
        cut = min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        if cut is not None:
            self.finish, self._held = "stop", self._held[:cut]
        kept = (
            0
            if self.finish
            else max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        )
        new += self._held[: len(self._held) - kept]
        self._held = self._held[len(self._held) - kept :]
        self.text += new
        return new

    def _note(self, token: int, logprob: float | None, likely: tuple[tuple[int, float], ...]) -> None:
        if self.request.sampling.logprobs is None:
            return
        name = self._served.vocabulary.text
        text = name([token])
        told = {**{name([t]): p for t, p in reversed(likely)}, **({} if logprob is None else {text: logprob})}
        self.logprobs["tokens"].append(text)
        self.logprobs["token_logprobs"].append(logprob)
        self.logprobs["top_logprobs"].append(told if logprob is not None else None)
        self.logprobs["text_offset"].append(self._length)
        self._length += len(text)

    def choice(self, index: int, text: str, *, since: int = 0) -> dict[str, Any]:
        """The protocol's choice; log-probabilities from token ``since`` on."""
        told = {key: values[since:] for key, values in self.logprobs.items()}
        return {
            "index": index,
            "text": text,
            "finish_reason": self.finish,
            "logprobs": told if self.request.sampling.logprobs is not None else None,
        }
