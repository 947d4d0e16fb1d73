"""Recorded steps on pages: what slots give, wherever the pages lie and however they change between
steps.
"""

import numpy as np
import pytest
from dsv4_backend_torch import TorchBackend

from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.pages import Pages
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Step

PAGE, LONGEST = 128, 330


@pytest.mark.parametrize("numerics", ["native", "float32"])
def test_recorded_steps_on_pages(numerics):
    backend = TorchBackend(numerics=numerics)
    if not backend.compiled:
        pytest.skip("without C kernels no step is recorded")
    model = Model(Checkpoint(embedded()), backend)
    rng = np.random.default_rng(0)
    ids = rng.integers(10, model.config.vocab_size, (2, LONGEST))
    slots = Cache(backend, model.config, 2, LONGEST, rewindable=0)
    pages = Pages(backend, model.config, sequences=2, capacity=LONGEST, page=PAGE, pages=9)
    tables = rng.permutation(9)[:6].reshape(2, 3)
    replays = {id(cache): Replay(model, cache) for cache in (slots, pages)}
    for begin in (0, *range(100, LONGEST)):
        end = 100 if begin == 0 else begin + 1
        told = []
        for cache in (slots, pages):
            order = [0, 1]
            if cache is pages:  # the engine's rows change places
                order = [1, 0] if begin % 3 else [0, 1]
                cache.place(tables[order], [begin, begin])
            step = Step(cache, ids[order, begin:end], [0, 1])
            run = model.forward if begin == 0 else replays[id(cache)].streams
            logits = backend.to_numpy(model.logits(run(step))).reshape(2, end - begin, -1)
            if cache is slots:
                cache.advance(step.sequences, step.ends)
            told.append(logits[order])
        np.testing.assert_array_equal(told[1], told[0])
