"""Faults planted in the engine and its cache: the laws of serving see each."""

import numpy as np
import pytest
from dsv4_conformance.laws.checks import LAWS, trial
from dsv4_conformance.laws.small_model import Stage, sibling

from dsv4_core.contract import registry
from dsv4_core.graph import engine as engine_module
from dsv4_core.graph.batch import Batch
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.engine import Engine

BY_NAME = {law.name: law for law in LAWS}


@pytest.fixture(scope="module")
def stage():
    own = registry.create("reference", numerics="native", batch_invariant=True)
    return Stage(own, sibling(own))


def stale_ring_on_a_hit(monkeypatch):
    """The ring of whoever had the slot before is left in place."""
    right = Cache.restore

    def restore(self, sequence, snapshot, *, donor):
        rings = tuple(
            self.backend.cache_read(
                x.ring,
                self._last(sequence, snapshot.length, self.config.sliding_window, self.ring_rows),
                layout=self.kv_layout,
            )
            for x in self.layers
        )
        right(self, sequence, type(snapshot)(snapshot.length, rings, snapshot.states, snapshot.key_states), donor=donor)

    monkeypatch.setattr(Cache, "restore", restore)


def open_window_forgotten(monkeypatch):
    """Of the overlapping windows of ratio 4 the older half is not taken along."""
    right = Cache.restore

    def restore(self, sequence, snapshot, *, donor):
        none = tuple(None for _ in snapshot.states)
        right(self, sequence, type(snapshot)(snapshot.length, snapshot.rings, none, none), donor=donor)

    monkeypatch.setattr(Cache, "restore", restore)


def compressed_rows_not_copied(monkeypatch):
    """The slot's own compressed rows are taken for the donor's."""
    monkeypatch.setattr(Cache, "_copy", lambda self, *_: None)


def one_row_short(monkeypatch):
    """The last compressed row is not copied."""
    right = Cache._copy
    monkeypatch.setattr(Cache, "_copy", lambda self, *a: right(self, *a[:-1], a[-1] - 1))


def another_prefix(monkeypatch):
    """Only the first 100 tokens of a prefix are compared."""
    monkeypatch.setattr(
        engine_module, "_begins", lambda prompt, tokens: 0 < len(tokens) < len(prompt) and prompt[:100] == tokens[:100]
    )


def rows_of_drafts_stay(monkeypatch):
    """What was rejected is not forgotten."""
    monkeypatch.setattr(
        Cache, "rewind", lambda self, sequence, length: None if length else Cache_rewind(self, sequence, length)
    )


Cache_rewind = Cache.rewind


def drafts_are_taken_unseen(monkeypatch):
    """A draft is accepted whatever the model says."""
    right = Engine._choose

    def choose(self, run, row, seen):
        line = right(self, run, row, seen)
        if run.out and len(row.tokens) > len(line) and len(run.out) + len(line) < run.request.max_tokens:
            line = [*line[:-1], type(line[-1])(row.tokens[len(line)]), *right(self, run, row, seen)[-1:]]
        return line[: len(row.tokens)]

    monkeypatch.setattr(Engine, "_choose", choose)


def a_draw_for_every_draft(monkeypatch):
    """Rejected drafts use draws up."""
    right = Engine._commit

    def commit(self, run, row, line, draft):
        for _ in range(len(row.tokens) - len(line) if run.out else 0):
            run.uniform(0)
            run.uniforms.popleft()
        right(self, run, row, line, draft)

    monkeypatch.setattr(Engine, "_commit", commit)


def seed_by_slot(monkeypatch):
    """Draws depend on the slot."""
    right = Engine._admit

    def admit(self, run):
        right(self, run)
        run.draws = np.random.default_rng((0, run.slot))

    monkeypatch.setattr(Engine, "_admit", admit)


def slot_not_cleared(monkeypatch):
    """A slot that is taken anew goes on where the last request ended."""
    monkeypatch.setattr(Batch, "clear", lambda self, slot: None)


def slot_lost(monkeypatch):
    """A request that is cancelled keeps its slot."""
    right = Engine._end

    def end(self, run, finish, **more):
        right(self, run, finish, **more)
        if finish == "cancelled" and run.slot in self._free:
            self._free.remove(run.slot)

    monkeypatch.setattr(Engine, "_end", end)


def penalties_of_the_company(monkeypatch):
    """All requests share one count of what was generated."""
    from collections import Counter

    shared = Counter()
    right = Engine._admit

    def admit(self, run):
        right(self, run)
        run.counts = shared

    monkeypatch.setattr(Engine, "_admit", admit)


def mask_for_the_next_one(monkeypatch):
    """The constraint is not asked."""
    right = engine_module.choice
    monkeypatch.setattr(engine_module, "choice", lambda wish, u, counts, allowed=None: right(wish, u, counts))


def snapshot_is_the_donor(monkeypatch):
    """A snapshot is no copy: what is restored is what the donor holds by then."""
    right = Cache.restore

    def restore(self, sequence, snapshot, *, donor):
        rings = tuple(
            self.backend.cache_read(
                x.ring,
                self._last(donor, snapshot.length, self.config.sliding_window, self.ring_rows),
                layout=self.kv_layout,
            )
            for x in self.layers
        )
        right(self, sequence, type(snapshot)(snapshot.length, rings, snapshot.states, snapshot.key_states), donor=donor)

    monkeypatch.setattr(Cache, "restore", restore)


def newest_first(monkeypatch):
    """Who came last is admitted first."""
    right = Engine._admit

    def admit(self, run):
        self._waiting.appendleft(run)
        right(self, self._waiting.pop())

    monkeypatch.setattr(Engine, "_admit", admit)


def decodes_wait_for_prompts(monkeypatch):
    """While a prompt is read nobody gets a token."""
    step = Engine.step

    def stepped(self):
        held = [run for run in self._running if run.out] if any(not run.out for run in self._running) else []
        self._running = [run for run in self._running if run not in held]
        events = step(self)
        self._running += held
        return events

    monkeypatch.setattr(Engine, "step", stepped)


FAULTS = {
    snapshot_is_the_donor: "forked_is_cold",
    seed_by_slot: "seed_decides",
    newest_first: "nobody_starves",
    decodes_wait_for_prompts: "nobody_starves",
    stale_ring_on_a_hit: "taken_up_is_cold",
    open_window_forgotten: "taken_up_is_cold",
    compressed_rows_not_copied: "taken_up_is_cold",
    one_row_short: "taken_up_is_cold",
    another_prefix: "in_company",
    rows_of_drafts_stay: "drafts_do_not_show",
    drafts_are_taken_unseen: "drafts_do_not_show",
    a_draw_for_every_draft: "drafts_do_not_show",
    slot_not_cleared: "in_company",
    slot_lost: "in_company",
    penalties_of_the_company: "in_company",
    mask_for_the_next_one: "mask_holds",
}


@pytest.mark.parametrize("name", sorted(set(FAULTS.values()) | {"refusals_change_nothing"}))
def test_the_engine_keeps_the_laws(stage, name):
    assert trial(BY_NAME[name], stage, BY_NAME[name].always[0]) is None


@pytest.mark.proof
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_is_seen(stage, fault, monkeypatch):
    fault(monkeypatch)
    law = BY_NAME[FAULTS[fault]]
    assert trial(law, stage, law.always[0]) is not None
