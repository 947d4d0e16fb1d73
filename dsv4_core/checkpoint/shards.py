"""One safetensors file: its header read and checked, its tensors as views of the mapped file.

The format is 8 bytes of header length, a JSON header, then the tensors' bytes one after the other. The safetensors
library's own NumPy reader has no FP8 and FP4 types, so this reads the header itself. Source: the format's description.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsv4_core.contract.dtypes import BFLOAT16, Host

if TYPE_CHECKING:
    from pathlib import Path

BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
_BYTES = np.dtype(np.uint8)  # quantised data is bytes: codes, packed pairs and E8M0 exponents alike
VIEWS: dict[str, np.dtype[Any]] = {
    **{
        name: np.dtype(kind)
        for name, kind in (("F64", "f8"), ("F32", "f4"), ("F16", "f2"), ("I64", "i8"), ("I32", "i4"))
    },
    **dict.fromkeys(("F8_E4M3", "F8_E8M0", "F4", "I8", "U8"), _BYTES),
    "BF16": BFLOAT16,
}
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones, too


class ShardError(ValueError):
    """A file that is not a whole safetensors file; the message names what was found and what was expected."""


class Stored(NamedTuple):
    """A tensor in a file: safetensors' dtype name, the shape it states, and its bytes' place from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """A safetensors file. Opening reads the header alone; the file is mapped when a tensor is first asked for."""

    def __init__(self, path: Path) -> None:
        """Read and check the header of ``path``; raise ``ShardError`` for a truncated or corrupt file."""
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.entries = self._read()
        self._map: mmap.mmap | None = None

    def array(self, name: str) -> Host:
        """View a tensor, read-only: BF16 as ml_dtypes' bfloat16; E4M3, E8M0, FP4 as uint8, FP4 in its packed shape."""
        stored = self.entries[name]
        shape = (*stored.shape[:-1], stored.shape[-1] // 2) if stored.dtype == "F4" else stored.shape
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = math.prod(shape)
        if not count:  # frombuffer has no empty views
            return np.empty(shape, VIEWS[stored.dtype])
        array = np.frombuffer(self._map, VIEWS[stored.dtype], count, stored.begin).reshape(shape)
        return np.require(
            array, requirements="A"
        )  # a header of odd length leaves wider types unaligned: those are copied

    def release(self) -> None:
        """Give back the pages of the file that are in memory; they are read again when they are used again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _read(self) -> dict[str, Stored]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                stated = f"a header of {length} bytes" if size >= 8 else "8 bytes of header length"
                raise ShardError(f"truncated: the file needs {stated} and has {size} bytes in all; copy it again")
            if length > MAX_HEADER:
                raise ShardError(
                    f"corrupt header: its length {length} is over {MAX_HEADER}; is this a safetensors file?"
                )
            text = file.read(length)
        self.begin = 8 + length
        try:
            header = json.loads(text)
            self.metadata = header.pop("__metadata__", {})
            entries = {
                name: Stored(
                    entry["dtype"],
                    tuple(entry["shape"]),
                    self.begin + entry["data_offsets"][0],
                    self.begin + entry["data_offsets"][1],
                )
                for name, entry in header.items()
            }
            end = self._check(entries, self.begin)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ShardError(f"corrupt header: not JSON ({error}); copy the file again") from None
        except (TypeError, KeyError, IndexError, AttributeError):
            expected = "a JSON object of tensors, each with dtype, shape and data_offsets"
            raise ShardError(f"corrupt header: not {expected}; copy the file again") from None
        if end != size:
            problem = "truncated" if size < end else "longer than its header says"
            raise ShardError(f"{problem}: the header says {end} bytes, the file has {size}; copy it again")
        return entries

    @staticmethod
    def _check(entries: dict[str, Stored], at: int) -> int:
        """Hold every tensor to its dtype and shape, and all of them to following each other; give the file's length."""
        for name, stored in sorted(entries.items(), key=lambda item: item[1][2:]):
            dtype, shape, begin, end = stored
            if dtype not in BITS:
                raise ShardError(f"corrupt header: tensor {name} has dtype {dtype!r}, not one of {', '.join(BITS)}")
            if 8 * (end - begin) != math.prod(shape) * BITS[dtype] or min(shape, default=0) < 0:
                raise ShardError(
                    f"corrupt header: tensor {name}, {dtype} {list(shape)}, does not fill its {end - begin} bytes"
                )
            if begin != at:
                raise ShardError(
                    f"corrupt header: tensor {name} begins at byte {begin}; the one before it ends at {at}"
                )
            at = end
        return at
