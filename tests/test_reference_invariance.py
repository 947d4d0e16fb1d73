"""Batch-invariant bits of the reference hold along every axis that a batch stretches, columns too:
BLAS has other kernels for few columns than for many.
"""

import numpy as np
import pytest

from dsv4_core.contract import registry

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["native", "float64"])
def backend(request):
    return registry.create("reference", numerics=request.param, batch_invariant=True)


def drawn(backend, *shape):
    return RNG.normal(size=shape).astype(backend.to_numpy(backend.zeros((1,), backend.activation_dtype)).dtype)


@pytest.mark.parametrize("dim", [32, 128])
def test_a_key_scores_the_same_however_many_follow(backend, dim):
    q, keys = drawn(backend, 1, 2, 4, dim), drawn(backend, 1, 400, dim)
    weights = RNG.normal(size=(1, 2, 4)).astype(backend.wide_dtype)
    all_of_them = backend.index_scores(q, weights, keys, scale=0.1)
    for rows in (1, 15, 16, 17, 64, 65, 80, 127, 128, 129, 256, 399):
        some = backend.index_scores(q, weights, keys[:, :rows], scale=0.1)
        np.testing.assert_array_equal(some, all_of_them[:, :, :rows], err_msg=f"{rows} keys")


@pytest.mark.parametrize("dim", [64, 192])
def test_a_token_attends_the_same_however_many_columns_are_empty(backend, dim):
    q, kv = drawn(backend, 3, 8, dim), drawn(backend, 500, dim)
    sink, few = RNG.normal(size=8).astype(np.float32), np.array([[4, 2, 9, -1]] * 3, np.int32)
    alone = backend.sparse_attn(q, kv, sink, few, softmax_scale=0.1)
    for columns in (5, 127, 128, 129, 131, 256, 300, 700):
        many = np.full((3, columns), -1, np.int32)
        many[:, :3] = few[:, :3]
        np.testing.assert_array_equal(backend.sparse_attn(q, kv, sink, many, softmax_scale=0.1), alone)
