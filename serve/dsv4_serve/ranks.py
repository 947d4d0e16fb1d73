"""Serving by several ranks: the first one takes requests and tells the others, which do to their
engines what it does.

Before each step the first rank says what has come since the last: requests in the order in which
its engine took them, and cancellations. An engine decides by its calls and their order alone, so
that all make the same steps. A rank that fails ends all (``dsv4_core.ranks.watch``): the others
would wait in an exchange.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from dsv4_core.graph.engine import Request
from dsv4_core.graph.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.graph.engine import Engine
    from dsv4_core.graph.sampling import Constraint
    from dsv4_core.ranks.exchange import Ranks


class Submit(msgspec.Struct, tag=True):
    """Take a request. ``kept``: what its constraint is made of."""

    prompt: list[int]
    max_tokens: int
    sampling: dict[str, Any]
    stop: list[int]
    draft: bool
    prompt_logprobs: int | None
    kept: tuple[str | None, str, bool, int | None] | None


class Cancel(msgspec.Struct, tag=True):
    """End a request."""

    id: int


class End(msgspec.Struct, tag=True):
    """There is no more."""


Order = Submit | Cancel | End


class Lead:
    """The first rank's side. ``patience``: seconds without a request after which the others hear
    that there is none.
    """

    patience = 60.0  # well below the half hour that a collective waits

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._orders = ranks, list[Order]()

    def submitted(self, request: Request) -> None:
        """Note that the engine has taken a request."""
        kept = getattr(request.constraint, "asked", None)
        self._orders.append(
            Submit(
                list(request.prompt),
                request.max_tokens,
                asdict(request.sampling),
                sorted(request.stop),
                request.draft,
                request.prompt_logprobs,
                kept,
            )
        )

    def cancelled(self, id: int) -> None:
        """Note that the engine has given one up."""
        self._orders.append(Cancel(id))

    def end(self) -> None:
        """Let the others go."""
        self._orders.append(End())
        self.tell()

    def tell(self) -> None:
        """Say what was noted; the others make a step now."""
        self._ranks.hear(msgspec.msgpack.encode(self._orders))
        self._orders.clear()


def follow(engine: Engine, ranks: Ranks, constraint: Callable[..., Constraint | None]) -> None:
    """The other ranks' side: do what the first one does, until it ends. ``constraint``: makes what
    a reply must keep to.
    """
    decoder = msgspec.msgpack.Decoder(list[Order])
    while True:
        for order in decoder.decode(ranks.hear(b"")):
            if isinstance(order, End):
                return
            if isinstance(order, Cancel):
                engine.cancel(order.id)
                continue
            wish = order.sampling
            seed = tuple(wish["seed"]) if isinstance(wish["seed"], list) else wish["seed"]
            engine.submit(
                Request(
                    tuple(order.prompt),
                    order.max_tokens,
                    Sampling(**{**wish, "seed": seed}),
                    frozenset(order.stop),
                    constraint(*order.kept) if order.kept else None,
                    order.draft,
                    order.prompt_logprobs,
                )
            )
        engine.step()
