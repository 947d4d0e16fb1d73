"""A step's addresses: one buffer, few shapes, and what is refused."""

import itertools

import numpy as np
import pytest

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract import registry
from dsv4_core.contract.backend import Backend
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.step import ALIGNED, Addresses, Joined, Step

FLASH = PRESETS["flash"]


class Bucketed(registry.reference()):
    """The reference with the default rounding up."""

    round_up = Backend.round_up


class Counted:
    """A cache's lengths without its arrays."""

    def __init__(self, backend, config, sequences, capacity):
        self.backend, self.config, self.sequences, self.capacity = backend, config, sequences, capacity
        self.lengths = np.zeros(sequences, np.int64)
        self.ring_rows = config.sliding_window + 8

    compressed_rows = Cache.compressed_rows
    rewindable = 8
    state_rows = Cache.state_rows
    at, stays, in_one_part = Cache.at, Cache.stays, True


def shapes(backend, config, lengths, batch=1):
    cache = Counted(backend, config, batch, 1 << 20)
    for length in lengths:
        cache.lengths[:] = length
        yield Step(cache, np.zeros((batch, 1), np.int64)).shape


def test_shapes_change_a_few_times_in_a_context():
    lengths = [*range(2200), *range(2200, (1 << 20) - 1, 997)]
    found = list(shapes(Bucketed(), FLASH, lengths))
    changes = sum(a != b for a, b in itertools.pairwise(found))
    assert changes <= 20, "a doubling of two kinds of rows, and one turn to gathered picks"
    assert len(set(found)) == changes + 1, "none comes back"
    assert len(set(shapes(registry.create("reference"), FLASH, range(2200)))) > 500, "as needed: many"


def test_extents_hold_what_is_needed_and_no_more_than_the_cache_has():
    cache = Counted(Bucketed(), FLASH, 2, 1000)
    cache.lengths[:] = 600, 3
    shape = Step(cache, np.zeros((2, 5), np.int64), counts=[5, 2]).shape
    assert (shape.before, shape.width) == (127, 128)
    rows = {each.ratio: each for each in shape.compressions}
    assert (rows[4].bound, rows[4].closing, rows[4].topk, rows[4].before) == (250, 2, 250, 7)
    assert (rows[128].bound, rows[128].closing, rows[128].before) == (8, 1, 127)


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 4096, 4097, 1 << 20])
def test_default_rounding(n):
    up = Bucketed().round_up(n)
    assert up >= max(n, 128)
    assert up & (up - 1) == 0
    assert up < 2 * max(n, 128)


def test_everything_is_one_buffer():
    """What a recorded step is given is all that it needs: the arrays that the buffer makes are the
    step's own.
    """
    backend = Bucketed()
    config = PRESETS["tiny"]
    cache = Cache(backend, config, 3, 700)
    cache.lengths[:] = 517, 3, 130
    step = Step(cache, np.arange(6).reshape(2, 3), sequences=[2, 0], counts=[3, 1])
    assert (step.host.dtype, step.host.ndim, step.host.size) == (np.int32, 1, step.shape.size)
    assert {begin % ALIGNED for begin, _ in step.shape.parts.values()} == {0}
    other = Addresses(cache, step.shape, step.host.copy())
    for name in ("ids", "positions", "ring_read", "ring_write", "window_idxs"):
        assert (getattr(step, name) == getattr(other, name)).all()
        assert np.shares_memory(getattr(step, name), step.buffer)
    for each in step.shape.compressions:
        mine, theirs = step.compression(each.ratio), other.compression(each.ratio)
        for name in ("state_read", "state_write", "window_idxs", "row_write", "row_positions", "row_read", "visible"):
            assert (getattr(mine, name) == getattr(theirs, name)).all()
        assert (mine.row_idxs is None) == (each.ratio == 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sequences": [0, 0]}, "sequence 0 is named twice"),
        ({"sequences": [0, 3]}, r"sequence 3 is not one of the cache's 0 \.\. 2"),
        ({"sequences": [-1, 0]}, "sequence -1 is not one"),
        ({"sequences": [1]}, "1 sequences and 2 counts for 2 rows"),
        ({"counts": [1, 4]}, "a count of 4; a row of ids has 3 tokens"),
        ({"counts": [-1, 3]}, "a count of -1"),
    ],
)
def test_refused(given, said):
    cache = Cache(registry.create("reference"), PRESETS["tiny"], 3, 64)
    with pytest.raises(ValueError, match=said):
        Step(cache, np.zeros((2, 3), np.int64), **given)
    assert cache.lengths.tolist() == [0, 0, 0]


def test_rectangles_of_one_step():
    """Their tokens stand one after another; a sequence is in one of them, and all are of one
    cache.
    """
    cache, other = (Cache(registry.create("reference"), PRESETS["tiny"], 3, 64) for _ in range(2))
    cache.lengths[:] = [5, 6, 7]
    one, long = Step(cache, np.array([[3], [4]]), [2, 0]), Step(cache, np.array([[5, 6, 7]]), [1])
    step = Joined([one, long])
    assert step.tokens == 5
    assert step.ids.tolist() == [3, 4, 5, 6, 7]
    assert step.positions.tolist() == [7, 5, 6, 7, 8]
    assert step.ring_write.tolist() == [*one.ring_write.tolist(), *long.ring_write.tolist()]
    assert step.sequences.tolist() == [2, 0, 1]
    assert step.ends.tolist() == [8, 6, 9]
    with pytest.raises(ValueError, match="sequence 0 is named twice"):
        Joined([one, Step(cache, np.array([[1]]), [0])])
    with pytest.raises(ValueError, match="several caches"):
        Joined([one, Step(other, np.array([[1]]), [1])])
