"""Decode steps that are recorded once and replayed with new addresses.

A step's shape changes a few times in a context's life (``Step``), so what a backend makes of one
step, a CUDA graph or a tape of calls, serves those that follow. The graph does not know:
``Backend.record`` is given a function of the step's buffer, and what it gives is called with the
buffers of later steps.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from dsv4_core.graph.model import ALONE
from dsv4_core.graph.step import Addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.model import Model
    from dsv4_core.graph.step import Step, StepShape

KEPT = 16  # recordings: two batch sizes and a context of a million tokens


class Replay:
    """Steps of one model on one cache. Not for several threads at once.

    A shape is run as it is when it is met first and recorded when it is met again, so that what
    comes once (a prompt's last chunk) is never recorded. Recordings are of the very weights and
    cache arrays that were there: where any of them is another object now, all are dropped. Of
    several ranks each runs its steps as they are: their exchanges depend on the data.
    """

    def __init__(self, model: Model, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._recorded: OrderedDict[Hashable, Callable[..., Any] | None] = OrderedDict()
        self._made_of = self._parts()

    def logits(self, step: Step) -> Array:
        """``model.logits(model.forward(step))`` [T, vocab], wide; valid until the next call.

        The cache's rows are written, its lengths are not. Raises ``ValueError`` for a step of
        another cache.
        """
        model, cache, shape = self.model, self.cache, step.shape
        if step.cache is not cache:
            raise ValueError("replay: the step is of another cache than the recordings; make a Replay for each cache")

        def logits(buffer: Array) -> Array:
            return model.logits(model.forward(Addresses(cache, shape, buffer)))

        result: Array = self.run(("logits", shape), logits, step)
        return result

    def streams(self, step: Step) -> Array:
        """``model.forward(step)`` [T, hc, D]: as ``logits``, for a step whose streams a drafter
        sees too.
        """
        model, cache, shape = self.model, self.cache, step.shape
        if step.cache is not cache:
            raise ValueError("replay: the step is of another cache than the recordings; make a Replay for each cache")

        def streams(buffer: Array) -> Array:
            return model.forward(Addresses(cache, shape, buffer))

        result: Array = self.run(("streams", shape), streams, step)
        return result

    def run(self, key: tuple[str, StepShape], function: Callable[[Array], Any], step: Step) -> Any:
        """``function`` of the step's buffer: run when ``key`` is new, recorded when it is met
        again, replayed from then on.
        """
        if self.model.parallel is not ALONE or not step.tokens:
            return function(step.buffer)
        if not _same(self._made_of, parts := self._parts()):
            self._recorded.clear()
            self._made_of = parts
        if key not in self._recorded:
            self._recorded[key] = None
            while len(self._recorded) > KEPT:
                self._recorded.popitem(last=False)
            return function(step.buffer)
        self._recorded.move_to_end(key)
        recorded = self._recorded[key]
        if recorded is None:
            recorded = self._recorded[key] = self.model.backend.record(function)
        return recorded(step.host)

    def _parts(self) -> tuple[Any, ...]:
        """All that a recording may have the addresses of."""
        m = self.model
        arrays = (a for x in self.cache.layers for a in (x.ring, x.rows, x.keys, x.state, x.key_state))
        return (m.embed, m.lm_head, m.head, m.mtp_block, m.dspark, *m.blocks, *arrays)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
