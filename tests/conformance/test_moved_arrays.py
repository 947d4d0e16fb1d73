"""Arrays that move: the shipped backends go on with what a write returns, and one that relies on
aliasing is found.
"""

import numpy as np
import pytest
from dsv4_conformance.laws.of_moved_arrays import arrays_may_move
from dsv4_conformance.laws.small_model import Stage
from dsv4_conformance.museum.hunt import right_backend

from dsv4_core.contract import registry
from dsv4_core.graph.cache import LayerCache

EXAMPLE = {"ratios": (0, 4), "chunks": [30, 1, 4], "seed": 0}


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_what_a_write_returns_is_what_is_read(name):
    if registry.installed()[name].missing:
        pytest.skip(f"{name} is not installed")
    backend = registry.create(name, numerics="float32")
    assert arrays_may_move(Stage(backend, backend), **EXAMPLE) is None


def test_a_graph_that_relies_on_aliasing_is_found(monkeypatch):
    def only_once(self, name, value):
        if name not in vars(self):
            object.__setattr__(self, name, value)

    monkeypatch.setattr(LayerCache, "__setattr__", only_once)
    backend = right_backend()(numerics="float64")
    assert "where every write gives another array" in arrays_may_move(Stage(backend, backend), **EXAMPLE)


def test_the_one_that_was_given_stays_as_it_was():
    backend = right_backend()(numerics="float32")
    from dsv4_conformance.laws.of_moved_arrays import moving

    from dsv4_core.backend import RowLayout

    cache = np.zeros((3, 4), np.float32)
    with moving(backend):
        written = backend.cache_write(
            cache, np.ones((1, 4), np.float32), np.array([1], np.int32), layout=RowLayout("plain", 4)
        )
    assert not cache.any()
    assert written[1].all()
    assert "cache_write" not in vars(backend)
