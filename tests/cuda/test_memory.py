"""Rows that move whole, and elements by index, are what one element at a time gives; anything else
goes the plain way.
"""

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
@pytest.mark.parametrize("rows", [True, False])
def test_as_one_by_one(monkeypatch, dtype, swapped, step, name, rows):
    monkeypatch.setattr(memory, "ROWS", 0 if rows else 1 << 20)
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


@pytest.mark.parametrize("rows", [True, False])
def test_rows_over_each_other_keep_their_order(monkeypatch, rows):
    monkeypatch.setattr(memory, "ROWS", 0 if rows else 1 << 20)
    buffer = np.zeros(4096, np.uint16)
    at = np.arange(60)[:, None] * 3 + np.arange(16)
    pointers = np.uint64(buffer.ctypes.data) + at.astype(np.uint64) * np.uint64(2)
    value = RNG.integers(0, 60000, at.shape).astype(np.uint16)
    want = buffer.copy()
    for row, values in zip(at, value, strict=True):
        want[row] = values
    memory.store(pointers, value, np.ones(at.shape, bool), None)
    np.testing.assert_array_equal(buffer, want)


@pytest.mark.parametrize("rows", [True, False])
def test_a_block_goes_the_fast_way(monkeypatch, rows):
    monkeypatch.setattr(memory, "ROWS", 0 if rows else 1 << 20)
    _, pointers = block(np.uint16, swapped=False, step=1)
    memory.load(pointers, np.ones(pointers.shape, bool), np.zeros(pointers.shape, np.uint16), np.dtype(np.uint16), None)


def test_elements_between_two_places_go_the_plain_way():
    """A BF16 array over bytes may begin at an odd address."""
    bytes_ = RNG.integers(0, 255, 4097, np.uint8)
    pointers = np.uint64(bytes_.ctypes.data + 1) + 2 * RNG.permutation(2048).reshape(16, 128).astype(np.uint64)
    mask, other = np.ones(pointers.shape, bool), np.zeros(pointers.shape, np.uint16)
    got = memory.load(pointers, mask, other, np.dtype(np.uint16), one_by_one.load)
    np.testing.assert_array_equal(got, one_by_one.load(pointers, mask, other, np.dtype(np.uint16)))
    memory.store(pointers, np.arange(2048, dtype=np.uint16).reshape(16, 128), mask, one_by_one.store)
    back = memory.load(pointers, mask, other, np.dtype(np.uint16), one_by_one.load)
    np.testing.assert_array_equal(back, np.arange(2048).reshape(16, 128))
