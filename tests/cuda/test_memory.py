"""Rows that move whole are what one element at a time gives; anything else goes the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from dsv4_backend_torch import memory
from triton._C.libtriton import interpreter as one_by_one

RNG = np.random.default_rng(0)


def block(dtype, *, swapped, step, programs=3, rows=40, count=24):
    """Memory, and pointers [programs, rows, count] to rows in it; ``step``: elements from one to
    the next of a row.
    """
    buffer = RNG.integers(0, 255, 1 << 16, np.uint8).view(dtype)
    first = RNG.permutation(len(buffer) // 64)[: programs * rows].reshape(programs, rows, 1) * 64 % (len(buffer) - 128)
    at = first + np.arange(count) * step
    pointers = np.uint64(buffer.ctypes.data) + at.astype(np.uint64) * np.uint64(buffer.itemsize)
    return buffer, np.swapaxes(pointers, 1, 2) if swapped else pointers


MASKS = {
    "whole": lambda shape: np.ones(shape, bool),
    "rows": lambda shape: np.broadcast_to(RNG.random(shape[:-1])[..., None] < 0.5, shape),
    "tail": lambda shape: np.broadcast_to(np.arange(shape[-1]) < shape[-1] - 7, shape),
    "rows and tail": lambda shape: (RNG.random(shape[:-1])[..., None] < 0.5) & (np.arange(shape[-1]) < shape[-1] - 5),
    "scattered": lambda shape: RNG.random(shape) < 0.7,
    "behind a gap": lambda shape: np.broadcast_to(np.arange(shape[-1]) > 3, shape),
    "tails": lambda shape: np.arange(shape[-1]) < RNG.integers(0, shape[-1], shape[:-1])[..., None],
    "none": lambda shape: np.zeros(shape, bool),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", MASKS)
def test_as_one_by_one(dtype, swapped, step, name):
    buffer, pointers = block(dtype, swapped=swapped, step=step)
    mask = MASKS[name](pointers.shape)
    wild = np.where(mask, pointers, np.uint64(0x10))  # what is masked out may point anywhere
    for given in (pointers, wild):
        other = np.full(pointers.shape, 7, dtype)
        got = memory.load(given, mask, other, np.dtype(dtype), one_by_one.load)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, one_by_one.load(given, mask, other, np.dtype(dtype)))
        value = RNG.integers(0, 200, pointers.shape).astype(dtype)
        before = buffer.copy()
        memory.store(given, value, mask, one_by_one.store)
        after = buffer.copy()
        buffer[:] = before
        one_by_one.store(given, value, mask)
        np.testing.assert_array_equal(after, buffer)
        buffer[:] = before


def test_rows_over_each_other_keep_their_order():
    buffer = np.zeros(4096, np.uint16)
    at = np.arange(60)[:, None] * 3 + np.arange(16)
    pointers = np.uint64(buffer.ctypes.data) + at.astype(np.uint64) * np.uint64(2)
    value = RNG.integers(0, 60000, at.shape).astype(np.uint16)
    want = buffer.copy()
    for row, values in zip(at, value, strict=True):
        want[row] = values
    memory.store(pointers, value, np.ones(at.shape, bool), None)
    np.testing.assert_array_equal(buffer, want)


def test_rows_go_the_fast_way():
    _, pointers = block(np.uint16, swapped=False, step=1)
    memory.load(pointers, np.ones(pointers.shape, bool), np.zeros(pointers.shape, np.uint16), np.dtype(np.uint16), None)
