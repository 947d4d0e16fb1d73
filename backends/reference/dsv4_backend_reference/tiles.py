"""Fixed tiles: the same bits for a token whatever else is in the batch.

BLAS picks a kernel, and with it an order of summation, by the number of rows, and goes through a
product's rows with several of them; pairwise sums split by length. Here every product is done so
many rows at a time as this BLAS gives the same bits in every place, padded with zeros, and every
sum that may be padded runs over ``TERMS`` terms at a time, one group after another: zeros at the
end change nothing.
"""

from __future__ import annotations

import functools

import numpy as np

from dsv4_core.contract.dtypes import Host

TERMS = 128


@functools.cache
def tile_rows(dtype: np.dtype[np.floating]) -> int:
    """How many rows of a product get the same bits wherever a row stands among them: tried out, on
    shapes of every kind.

    16 with OpenBLAS's kernels for AVX-512; 8 with those for AVX2, which from 12 rows on take 6 at a
    time.
    """
    rng = np.random.default_rng(0)
    shapes = [(k, n) for k in (32, 96, 128, 512, 1024) for n in (1, 4, 16, 24, 100, 512)]

    def alike(rows: int, k: int, n: int) -> bool:
        tile, right = np.tile(rng.random(k).astype(dtype), (1, rows, 1)), rng.random((k, n)).astype(dtype)
        products = np.matmul(tile, right), np.matmul(tile, np.asfortranarray(right))
        return all((y == y[:, :1]).all() for y in products)

    return next((rows for rows in (16, 8, 4, 2) if all(alike(rows, k, n) for k, n in shapes)), 1)


def padded(x: Host, axis: int, multiple: int, fill: float = 0) -> Host:
    """``x`` with ``axis`` filled up to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return np.pad(x, widths, constant_values=fill)


def product(a: Host, b: Host) -> Host:
    """``a @ b`` for [m, k] and [k, n]: row i has the same bits for every m. Stacks of products of
    one shape (one a token) are so already.
    """
    if a.ndim > 2:
        return a @ b
    rows = tile_rows(a.dtype)
    tiles = padded(a, 0, rows).reshape(-1, rows, a.shape[1])
    return np.matmul(tiles, b).reshape(-1, b.shape[1])[: len(a)]


def long_product(a: Host, b: Host) -> Host:
    """``a @ b`` for stacks whose inner axis is a multiple of ``TERMS``: the same bits however many
    zeros end it.
    """
    y = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    for k in range(0, a.shape[-1], TERMS):  # a few hundred rows: 1 to 9 groups
        y += a[..., k : k + TERMS] @ b[..., k : k + TERMS, :]
    return y


def wide_product(a: Host, b: Host) -> Host:
    """``a @ b`` for stacks whose columns are a multiple of ``TERMS``: a column has the same bits
    however many follow it.
    """
    return np.concatenate([a @ b[..., n : n + TERMS] for n in range(0, b.shape[-1], TERMS)], axis=-1)


def long_sum(x: Host) -> Host:
    """Sum over the last axis, kept: the same bits however many zeros end it."""
    groups = padded(x, x.ndim - 1, TERMS).reshape(*x.shape[:-1], -1, TERMS)
    return np.cumsum(np.ascontiguousarray(groups).sum(-1), axis=-1)[..., -1:]


def compacted(idxs: Host) -> Host:
    """Indices [t, n] with each row's valid ones first, in their order, filled with -1 to a multiple
    of ``TERMS``.
    """
    order = np.argsort(idxs < 0, axis=1, kind="stable")
    return padded(np.take_along_axis(idxs, order, 1), 1, TERMS, fill=-1)
