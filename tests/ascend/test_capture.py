"""Recorded steps, without an NPU: what a graph would hold, and that nothing kept crosses its
ends.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann.call import dry_run
from dsv4_backend_ascend.capability import GENERATIONS
from dsv4_backend_ascend.capture import compare, dry_capture
from dsv4_backend_ascend.launches import ShapesBackend
from dsv4_backend_torch.graphs import Recorded
from dsv4_backend_torch.numeric import torch_dtype
from dsv4_backend_torch.process_group import TorchProcessGroup

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.rank_part import Place, ShardedSource
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model, Parallel
from dsv4_core.graph.step import Addresses, Step
from dsv4_core.planning.shapes import ShapeSource
from dsv4_core.ranks.exchange import ExpertExchange, Link, Ranks, Traffic

SMALL = dataclasses.replace(
    PRESETS["flash"], vocab_size=256, num_hidden_layers=3, n_routed_experts=8, num_experts_per_tok=2, num_hash_layers=1,
    num_nextn_predict_layers=0, compress_ratios=(0, 4, 128),
)  # fmt: skip


@pytest.mark.parametrize("tier", ["composed", "cann", "vendor"])
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("start", [5000, 100])
def test_a_decode_step_reads_the_same_buffers_each_time(generation, tier, start):
    found = dry_capture(SMALL, generation, tier=tier, start=start)
    assert found.sound, found
    assert found.buffers > 100  # weights of three layers, and their cache


class TwoRanks:
    """A group of two on tensors without data."""

    def all_gather(self, x):
        return torch.stack([x, x])

    def all_reduce(self, x, *, out_dtype):
        return x.to(torch_dtype(out_dtype))


class World(TorchProcessGroup):
    """Ranks that are not there."""

    def __init__(self, backend):
        self.backend, self.host_reads_stall = backend, True

    def connect(self):
        pass

    def groups(self, members):
        return TwoRanks()


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2), (2, 2)])
def test_a_rank_reads_nothing_on_the_host_in_a_decode_step(generation, tp, ep):
    """Three sequences of a token each, of which the first group has two: vocabulary, heads,
    experts and their exchange, as the graph of several ranks has them.
    """
    backend = ShapesBackend(soc=generation)
    for rank in range(tp * ep):
        place = Place(tp, ep, rank)
        ranks = Ranks(backend, place, World(backend), None)
        parallel = ranks.parallel(SMALL, quantised=True)
        with torch.no_grad(), dry_run(generation):
            model = Model(ShardedSource(ShapeSource(SMALL), place), backend, parallel=parallel)
            mine = parallel.mine(np.zeros((3, 1), np.int32))
            cache = Cache(backend, SMALL, len(mine), 101)
            cache.lengths[:] = cache.furthest[:] = 100
            step = Step(cache, mine, padded=parallel.padded(range(3), 3, 1))
            assert step.shape.padded == (2 if ep > 1 else 0)
            buffer = backend.from_numpy(step.host)
            found = compare(
                backend.alone(lambda m=model, c=cache, s=step, b=buffer: m.logits(m.forward(Addresses(c, s.shape, b))))
            )
        assert found.sound, (rank, found)
        assert ("expert gather" in ranks.traffic.sent) == (ep > 1)
        assert "expert counts" not in ranks.traffic.sent


@pytest.mark.parametrize("padded", [0, 2])
def test_an_exchange_of_a_padded_step_reads_nothing_on_the_host(padded):
    """This rank has a token, the other one two. Where counts are exchanged, they are read."""
    backend, place, traffic = ShapesBackend(soc="910B"), Place(1, 2, 0), Traffic()
    link = Link(TwoRanks(), 2, 0, traffic, None)
    ranks = SimpleNamespace(backend=backend, place=place, ep=link, traffic=traffic, fp8=False)
    exchange = ExpertExchange(ranks, SMALL.n_routed_experts)
    parallel = Parallel(experts=lambda _, padded: partial(exchange.everywhere, padded) if padded else exchange)
    with torch.no_grad(), dry_run("910B"):
        model = Model(ShapeSource(SMALL), backend, parallel=parallel)
        cache = Cache(backend, SMALL, 1, 101)
        cache.lengths[:] = cache.furthest[:] = 100
        step = Step(cache, np.zeros((1, 1), np.int32), padded=padded)
        buffer = backend.from_numpy(step.host)
        found = compare(backend.alone(lambda: model.logits(model.forward(Addresses(cache, step.shape, buffer)))))
    assert found.sound == bool(padded), found
    assert bool(found.host) != bool(padded)


def test_what_is_kept_across_runs_is_found():
    """Without ``alone`` the second run would read what the first one made of its indices."""
    kept = []

    def run():
        x = torch.empty(3, device="meta")
        if kept:
            x + kept.pop()
        kept.append(x * 2)

    found = compare(run)
    assert not found.sound
    assert found.moved == ("aten::add.Tensor",)


def test_what_is_read_on_the_host_is_found():
    found = compare(lambda: torch.empty(3, device="meta").sum().item())
    assert not found.sound
    assert found.host


class Npu:
    """torch.npu's part of a capture: the second run is the captured one, and replays run it
    again.
    """

    def __init__(self):
        self.runs, self.recorded = [], None
        outer = self

        class Graph:
            def replay(self):
                outer.runs.append("replay")
                with torch.inference_mode():
                    outer.recorded.result.copy_(outer.recorded.function(*outer.recorded.inputs))

        self.NPUGraph = Graph
        self.Event = lambda: self

    def record(self):
        pass

    synchronize = record

    def Stream(self):  # noqa: N802
        return self

    current_stream = Stream

    def wait_stream(self, _):
        pass

    def stream(self, _):
        return self

    def graph(self, graph, stream):
        del graph, stream
        self.runs.append("captured")
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_recorded_function_is_captured_once_and_keeps_nothing():
    backend = AscendBackend(simulate="910B", tier="composed")
    npu = Npu()

    def double(x):
        backend.kept.of((x, "doubled"), lambda: x * 2)
        return backend.kept.of((x, "doubled"), lambda: None).clone()

    recorded = npu.recorded = Recorded(backend.alone(double), torch.device("cpu"), npu, "NPUGraph")
    for value in (1.0, 5.0, 7.0):
        assert recorded(np.full(3, value, np.float32)).tolist() == [2 * value] * 3
        assert not backend.kept.of_indices
    assert npu.runs == ["captured", "replay", "replay", "replay"]


def test_simulated_steps_run_each_time():
    backend = AscendBackend(simulate="910B")
    assert backend.record(lambda x: x + 1)(np.ones(2, np.float32)).tolist() == [2.0, 2.0]
