"""Loads and stores of blocks of pointers. Triton's interpreter moves one element at a time, at 30
nanoseconds each. NumPy moves what it is told by index, of an array that is all memory, in a quarter
of that; and most large blocks are rows of elements that follow each other, which move whole.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

FEW = 128
"""Elements of a block up to which one at a time is no slower."""
ROWS = 8192
"""Elements of a block from which it pays to look for rows."""
ADDRESSES = 1 << 48
"""Bytes that a process may address."""


def load(
    pointers: np.ndarray,
    mask: np.ndarray | None,
    other: np.ndarray | None,
    dtype: np.dtype[Any],
    plain: Callable[..., Any],
) -> Any:
    """Elements at ``pointers`` [...] (addresses) where ``mask`` is set (None: everywhere), else
    ``other``'s (None: zeros); ``plain`` does the same one by one, and has no None.
    """
    if pointers.size <= FEW:
        return _one_by_one(pointers, mask, other, dtype, plain)
    found = _rows(pointers, mask, dtype.itemsize)
    if found is None:
        live = None if mask is None or mask.all() else mask
        at = _places(pointers if live is None else pointers[live], dtype.itemsize)
        if at is None:
            return _one_by_one(pointers, mask, other, dtype, plain)
        if live is None:
            return _memory(dtype)[at]
        out = np.zeros(pointers.shape, dtype) if other is None else np.array(other, dtype)
        out[live] = _memory(dtype)[at]
        return out
    turned, live, count, starts = found
    if live is None:
        windows, at = _windows(starts, count, dtype)
        return turned(windows[at])
    out = np.zeros(pointers.shape, dtype) if other is None else np.array(other, dtype)
    if live.any():
        windows, at = _windows(starts[live], count, dtype)
        turned(out)[live, :count] = windows[at]
    return out


def _one_by_one(
    pointers: np.ndarray, mask: np.ndarray | None, other: np.ndarray | None, dtype: Any, plain: Callable[..., Any]
) -> Any:
    mask = np.ones(pointers.shape, bool) if mask is None else mask
    return plain(pointers, mask, np.zeros(pointers.shape, dtype) if other is None else other, dtype)


def store(pointers: np.ndarray, value: np.ndarray, mask: np.ndarray | None, plain: Callable[..., Any]) -> None:
    """Put ``value`` at ``pointers`` where ``mask`` is set (None: everywhere), in order."""
    found = _rows(pointers, mask, value.itemsize) if pointers.size > FEW else None
    if found is None:
        at = None
        if pointers.size > FEW:
            at = _places(pointers if mask is None else pointers[mask], value.itemsize)
        if at is None:
            plain(pointers, value, np.ones(pointers.shape, bool) if mask is None else mask)
        else:
            _memory(value.dtype)[at] = value if mask is None else value[mask]
        return
    turned, live, count, starts = found
    if live is None:
        windows, at = _windows(starts, count, value.dtype)
        windows[at] = turned(value)
    elif live.any():
        windows, at = _windows(starts[live], count, value.dtype)
        windows[at] = turned(value)[live, :count]


@functools.cache
def _memory(dtype: np.dtype[Any]) -> np.ndarray:
    """All memory but its first element, as one array."""
    some = ADDRESSES // dtype.itemsize - 1
    return np.ndarray((some,), dtype, (ctypes.c_char * (some * dtype.itemsize)).from_address(dtype.itemsize))


def _places(pointers: np.ndarray, size: int) -> np.ndarray | None:
    """Where elements of ``size`` bytes lie in ``_memory``; None if one lies across two places."""
    if size > 1 and (pointers & np.uint64(size - 1)).any():
        return None
    return (pointers >> np.uint64(size.bit_length() - 1)).astype(np.intp) - 1


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _swapped(array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2)


def _rows(
    pointers: np.ndarray, mask: np.ndarray | None, size: int
) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray | None, int, np.ndarray] | None:
    """How a block lies in memory: which axis is last, which rows have elements (None: all have
    all), how many, the same in all of them and from the first on, and where they begin. None where
    it is not like that, or too small to tell.
    """
    if pointers.size < ROWS:
        return None
    for turned in (_same, _swapped)[: pointers.ndim]:
        across = turned(pointers)
        if across.shape[-1] >= 8 and across.ndim > 1 and _follow(across, size):
            if mask is None or mask.all():
                return turned, None, across.shape[-1], across[..., 0]
            inside = turned(mask)
            live = inside[..., 0]
            counts = inside.sum(-1)
            count = int(counts.max(initial=0))
            whole = np.array_equal(counts, np.where(live, count, 0)) and bool(inside[..., :count].all(-1)[live].all())
            return (turned, live, count, across[..., 0]) if whole else None
    return None


def _follow(pointers: np.ndarray, size: int) -> bool:
    """Whether the last axis goes through memory element by element."""
    corner = pointers[(0,) * (pointers.ndim - 1)]
    if int(corner[1]) - int(corner[0]) != size:
        return False
    return bool((pointers[..., 1:] - pointers[..., :-1] == np.uint64(size)).all())


def _windows(starts: np.ndarray, count: int, dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Memory as windows [n, count], one from each element on, and which window begins at each of
    ``starts``.
    """
    low, high = int(starts.min()), int(starts.max())
    size = dtype.itemsize
    offsets = starts - np.uint64(low)
    step = size if not (offsets % np.uint64(size)).any() else 1
    memory = (ctypes.c_char * (high - low + count * size)).from_address(low)
    windows = np.ndarray(((high - low) // step + 1, count), dtype, memory, strides=(step, size))
    return windows, (offsets // np.uint64(step)).astype(np.intp)
