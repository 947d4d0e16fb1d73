"""The shadowed run: the backend's own model through everything that a server does, and every op
call in it judged.

A call is judged on the operands that it had, as an op case is, so that no noise of the layers
before drowns its error. What a call changed that it must not, and what a later call did to a result
that was still in use, is found too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dsv4_conformance.check import Check, Finding, Group, Session
from dsv4_conformance.exchange import replay
from dsv4_conformance.laws.small_model import new_cache, some_ids, weights
from dsv4_conformance.model.record import Recorder, TracedModel
from dsv4_core.graph.dspark import block_step
from dsv4_core.graph.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dsv4_conformance.model.record import Recorded
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array, Numerics, Tier
    from dsv4_core.graph.cache import Cache

RATIOS = (0, 4, 128)  # one layer of each kind, the first routed by hash
FIRST = 4  # samples of a budget before a second opinion is asked: most calls need no more
SHOWN = 3  # of what is wrong, in a message


@dataclass
class Watcher(Recorder):
    """A recorder that also looks at what must stay as it is: operands that the contract does not
    mutate, and results of this step.
    """

    problems: list[str] = field(default_factory=list)
    _returned: list[tuple[str, Array, Host]] = field(default_factory=list)

    def finished(self, recorded: Recorded, operands: Sequence[Any], returned: Sequence[Any]) -> None:
        """Compare operands with what they were before the call; remember results."""
        spec = recorded.call.spec
        for name, was, now in zip(spec.arrays, recorded.call.operands, operands, strict=True):
            if name not in spec.mutates and isinstance(was, np.ndarray) and not same(was, self.host(now)):
                self.problems.append(
                    f"{recorded.name} modified its operand {name!r}; the contract does not say that it may"
                )
        for i, array in enumerate(() if spec.mutates else returned):
            self._returned.append((f"{recorded.name}, result {i}", array, recorded.results[i]))

    def end_step(self) -> None:
        """Compare the step's results with what they were when they were returned."""
        for name, array, host in self._returned:
            if not same(host, self.host(array)):
                self.problems.append(
                    f"{name} was overwritten by a later call of the same step; a result is its caller's"
                )
        self._returned.clear()


def same(a: Host, b: Host) -> bool:
    """Equal in every bit."""
    return a.shape == b.shape and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


class Run:
    """A model under a watcher, and its caches. Made where the watcher already listens, so that it
    sees weights being loaded.
    """

    def __init__(self, watcher: Watcher, shared: dict[str, Any], *, dspark: bool = False) -> None:
        key = "shadowed dspark" if dspark else "shadowed"
        if key not in shared:
            shared[key] = TracedModel(weights(RATIOS, dspark=dspark), watcher), watcher.known
        self.watcher = watcher
        self.model, watcher.known = cast("tuple[TracedModel, dict[int, Any]]", shared[key])
        self.model.recorder = watcher

    def cache(self, sequences: int, capacity: int = 200) -> Cache:
        """A cache of this model."""
        return new_cache(self.model, sequences, capacity)

    def feed(self, cache: Cache, ids: Host, counts: Sequence[int] | None = None, *, drafts: bool = False) -> None:
        """One step, and the MTP block on it where ``drafts``."""
        w, step = self.watcher, Step(cache, ids, counts=counts)
        starts = sorted({int(s) for s in step.starts})
        w.time = (
            "prefill" if starts == [0] else f"at{starts[0]}" if len(starts) == 1 else f"at{starts[0]}to{starts[-1]}"
        )
        w.positions = step.host_positions.reshape(-1)
        h = self.model.forward(step)
        self.model.logits(h)
        if drafts:
            w.time += "mtp"
            following = np.roll(ids, -1, axis=1).reshape(-1).astype(np.int32)
            m = self.model.mtp(h, self.model.backend.from_numpy(following), step)
            w.place = "head"
            self.model.logits(m, mtp=True)
        cache.advance(step.sequences, step.ends)
        w.end_step()


def prefill(run: Run) -> None:
    """A prompt that fills a window of 128, in one."""
    run.feed(run.cache(1), some_ids((1, 131), 0))


def chunks(run: Run) -> None:
    """A prompt in chunks of every size, across windows of 4 and 128."""
    cache, ids, at = run.cache(1), some_ids((1, 140), 1), 0
    for n in (1, 3, 33, 64, 29, 8):
        run.feed(cache, ids[:, at : at + n])
        at += n


def batch(run: Run, lengths: Sequence[int], seed: int) -> None:
    """A ragged, padded batch, then two decode steps of all of it."""
    cache, ids = run.cache(len(lengths)), some_ids((len(lengths), max(lengths) + 3), seed)
    run.feed(cache, ids[:, : max(lengths) + 1], counts=lengths)
    for i in range(2):
        run.feed(cache, ids[:, max(lengths) + 1 + i :][:, :1])


def batch_of_3(run: Run) -> None:
    """Three sequences; one is a single token, one closes a window in the first decode step."""
    batch(run, (35, 1, 15), 2)


def batch_of_8(run: Run) -> None:
    """Eight sequences, of which one is empty."""
    batch(run, (3, 0, 19, 4, 16, 20, 7, 1), 3)


def decode(run: Run) -> None:
    """Token after token across the ends of windows of 4 and 128."""
    cache, ids = run.cache(1), some_ids((1, 131), 4)
    run.feed(cache, ids[:, :125])
    for i in range(125, 130):
        run.feed(cache, ids[:, i : i + 1])


def rewind(run: Run) -> None:
    """Tokens that are taken back, twice, and others in their place."""
    cache, ids = run.cache(1), some_ids((1, 140), 5)
    run.feed(cache, ids[:, :126])
    for turn in range(2):
        run.feed(cache, some_ids((1, 5), 6 + turn))
        cache.rewind(0, 126)
    run.feed(cache, ids[:, 126:128])
    run.feed(cache, ids[:, 128:129])


def drafts(run: Run) -> None:
    """The MTP block after a prompt, in steps of one and of two, and after a draft that was
    wrong.
    """
    cache, ids = run.cache(1), some_ids((1, 60), 8)
    run.feed(cache, ids[:, :37], drafts=True)
    run.feed(cache, ids[:, 37:38], drafts=True)
    run.feed(cache, ids[:, 38:40], drafts=True)
    cache.rewind(0, 39)
    run.feed(cache, ids[:, 39:41], drafts=True)


def dspark(run: Run) -> None:
    """DSpark of two sequences after a prompt, in steps of one token and of three, of which one and
    two are taken back: context rows, blocks, table, confidence.
    """
    drafter, be = run.model.dspark, run.model.backend
    assert drafter is not None
    cache, ids, w = run.cache(2), some_ids((2, 40), 9), run.watcher
    for columns in (slice(0, 21), slice(21, 22), slice(22, 25), slice(25, 28)):
        step, taps = Step(cache, ids[:, columns]), list[Any]()
        w.time = "prefill" if columns.start == 0 else f"at{columns.start}"
        w.positions = step.host_positions.reshape(-1)
        run.model.forward(step, taps)
        w.place = "drafter"
        drafter.remember(taps, step)
        cache.advance(step.sequences, step.ends)
        block = np.full((2, run.model.config.dspark_block_size), run.model.config.dspark_noise_token_id)
        block[:, 0] = ids[:, columns.stop]
        g, _ = drafter.block(block_step(cache, block, np.arange(2), cache.lengths[:2]))
        w.place = "drafter"
        drafter.after(be.from_numpy(ids[:, columns.stop].astype(np.int32)), g[: len(ids)])
        w.end_step()
        if columns.stop == 25:
            cache.rewind(0, 24)
            cache.rewind(1, 23)


SCENES: tuple[Callable[[Run], None], ...] = (
    prefill,
    chunks,
    batch_of_3,
    batch_of_8,
    decode,
    rewind,
    drafts,
    dspark,
)


@dataclass(frozen=True)
class Shadowed:
    """One scene, every op call of it judged."""

    scene: Callable[[Run], None]
    tier: Tier = "standard"
    group: Group = "model"

    @property
    def id(self) -> str:
        """``model/shadowed/SCENE``."""
        return f"model/shadowed/{self.scene.__name__}"

    @property
    def op(self) -> str:
        """One name for all of them."""
        return "shadowed"

    @property
    def level(self) -> int:
        """2, or 3 for what drafts."""
        return 3 if self.scene in {drafts, dspark} else 2

    def run(self, session: Session) -> Finding:
        """Play the scene under a watcher; judge."""
        from dsv4_conformance.check import describe

        watcher, ended = Watcher(session.backend), ""
        try:
            with watcher:
                self.scene(Run(watcher, session.shared, dspark=self.scene is dspark))
        except Exception as error:  # noqa: BLE001  whatever the backend raises is its result
            ended = f"op {watcher.under_way}, {watcher.place}, {watcher.time}: {describe(error)}"
        finding = Finding(self.id, self.op, self.group, self.level, "passed", dtypes=session.numerics)
        return judged(finding, watcher, watcher.problems, session, ended)


def judged(finding: Finding, calls: Recorder, more: Sequence[str], session: Session, ended: str) -> Finding:
    """The finding with what is wrong of recorded calls, the first first, then ``more``."""
    problems, wrong = [ended] if ended else [], 0
    for recorded in calls.calls:
        if recorded.parts and not type(session.backend).implements(recorded.call.op):
            continue  # the contract's own composition, whose parts are judged
        verdict = replay.judge_recorded(recorded.call, recorded.results, session, FIRST)
        if not verdict.ok:
            wrong += 1
            if len(problems) < SHOWN:
                problems.append(f"{recorded.name}: {'; '.join(verdict.problems)}")
        if verdict.used >= finding.used:
            finding.used = verdict.used
            finding.worst = {"call": recorded.name, **verdict.worst}
    problems += more[:SHOWN]
    finding.metrics = {"calls": float(len(calls.calls)), "over budget": float(wrong)}
    if problems:
        finding.status, finding.used = "failed", float("inf")
        finding.message = f"{wrong} of {len(calls.calls)} calls over budget; " + "; ".join(problems)
    return finding


def checks(numerics: Numerics) -> list[Check]:
    """Every scene."""
    del numerics
    return [Shadowed(scene) for scene in SCENES]
