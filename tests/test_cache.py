"""The cache's size, to the byte, and what packing keeps."""

import math

import ml_dtypes
import numpy as np
import pytest
from recorded import feed, load_model

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.contract.dtypes import RowLayout, numpy_dtype
from dsv4_core.contract.registry import create
from dsv4_core.contract.spec import BackendError
from dsv4_core.graph.cache import Cache, CacheError
from dsv4_core.planning.shapes import ShapeBackend


def formula(config, numerics, capacity, R):
    """model.md section 5, written out again: bytes of one sequence."""
    d, r, di, W = config.head_dim, config.qk_rope_head_dim, config.index_head_dim, config.sliding_window
    item = numpy_dtype({"native": "uint8"}.get(numerics, numerics)).itemsize
    wide = 8 if numerics == "float64" else 4
    row = (d - r) + 8 * math.ceil(math.ceil((d - r) / 64) / 8) + 2 * r if numerics == "native" else d * item
    key = di // 2 + di // 32 if numerics == "native" else di * item
    total = 0
    for m in config.compress_ratios:
        total += (W + R) * row
        if m:
            total += -(-capacity // m) * (row + (key if m == 4 else 0))
        if m == 128:
            total += (m + R) * 2 * wide * d
        if m == 4:
            total += (2 * m + R) * 2 * wide * (2 * d + 2 * di)
    return total


@pytest.mark.parametrize("numerics", ["native", "float32", "float64"])
@pytest.mark.parametrize(("capacity", "rewindable", "sequences"), [(1, 0, 1), (127, 3, 2), (129, 8, 1), (4096, 1, 3)])
def test_nbytes_is_the_formula(numerics, capacity, rewindable, sequences):
    config = PRESETS["tiny"]
    cache = Cache(create("reference", numerics=numerics), config, sequences, capacity, rewindable)
    assert cache.nbytes == sequences * formula(config, numerics, capacity, rewindable)
    held = [a for layer in cache.layers for a in vars(layer).values() if isinstance(a, np.ndarray)]
    assert cache.nbytes == sum(a.nbytes for a in held)


@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_nbytes_of_the_published_models(preset):
    config = PRESETS[preset]
    cache = Cache(ShapeBackend(), config, 1, 1 << 20, 8)
    assert cache.nbytes == formula(config, "native", 1 << 20, 8)
    per_token = {4: (584 + 68) / 4, 128: 584 / 128}
    rows = sum(per_token.get(m, 0) for m in config.compress_ratios) * (1 << 20)
    assert 0 < cache.nbytes - rows < 0.02 * rows  # windows and open windows: small at a million tokens


def test_published_row_sizes():
    assert RowLayout("kv", 512, 64).width == 584
    assert RowLayout("key", 128).width == 68
    assert RowLayout("plain", 100).width == 100


@pytest.mark.parametrize(
    ("layout", "fmt", "block"),
    [
        (RowLayout("kv", 512, 64), "e4m3", 64),
        (RowLayout("kv", 192, 64), "e4m3", 64),
        (RowLayout("key", 128), "e2m1", 32),
    ],
)
def test_packing_loses_nothing(layout, fmt, block):
    """Rows on their grid come back bit for bit: whatever the magnitude, zeros, signed zeros and
    single values included.
    """
    be = create("reference")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, layout.dim)) * 2.0 ** rng.integers(-30, 30, (600, 1))
    x[0], x[1], x[2] = 0, -0.0, 1e30
    x[3:40] *= rng.random((37, layout.dim)) < 0.02
    rows = be.act_qdq(x.astype(ml_dtypes.bfloat16), format=fmt, block=block, channels=layout.dim - layout.rope_dim)
    cache = be.zeros((700, layout.width), "uint8")
    index = rng.permutation(700)[:600].astype(np.int32)
    index[5] = -1
    be.cache_write(cache, rows, index, layout=layout)
    got = be.cache_read(cache, index, layout=layout)
    rows[5] = 0
    np.testing.assert_array_equal(got.view(np.uint16), rows.view(np.uint16))
    untouched = np.ones(700, bool)
    untouched[index[index >= 0]] = False
    assert not cache[untouched].any()


def test_context_too_long():
    model = load_model("tiny-flash", "native")
    cache = Cache(model.backend, model.config, 1, 16)
    with pytest.raises(
        CacheError,
        match=r"context too long: sequence 0 would hold 17 tokens; the cache has room for 16 and the model for 1024",
    ):
        feed(model, cache, np.zeros((1, 17), np.int64))
    assert cache.lengths[0] == 0
    with pytest.raises(CacheError, match=r"capacity of 1025 tokens; the model has positions 0 .. 1023"):
        Cache(model.backend, model.config, 1, 1025)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[3, 256]], r"token id 256 at \[0, 1\] is outside the vocabulary 0 .. 255"),
        ([[-1, 2]], r"token id -1 at \[0, 0\]"),
        ([[0.5, 1]], "dtype float64 must be an integer dtype"),
    ],
)
def test_token_ids_are_checked(ids, message):
    model = load_model("tiny-flash", "native")
    with pytest.raises(ValueError, match=message):
        feed(model, Cache(model.backend, model.config, 1, 16), np.array(ids))


def test_a_write_that_gives_nothing_back_is_named(monkeypatch):
    model = load_model("tiny-flash", "native")
    monkeypatch.setattr(type(model.backend), "cache_write", lambda *_operands, **_scalars: None)
    with pytest.raises(BackendError, match="'reference': cache_write gave None; it must return the array"):
        feed(model, Cache(model.backend, model.config, 1, 8), np.array([[1, 2]]))
