"""Steps as CUDA graphs, without a GPU: what stands in for torch.cuda 'captures' by remembering what
ran, and replays by running that again.
"""

from __future__ import annotations

import functools
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_backend_torch import graphs
from dsv4_backend_torch.graphs import WARM_UPS, Recorded
from dsv4_conformance.model import golden

from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.backend import Backend
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Step


class Cuda:
    """torch.cuda's part of a capture. ``runs``: what happened, in order."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse, self.runs = refuse, []
        self.recorded: Recorded | None = None
        outer = self

        class Graph:
            def replay(self):
                outer.runs.append("replay")
                r = outer.recorded
                r.result.copy_(r.function(*r.inputs))  # the same kernels on the same addresses

        class Event:
            def record(self):
                outer.runs.append("copied")

            def synchronize(self):
                outer.runs.append("waits for the copy")

        self.CUDAGraph, self.Event = Graph, Event

    def Stream(self):  # noqa: N802
        return self

    def current_stream(self):
        return self

    def wait_stream(self, _):
        pass

    @contextmanager
    def stream(self, _):
        self.runs.append("warm-up")
        yield

    @contextmanager
    def graph(self, _, stream):
        self.runs.append("capture")
        if self.refuse:
            raise RuntimeError(self.refuse + "\nmore")
        yield


def recorded(function, **options):
    cuda = Cuda(**options)
    made = Recorded(function, torch.device("cpu"), cuda)
    cuda.recorded = made
    return made, cuda


def test_a_function_is_captured_once_and_replayed_on_new_inputs():
    calls = []

    def double(x):
        calls.append(1)
        return x * 2

    run, cuda = recorded(double)
    assert run(np.array([1, 2], np.int32)).tolist() == [2, 4]
    assert cuda.runs == ["copied", "warm-up", "capture", "replay"]
    assert len(calls) == WARM_UPS + 1 + 1
    addresses = [t.data_ptr() for t in (*run.inputs, *run.pinned, run.result)]
    cuda.runs.clear()
    assert run(np.array([5, -7], np.int32)).tolist() == [10, -14]
    assert cuda.runs == ["waits for the copy", "copied", "replay"]
    assert addresses == [t.data_ptr() for t in (*run.inputs, *run.pinned, run.result)]


def test_bfloat16_hosts():
    from dsv4_core.contract.dtypes import BFLOAT16

    run, _ = recorded(lambda x: x + x)
    assert run(np.array([1.5], BFLOAT16)).tolist() == [3.0]


def test_another_shape_is_refused():
    run, _ = recorded(lambda x: x + 1)
    run(np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"recorded for arrays .* called with"):
        run(np.zeros(3, np.int32))


def test_what_cannot_be_captured_runs_each_time():
    run, cuda = recorded(lambda x: x + 1, refuse="operation not permitted when stream is capturing")
    with pytest.warns(RuntimeWarning, match="could not be captured.*operation not permitted"):
        assert run(np.array([1], np.int32)).tolist() == [2]
    cuda.runs.clear()
    assert run(np.array([41], np.int32)).tolist() == [42]
    assert cuda.runs == ["waits for the copy", "copied"]


FAULTS = {
    "buffers anew at each call, while the graph reads the first ones": ("if not self.forms:", "if True:"),
    "pinned memory is written while the last copy reads it": ("self.copied.synchronize()", "pass"),
    "the copy's end is never marked": ("self.copied.record()", "pass"),
    "the graph's inputs keep the first call's values": ("given.copy_(pinned, non_blocking=True)", "pass"),
    "copied to the device before the host's values are there": (
        "pinned.copy_(_tensor(host))\n            given.copy_(pinned, non_blocking=True)",
        "given.copy_(pinned, non_blocking=True)\n            pinned.copy_(_tensor(host))",
    ),
    "captured at every call": ("self.graph is None and not self._capture()", "not self._capture()"),
    "nothing is warm when the capture begins": ("WARM_UPS = 2", "WARM_UPS = 0"),
    "another shape is copied into the first one's buffers": ("!= self.forms:", "is None:"),
    "what the capture returned is not what is given": ("return self.result", "return self.inputs[0]"),
    "a refused capture is tried again and again": ("if self.refused:", "if False:"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_planted_faults_of_the_buffers_are_noticed(what, monkeypatch):
    """Each in a copy of graphs.py, judged by the tests above."""
    found, planted = FAULTS[what]
    source = Path(graphs.__file__).read_text()
    assert source.count(found) == 1
    copy = types.ModuleType("graphs_with_a_fault")
    exec(compile(source.replace(found, planted), what, "exec"), vars(copy))  # noqa: S102 - our own file
    monkeypatch.setitem(globals(), "Recorded", copy.Recorded)
    noticed = []
    for judge in (
        test_a_function_is_captured_once_and_replayed_on_new_inputs, test_bfloat16_hosts, test_another_shape_is_refused,
        test_what_cannot_be_captured_runs_each_time,
    ):  # fmt: skip
        try:
            judge()
        except BaseException:  # noqa: BLE001, PERF203 - pytest's own failures are no Exception
            noticed.append(judge.__name__)
    assert noticed


def test_a_models_steps_replayed_are_its_steps(monkeypatch):
    """Logits of replayed steps are those of eager ones, bit for bit, through a rewind too."""
    backend = CudaBackend(interpret=True, numerics="float32")  # torch's ops: what is tried is the replay
    monkeypatch.setattr(backend, "round_up", functools.partial(Backend.round_up, backend))  # as on a GPU: one shape
    made = []

    def record(function):
        run, cuda = recorded(function)
        made.append(cuda)
        return run

    model = Model(Checkpoint(golden.checkpoint_path("tiny-flash")), backend)
    ids = np.arange(1, 8)
    logits = {}
    for way in ("eager", "replayed"):
        if way == "replayed":
            monkeypatch.setattr(backend, "record", record)
        cache = Cache(backend, model.config, 1, 64)
        replay, found = Replay(model, cache), []

        def feed(token, way=way, cache=cache, replay=replay, found=found):
            step = Step(cache, np.array([[token]], np.int32))
            with backend.computing():
                row = replay.logits(step) if way == "replayed" else model.logits(model.forward(step))
            found.append(row.clone())
            cache.advance(step.sequences, step.ends)

        for token in ids:
            feed(token)
        cache.rewind(0, 4)
        for token in (9, 8):
            feed(token)
        logits[way] = torch.cat(found)
    assert torch.equal(logits["eager"], logits["replayed"])
    assert len(made) == 1
    assert made[0].runs.count("capture") == 1
    assert made[0].runs.count("replay") == len(ids) + 2 - 1
