"""The shadowed run of recorded steps: what every op call of a replayed decode step was given and
gave, judged.

A backend that repeats a step (``Backend.record``) calls no op then, so nobody can stand between it
and its ops. A recorded function may give a tuple of arrays, though: here it gives, beside the
logits, every operand and every result of the step's calls. Of a replay these are what the replayed
calls had and made, and each call is judged on them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from dsv4_conformance.check import Check, Finding, Group, Session, describe
from dsv4_conformance.laws.small_model import new_cache, some_ids, weights
from dsv4_conformance.model.record import Recorder, TracedModel
from dsv4_conformance.model.shadowed import RATIOS, judged
from dsv4_core.contract.spec import OPS
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Addresses, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array, Numerics, Tier
    from dsv4_core.graph.cache import Cache

BUCKET = 128  # extents are rounded up to it at least, so that shapes come back on any backend
STEPS = 5  # run, recorded, replayed, replayed after a rewind, replayed for other tokens


@dataclass(frozen=True)
class Noted:
    """A call within a recorded function: where its arrays are in the tuple that the function gives,
    and what its other operands are.
    """

    op: str
    place: str
    operands: tuple[Any, ...]
    scalars: dict[str, Any]
    results: tuple[int, ...]
    parts: int


@dataclass(frozen=True)
class Given:
    """An array of the step: its place in the tuple."""

    at: int


@dataclass(frozen=True)
class Kept:
    """An array of the cache: its place among them."""

    at: int


@dataclass
class Collector(Recorder):
    """Notes the calls of a function that is being recorded, and keeps their arrays; nothing is read
    on the host.
    """

    noted: list[Noted] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)
    cache: list[Array] = field(default_factory=list)
    collecting: bool = False

    def _recording(self, op: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def recording(*operands: Any, **scalars: Any) -> Any:
            self.under_way = op
            if not self.collecting:
                return method(*operands, **scalars)
            before, place = tuple(self.where(o) for o in operands), self.place
            earlier = len(self.noted)
            returned = method(*operands, **scalars)
            results = returned if isinstance(returned, tuple) else (returned,)
            at = tuple(self.put(array).at for array in results)
            self.noted.append(Noted(op, place, before, scalars, at, len(self.noted) - earlier))
            return returned

        return recording

    def put(self, array: Array) -> Given:
        """Keep an array of the step."""
        self.arrays.append(array)
        return Given(len(self.arrays) - 1)

    def where(self, operand: Any) -> Any:
        """Say what an operand is: none, a weight, an array of the cache or of the step."""
        if operand is None or id(operand) in self.known:
            return None if operand is None else self.known[id(operand)][1]
        if isinstance(operand, (list, tuple)):
            return [self.where(part) for part in operand]
        for i, array in enumerate(self.cache):
            if array is operand:
                return Kept(i)
        return self.put(operand)


def arrays_of(cache: Cache) -> list[Array]:
    """The arrays of a cache."""
    every = (a for x in cache.layers for a in (x.ring, x.rows, x.keys, x.state, x.key_state))
    return [a for a in every if a is not None]


class Shadow:
    """A model whose decode steps are replayed, and the calls of each replay as if they had been
    recorded one by one.
    """

    def __init__(self, collector: Collector, sequences: int) -> None:
        self.collector = collector
        self.model = TracedModel(weights(RATIOS), collector)
        self.cache = new_cache(self.model, sequences, 160)
        self.replay = Replay(self.model, self.cache)

    def prefill(self, ids: Host) -> None:
        """A prompt, unwatched."""
        step = Step(self.cache, ids)
        self.model.logits(self.model.forward(step))
        self.cache.advance(step.sequences, step.ends)

    def step(self, ids: Host, time: str) -> None:
        """One decode step by ``Replay``, whose calls are added to the collector's."""
        c, step = self.collector, Step(self.cache, ids)
        shape = step.shape
        kept = [c.host(array) for array in arrays_of(self.cache)]

        def function(buffer: Array) -> tuple[Array, ...]:
            c.noted, c.arrays, c.cache, c.collecting = [], [], arrays_of(self.cache), True
            try:
                logits = self.model.logits(self.model.forward(Addresses(self.cache, shape, buffer)))
            finally:
                c.collecting = False
            return (logits, *c.arrays)

        given = self.replay.run(("shadowed", shape), function, step)[1:]
        hosts = [c.host(array) for array in given]
        self.cache.advance(step.sequences, step.ends)
        c.time, c.positions = time, step.host_positions.reshape(-1)
        for noted in c.noted:
            c.place = noted.place
            operands = [found(o, hosts, kept) for o in noted.operands]
            results = [hosts[i] for i in noted.results]
            for name, operand in zip(OPS[noted.op].arrays, noted.operands, strict=True):
                if name in OPS[noted.op].mutates and isinstance(operand, Kept):
                    kept[operand.at] = results[0]  # what later calls of the step read
            c.add(noted.op, operands, noted.scalars, results, noted.parts)


def found(operand: Any, hosts: list[Host], kept: list[Host]) -> Any:
    """An operand on the host: of the step, of the cache as the call found it, or a weight."""
    if isinstance(operand, list):
        return [found(part, hosts, kept) for part in operand]
    if isinstance(operand, Given):
        return hosts[operand.at]
    return kept[operand.at] if isinstance(operand, Kept) else operand


@dataclass(frozen=True)
class Replayed:
    """Decode steps of two sequences that are recorded and replayed; every op call is judged."""

    id: str = "model/shadowed/replay"
    op: str = "shadowed"
    tier: Tier = "standard"
    group: Group = "model"
    level: int = 3

    def run(self, session: Session) -> Finding:
        """Run a step, record it, replay it with other addresses; judge the calls of all."""
        collector, ended = Collector(session.backend), ""
        up = session.backend.round_up
        ids, tokens = some_ids((2, 126), 10), some_ids((STEPS, 2, 1), 11)
        try:
            with collector, patch.object(session.backend, "round_up", lambda n: up(max(n, BUCKET))):
                shadow = Shadow(collector, 2)
                shadow.prefill(ids)
                for i in range(STEPS):
                    if i == STEPS - 2:
                        shadow.cache.rewind(0, 127)
                    shadow.step(tokens[i], f"step{i + 1}")
        except Exception as error:  # noqa: BLE001  whatever the backend raises is its result
            ended = f"op {collector.under_way}, {collector.place}, {collector.time}: {describe(error)}"
        finding = Finding(self.id, self.op, self.group, self.level, "passed", dtypes=session.numerics)
        return judged(finding, collector, (), session, ended)


def checks(numerics: Numerics) -> list[Check]:
    """The one."""
    del numerics
    return [Replayed()]
