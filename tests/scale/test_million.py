"""The far end of the context: positions up to 2^20 - 1, and rows whose bytes lie beyond 2^31."""

from dataclasses import replace

import numpy as np
import pytest

from dsv4_core.checkpoint.config import PRESETS, RopeScaling
from dsv4_core.contract.dtypes import BFLOAT16, RowLayout
from dsv4_core.contract.registry import create, installed
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step

from .test_shapes import RandomSource

MILLION = 1 << 20
SMALL = replace(
    PRESETS["tiny"],
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    head_dim=96,
    qk_rope_head_dim=32,
    index_n_heads=2,
    index_head_dim=32,
    index_topk=64,
    max_position_embeddings=MILLION,
    rope_scaling=RopeScaling(),
)
FAR = (1 << 31) // 584 + 1000  # a row of 584 bytes there begins past 2^31 bytes


@pytest.fixture(params=["reference", "torch"])
def name(request):
    if request.param not in installed() or installed()[request.param].missing:
        pytest.skip(f"backend {request.param} is not usable here")
    return request.param


def test_rows_beyond_two_gigabytes_are_written_and_read_bit_for_bit(name):
    be, layout = create(name), RowLayout("kv", 512, 64)
    assert layout.width == 584
    cache = be.from_numpy(np.zeros((FAR + 8, 584), np.uint8))  # pages that nobody touches take no memory
    rows = np.random.default_rng(0).standard_normal((8, 512)).astype(BFLOAT16)
    rows = be.to_numpy(be.act_qdq(be.from_numpy(rows), format="e4m3", block=64, channels=448))
    index = be.from_numpy(np.arange(FAR, FAR + 8, dtype=np.int32))
    be.cache_write(cache, be.from_numpy(rows), index, layout=layout)
    assert np.array_equal(be.to_numpy(be.cache_read(cache, index, layout=layout)), rows)
    near = be.to_numpy(cache[: 1 << 12])
    assert not near.any(), "an address was cut to 32 bits"


def test_attention_over_such_rows_is_that_of_float64(name):
    be, exact, layout = create(name), create("reference", numerics="float64"), RowLayout("kv", 512, 64)
    rng = np.random.default_rng(1)
    stored = np.zeros((FAR + 512, 584), np.uint8)
    rows, kv, q = (rng.standard_normal(shape).astype(BFLOAT16) for shape in ((512, 512), (1, 512), (1, 64, 512)))
    rows = be.to_numpy(be.act_qdq(be.from_numpy(rows), format="e4m3", block=64, channels=448))
    index, sink = np.arange(FAR, FAR + 512, dtype=np.int32), rng.standard_normal(64).astype(np.float32)
    cache = be.from_numpy(stored)
    be.cache_write(cache, be.from_numpy(rows), be.from_numpy(index), layout=layout)
    idxs = np.arange(513, dtype=np.int32)[None]
    ring, none = be.from_numpy(np.zeros((1, 584), np.uint8)), be.from_numpy(np.zeros(0, np.int32))
    operands = (
        be.from_numpy(q),
        be.from_numpy(kv),
        ring,
        none,
        cache,
        be.from_numpy(index),
        be.from_numpy(sink),
        be.from_numpy(idxs),
    )
    got = be.to_numpy(be.cached_sparse_attn(*operands, layout=layout, softmax_scale=512**-0.5)).astype(np.float64)
    want = exact.sparse_attn(
        *(x.astype(np.float64) for x in (q, np.concatenate([kv, rows]))), sink, idxs, softmax_scale=512**-0.5
    )
    assert np.abs(got - want).max() <= 2.0**-8 * np.abs(want).max()  # one rounding to BF16, and float32 sums


def test_angles_at_the_last_position_are_float32_products(name):
    be, freqs = create(name, numerics="float64"), SMALL.rope_frequencies(4)
    x = np.random.default_rng(2).standard_normal((3, 2, 96))
    positions = np.array([0, 65535, MILLION - 1], np.int32)
    got = be.to_numpy(be.apply_rope(be.from_numpy(x), be.from_numpy(positions), be.from_numpy(freqs), inverse=False))
    angle = (positions.astype(np.float32)[:, None] * freqs).astype(np.float64)[:, None]
    pair = x[..., 64:].reshape(3, 2, 16, 2)
    turned = (pair[..., 0] + 1j * pair[..., 1]) * np.exp(1j * angle)
    want = np.stack([turned.real, turned.imag], -1).reshape(3, 2, 32)
    np.testing.assert_allclose(got[..., 64:], want, rtol=0, atol=1e-12)


def filled(name, numerics, length):
    """A model and its cache, exact, holding the same random rows in every precision."""
    be = create(name, numerics=numerics)
    model = Model(RandomSource(SMALL), be)
    cache = Cache(be, SMALL, 1, MILLION)
    cache.lengths[:] = cache.furthest[:] = length
    dtype, rng = be.activation_dtype, np.random.default_rng(3)
    pool = rng.standard_normal((1 << 12, 400)).astype(np.float32)
    for layer in cache.layers:
        for array in (layer.ring, layer.rows, layer.keys, layer.state, layer.key_state):
            for at in range(0, 0 if array is None else array.shape[0], len(pool)):
                n = min(len(pool), array.shape[0] - at)
                rows = np.roll(pool[:n, : array.shape[1]], at % 4093, 0).astype(dtype)
                index = np.arange(at, at + n, dtype=np.int32)
                be.cache_write(
                    array, be.from_numpy(rows), be.from_numpy(index), layout=RowLayout("plain", array.shape[1])
                )
    return model, cache


def test_the_last_token_of_a_million_in_float32_is_that_in_float64(name):
    """The whole graph at position 2^20 - 1, where windows of 4 and of 128 close, over the same
    rows.
    """
    results = []
    for backend, numerics in ((name, "float32"), ("reference", "float64")):
        model, cache = filled(backend, numerics, MILLION - 1)
        step = Step(cache, np.array([[7]]))
        assert (step.compression(4).bound, step.compression(128).bound) == (MILLION // 4, MILLION // 128)
        results.append(model.backend.to_numpy(model.logits(model.forward(step))).astype(np.float64))
    got, want = results
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
