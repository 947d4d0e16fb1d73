"""The engine's events to a protocol's chunks: of one reply, and of the several that ``n`` asks
for.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import deepseek_recipe as recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dsv4_core.graph.engine import Event


class Chunks:
    """One reply under way. ``response``: the library's, which adds chunks up."""

    def __init__(self, processor: Any, response: Any, prompt_tokens: int, ends: frozenset[int]) -> None:
        self._processor, self.response = processor, response
        self._prompt_tokens, self._ends, self._begun = prompt_tokens, ends, False

    @property
    def finished(self) -> bool:
        """Whether the reply is complete, e.g. by a stop string, whatever the engine would add."""
        return bool(self._processor.finished)

    def push(self, event: Event) -> Iterator[Any]:
        """The protocol's chunks of one event."""
        if not self._begun:
            self._begun = True
            usage = recipe.PromptUsage(prompt_tokens=self._prompt_tokens, prompt_cache_hit_tokens=event.hit)
            yield from self._processor.push(recipe.InferenceChunk.ready(prompt_usage=usage, system_fingerprint="dsv4"))
        chosen = event.chosen
        if chosen is not None and chosen.token not in self._ends and not self.finished:
            told = None if chosen.logprob is None else [(chosen.logprob, list(chosen.likely))]
            yield from self._processor.push(recipe.InferenceChunk.tokens([chosen.token], told))
        if event.finish and not self.finished:
            why = recipe.InferenceFinishReason
            yield from self._processor.push(
                recipe.InferenceChunk.finish(why.Length if event.finish == "length" else why.Stop)
            )
            if not self.finished:
                yield from self._processor.finish()

    def close(self) -> None:
        """Give up the parser."""
        self._processor.close()


class Choices:
    """The replies to one request: streamed, or whole in the end."""

    def __init__(self, replies: Sequence[Chunks]) -> None:
        self._replies, self._usages = replies, list[Any]()

    @property
    def finished(self) -> bool:
        """Whether all are complete."""
        return all(reply.finished for reply in self._replies)

    def is_finished(self, which: int) -> bool:
        """Whether one is complete."""
        return self._replies[which].finished

    def add(self, which: int, event: Event) -> None:
        """Take an event of one reply; ``whole`` gives what came of all."""
        reply = self._replies[which]
        for chunk in reply.push(event):
            reply.response.accumulate(chunk)

    def stream(self, which: int, event: Event) -> Iterator[str]:
        """The server-sent events that follow from an event of one reply. Usage comes once, for
        all.
        """
        kind = type(self._replies[which].response)
        for chunk in self._replies[which].push(event):
            name, text = kind.sse_event_name(chunk), chunk.to_json()
            if len(self._replies) > 1:
                told = json.loads(text)
                if told.get("usage"):
                    self._usages.append(told.pop("usage"))
                    if len(self._usages) == len(self._replies):
                        told["usage"] = _added(self._usages)
                    elif not told["choices"]:
                        continue
                told["choices"] = [{**one, "index": which} for one in told["choices"]]
                text = json.dumps(told, ensure_ascii=False)
            yield (f"event: {name}\n" if name else "") + f"data: {text}\n\n"

    def done(self) -> str:
        """What ends the stream."""
        data = type(self._replies[0].response).sse_done_data()
        return f"data: {data}\n\n" if data else ""

    def whole(self) -> str:
        """The response as JSON."""
        if len(self._replies) == 1:
            return str(self._replies[0].response.to_json())
        told = [json.loads(reply.response.to_json()) for reply in self._replies]
        choices = [{**choice, "index": i} for i, one in enumerate(told) for choice in one["choices"]]
        usage = _added([one["usage"] for one in told])
        return json.dumps({**told[0], "choices": choices, "usage": usage}, ensure_ascii=False)

    def close(self) -> None:
        """Give up the parsers."""
        for reply in self._replies:
            reply.close()


def _added(usages: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Usage of several replies to one prompt: it counts once, what was generated is added up."""
    first, *others = usages
    total = dict(first)
    for other in others:
        total["completion_tokens"] += other["completion_tokens"]
        if details := other.get("completion_tokens_details"):
            counts = Counter(total["completion_tokens_details"])
            counts.update(details)
            total["completion_tokens_details"] = dict(counts)
    total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
    return total
