"""Pages hold what slots hold: the same bits, whoever filled a page and wherever it lies."""

import itertools

import numpy as np
import pytest
from dsv4_conformance.model import golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import feed

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.graph.cache import Cache, CacheError
from dsv4_core.graph.model import Model
from dsv4_core.graph.pages import Pages

PAGE, LONGEST = 128, 400


@pytest.fixture(scope="module", params=["tiny-flash", "tiny-pro"])
def model(request):
    return Model(Checkpoint(golden.checkpoint_path(request.param)), registry.create("reference", batch_invariant=True))


@pytest.fixture(scope="module")
def ids(model):
    return np.random.default_rng(0).integers(10, model.config.vocab_size, LONGEST)


@pytest.fixture(scope="module")
def alone(model, ids):
    return feed(model, Cache(model.backend, model.config, 1, LONGEST, rewindable=0), ids[None])[0]


def paged(model, pages=12, rewindable=0):
    cache = Pages(
        model.backend, model.config, sequences=3, capacity=LONGEST, page=PAGE, pages=pages, rewindable=rewindable
    )
    for layer in cache.layers:
        for array in (layer.ring, layer.rows, layer.keys, layer.state, layer.key_state):
            if array is not None:
                array[...] = 255 if array.dtype == np.uint8 else np.nan  # what was never written must not be seen
    return cache


def fed(model, cache, tables, lengths, ids, counts=None):
    cache.place(np.array(tables), lengths)
    return feed(model, cache, np.array(ids), counts=counts, sequences=range(len(tables)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, LONGEST - 1), unique=True, max_size=5), order=st.permutations(range(1, 12)), end=...
)
def test_a_prompt_in_chunks_over_scattered_pages(model, ids, alone, cuts, order, end: bool):
    cache, at = paged(model), [0, *sorted(cuts), LONGEST if end else max(cuts, default=LONGEST)]
    for begin, stop in itertools.pairwise(at):
        if begin < stop:
            np.testing.assert_array_equal(fed(model, cache, [order], [begin], [ids[begin:stop]])[0], alone[begin:stop])


@pytest.mark.parametrize("shared", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, LONGEST])
def test_a_sequence_goes_on_where_another_filled_pages(model, ids, alone, shared, chunk):
    """The donor went on and wrote elsewhere; the other takes its first pages and has its own from
    there.
    """
    cache, begin = paged(model), shared * PAGE
    fed(model, cache, [[3, 9, 1, 7]], [0], [ids])
    table = [3, 9, 1, 7][:shared] + [4, 2, 8][: 4 - shared]
    end = min(LONGEST, begin + 3 * chunk)
    for first in range(begin, end, chunk):
        stop = min(first + chunk, end)
        np.testing.assert_array_equal(fed(model, cache, [table], [first], [ids[first:stop]])[0], alone[first:stop])


def test_two_share_and_a_third_is_alone(model, ids, alone):
    cache = paged(model)
    fed(model, cache, [[5, 6, 0, 0]], [0], [ids[: 2 * PAGE]])
    fed(model, cache, [[1, 0, 0, 0]], [0], [ids[:40]])
    tables = [[5, 6, 2, 0], [5, 6, 3, 0], [1, 0, 0, 0]]
    for i in range(3):
        at = [2 * PAGE + i, 2 * PAGE + i, 40 + i]
        together = fed(model, cache, tables, at, [[ids[n]] for n in at])[:, 0]
        np.testing.assert_array_equal(together, alone[at])


def test_drafts_that_were_wrong_leave_nothing(model, ids, alone):
    """As an engine verifies drafts: fed, some rejected, the right tokens fed in their places."""
    cache, table, wrong = paged(model, rewindable=3), [[2, 4, 6, 8]], (ids + 1) % model.config.vocab_size
    fed(model, cache, table, [0], [ids[: PAGE - 5]])
    for i in range(PAGE - 5, 3 * PAGE, 2):
        fed(model, cache, table, [i], [[ids[i], ids[i + 1], *wrong[i + 2 : i + 4]]])
    np.testing.assert_array_equal(fed(model, cache, table, [i + 2], [[ids[i + 2]]])[0, 0], alone[i + 2])


def test_a_window_across_pages_is_refused(model):
    with pytest.raises(CacheError, match="pages of 100 tokens: this model compresses 128 at most; give a multiple"):
        Pages(model.backend, model.config, sequences=1, capacity=200, page=100, pages=2)


def test_a_page_costs_what_its_rows_cost():
    """Flash, 256 tokens a page: 64 + 2 compressed rows, 64 keys, 128 window rows, 8 + 128 tokens of
    open windows.
    """
    config, backend = PRESETS["flash"], registry.create("reference")
    cache = Pages(backend, config, sequences=1, capacity=256, page=256, pages=1)
    kinds = [sum(r == ratio for r in config.compress_ratios) for ratio in (0, 4, 128)]
    window, four, far = 128 * 584, 64 * (584 + 68) + 8 * 4 * (2048 + 512), 2 * 584 + 128 * 4 * 1024
    assert cache.nbytes == sum(kinds) * window + kinds[1] * four + kinds[2] * far
