"""The indexer in blocks of keys: the picks of all keys at once, bit for bit, on data whose scores
are exact in any order.
"""

import numpy as np
import pytest

from dsv4_core.contract.dtypes import BFLOAT16, RowLayout
from dsv4_core.contract.registry import create, installed

HEADS, DIM, LAYOUT = 4, 64, RowLayout("key", 64)


WAYS = {
    "reference": ("reference", {}),
    "reference batch_invariant": ("reference", {"batch_invariant": True}),
    "torch": ("torch", {"few_tokens_by": "torch"}),  # a few tokens in C read no block
}


@pytest.fixture(params=WAYS)
def backend(request):
    name, options = WAYS[request.param]
    if name not in installed() or installed()[name].missing:
        pytest.skip(f"backend {name} is not usable here")
    return create(name, **options)


def picks(be, block, rows, visible, topk, *, monkeypatch, spread=3, read=None):
    """Picks with ``block`` keys at a time; ``visible`` [batch, seq]. Small whole numbers: exact
    sums, and many ties.
    """
    visible = np.array(visible, np.int32)
    (batch, seq), rng = visible.shape, np.random.default_rng(rows)
    keys = rng.integers(-spread, spread + 1, (batch * rows + 7, DIM)).astype(BFLOAT16)
    cache = be.zeros((len(keys), LAYOUT.width), "uint8")
    slots = rng.permutation(len(keys)).astype(np.int32)
    be.cache_write(cache, be.from_numpy(keys), be.from_numpy(slots), layout=LAYOUT)
    q = rng.integers(-2, 3, (batch, seq, HEADS, DIM)).astype(BFLOAT16)
    weights = rng.integers(-2, 5, (batch, seq, HEADS)).astype(np.float32)
    offset = np.broadcast_to(np.arange(batch, dtype=np.int32)[:, None] * 1000, visible.shape).copy()
    monkeypatch.setattr(type(be), "keys_at_once", block)
    if read is not None:
        inner = be.cache_read
        monkeypatch.setattr(
            be, "cache_read", lambda c, i, **kw: read.append(len(i)) or inner(c, i, **kw), raising=False
        )
    found = be.cached_index_topk(
        *(be.from_numpy(x) for x in (q, weights)), cache, *(be.from_numpy(x) for x in (slots[: batch * rows], visible, offset)),
        layout=LAYOUT, scale=0.5, topk=topk,
    )  # fmt: skip
    return be.to_numpy(found)


@pytest.mark.parametrize("block", [1, 16, 48, 299, 300])
@pytest.mark.parametrize(
    ("visible", "topk"),
    [
        ([[300, 300, 300]], 8),
        ([[300], [17], [0]], 8),  # a ragged batch; no visible row
        ([[5, 6, 7], [0, 0, 1]], 32),  # fewer rows than picks
        ([[299, 300], [48, 49]], 300),  # every row a pick
        (np.zeros((2, 0)), 4),  # no token
    ],
)
def test_blocks_pick_what_all_keys_at_once_do(backend, monkeypatch, block, visible, topk):
    whole = picks(backend, None, 300, visible, topk, monkeypatch=monkeypatch)
    read = []
    blocked = picks(backend, block, 300, visible, topk, monkeypatch=monkeypatch, read=read)
    assert np.array_equal(whole, blocked)
    assert max(read) <= block * len(visible)


def test_of_equal_scores_in_different_blocks_the_lowest_rows_win(backend, monkeypatch):
    found = picks(backend, 16, 100, [[100], [40]], 24, monkeypatch=monkeypatch, spread=0)  # every score is 0
    assert np.array_equal(found[:, 0], np.stack([np.arange(24), np.arange(1000, 1024)]))


def test_tokens_beyond_one_block_of_scores_each_see_every_key(backend, monkeypatch):
    monkeypatch.setattr("dsv4_core.contract.ops.attention.SCORES_AT_ONCE", 700)  # three tokens at a time
    visible = [[200 + i for i in range(11)]]
    whole = picks(backend, None, 220, visible, 16, monkeypatch=monkeypatch)
    read = []
    assert np.array_equal(whole, picks(backend, 64, 220, visible, 16, monkeypatch=monkeypatch, read=read))
    assert read == [64, 64, 64, 28] * 4


def test_the_blocks_in_use_are_those_of_a_core_s_cache(backend, monkeypatch):
    block = type(backend).keys_at_once
    size = block if isinstance(block, int) else block.__get__(backend)
    whole = picks(backend, None, 2 * size + 5, [[2 * size + 3]], 64, monkeypatch=monkeypatch)
    assert np.array_equal(whole, picks(backend, block, 2 * size + 5, [[2 * size + 3]], 64, monkeypatch=monkeypatch))


def test_a_sequence_s_picks_do_not_depend_on_the_batch(monkeypatch):
    be = create("reference", batch_invariant=True)
    rng, rows = np.random.default_rng(3), 3 * be.keys_at_once + 100
    cache = be.zeros((2 * rows, LAYOUT.width), "uint8")
    be.cache_write(
        cache, rng.standard_normal((2 * rows, DIM), np.float32).astype(BFLOAT16), np.arange(2 * rows, dtype=np.int32), layout=LAYOUT
    )  # fmt: skip
    q = rng.standard_normal((2, 1, HEADS, DIM), np.float32).astype(BFLOAT16)
    weights = rng.standard_normal((2, 1, HEADS), np.float32)
    seen = []
    inner = be.index_select
    monkeypatch.setattr(
        be, "index_select", lambda scores, *a, **k: seen.append(scores) or inner(scores, *a, **k), raising=False
    )

    def run(part, count):
        index = np.concatenate([np.arange(b * rows, b * rows + count, dtype=np.int32) for b in part])
        visible = np.full((len(part), 1), rows - 50, np.int32)
        return be.cached_index_topk(
            q[part], weights[part], cache, index, visible, np.zeros_like(visible), layout=LAYOUT, scale=0.125, topk=256
        )

    both, alone = run([0, 1], rows), run([1], rows - 50)
    assert np.array_equal(both[1], alone[0])
    assert np.array_equal(seen[0][1, :, : rows - 50], seen[1][0]), "bits of the scores"
