"""Replayed decode steps: what is recorded, what a backend that replays wrongly would be caught by,
and what is never stale.
"""

import dataclasses

import numpy as np
import pytest
from dsv4_conformance.check import Session
from dsv4_conformance.laws import checks as laws
from dsv4_conformance.laws.small_model import feed, new_cache, some_ids, weights
from dsv4_conformance.run import runner

from dsv4_core.contract import registry
from dsv4_core.graph.generate import generate, speculate
from dsv4_core.graph.model import Model
from dsv4_core.graph.replay import KEPT, Replay
from dsv4_core.graph.step import Step

LAWS = {c.law.name: c for c in laws.checks("native")}
Reference = registry.reference()


class Capturing(Reference):
    """Replays as a device does: a function is run once on buffers of its own, then only its inputs
    change. NumPy cannot repeat what it did, so it is run again, but on the recording's own buffers
    and with the recording's own result.
    """

    recorded = 0

    def record(self, function):
        self.recorded += 1
        buffers, result = [], []

        def run(*hosts):
            if not buffers:
                buffers.extend(h.copy() for h in hosts)
            for buffer, host in zip(buffers, hosts, strict=True):
                assert (buffer.shape, buffer.dtype) == (host.shape, host.dtype)
                self.take(buffer, host)
            new = function(*buffers)
            if not result:
                result.append(new.copy())
            result[0][:] = new
            return result[0]

        return run

    def take(self, buffer, host):
        buffer[:] = host


class Stale(Capturing):
    def take(self, buffer, host):
        """Forgets to copy the addresses after the first time."""


class Half(Capturing):
    def take(self, buffer, host):
        """Copies the token ids and positions alone, as a graph would that keeps the rest as
        constants.
        """
        buffer[: 2 * 16] = host[: 2 * 16]


class First(Reference):
    def record(self, function):
        """Gives the first result again."""
        kept = []

        def run(*hosts):
            if not kept:
                kept.append(function(*hosts))
            return kept[0]

        return run


def finding(backend, law="replay_is_forward"):
    return runner.run_check(LAWS[law], Session(backend(numerics="native"), "smoke"))


@pytest.mark.parametrize("law", ["replay_is_forward", "same_bits_replayed"])
@pytest.mark.parametrize("backend", [Reference, Capturing])
def test_holds(backend, law):
    assert finding(backend, law).status == "passed", finding(backend, law).message


@pytest.mark.parametrize("backend", [Stale, Half, First])
def test_a_stale_replay_breaks_the_law(backend):
    assert finding(backend).status == "failed"


class Coarse(Capturing):
    """Few shapes."""

    def round_up(self, n):
        return max(128, n)


def stage():
    model = Model(weights((0, 4, 128)), Coarse(numerics="float32"))
    cache = new_cache(model, 2, 100)
    feed(model, cache, some_ids((2, 20), 0))
    return model, cache, Replay(model, cache)


def decode(model, cache, replay=None, sequences=(0, 1), token=3):
    step = Step(cache, np.full((len(sequences), 1), token), sequences=list(sequences))
    logits = replay.logits(step) if replay else model.logits(model.forward(step))
    return step, np.array(logits)


def test_a_shape_is_recorded_when_it_comes_back():
    model, cache, replay = stage()
    for times, recorded in ((1, 0), (2, 1), (3, 1)):
        step, _ = decode(model, cache, replay)
        cache.advance(step.sequences, step.ends)
        assert model.backend.recorded == recorded, times
    for _ in range(2):
        decode(model, cache, replay, sequences=[1])
    assert model.backend.recorded == 2, "another batch is another shape"


def test_steps_with_drafts_are_replayed_and_give_the_same_tokens():
    prompt = some_ids((20,), 3).tolist()
    found = {}
    for backend in (Reference, Coarse):
        model = Model(weights((0, 4, 128)), backend(numerics="float32"))
        found[backend] = list(speculate(model, prompt, max_tokens=24))
    plain = [
        line[0]
        for line in generate(Model(weights((0, 4, 128)), Reference(numerics="float32")), [prompt], max_tokens=24)
    ]
    assert found[Reference] == found[Coarse] == plain
    assert model.backend.recorded


def test_old_recordings_are_dropped():
    model, cache, replay = stage()
    for turn in range(2):
        for seq in range(1, KEPT + 3):
            replay.logits(Step(cache, np.zeros((1, seq), np.int64)))
        assert len(replay._recorded) == KEPT, turn
    assert model.backend.recorded == 0, "each had been forgotten when it came back"


def changed_norm(model):
    model.head = dataclasses.replace(model.head, norm=model.head.norm * model.head.norm.dtype.type(2))


def changed_layer(model):
    model.blocks[1] = dataclasses.replace(model.blocks[1], attn_norm=model.blocks[1].attn_norm * 0)


def test_other_weights_are_recorded_again():
    model, cache, replay = stage()
    for change in (changed_norm, changed_layer):
        for _ in range(3):
            _, before = decode(model, cache, replay)
        recorded = model.backend.recorded
        change(model)
        for _ in range(3):
            _, after = decode(model, cache, replay)
            assert (after == decode(model, cache)[1]).all()
        assert (after != before).any()
        assert model.backend.recorded == recorded + 1


def test_a_cache_layer_that_was_made_anew_is_recorded_again():
    model, cache, replay = stage()
    for _ in range(3):
        decode(model, cache, replay)
    cache.layers[:] = new_cache(model, 2, 100).layers
    for _ in range(3):
        assert (decode(model, cache, replay)[1] == decode(model, cache)[1]).all()
    assert model.backend.recorded == 2


def test_another_cache_is_refused():
    model, _, replay = stage()
    other = new_cache(model, 2, 100)
    with pytest.raises(ValueError, match="make a Replay for each cache"):
        replay.logits(Step(other, np.zeros((2, 1), np.int64)))
