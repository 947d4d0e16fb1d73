"""One safetensors file: its header read and checked, its tensors as views of the mapped file.

The format is 8 bytes of header length, a JSON header, then the tensors' bytes one after the other.
The safetensors library's own NumPy reader has no FP8 and FP4 types, so this reads the header
itself. Source: the format's description.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from dsv4_core.contract.dtypes import BFLOAT16, Host
from dsv4_core.files import forms
from dsv4_core.files.mapped import Mapped, of
from dsv4_core.files.mistaken import mistaken
from dsv4_core.files.reading import FileError, json_text, opened, pread, regular
from dsv4_core.files.words import one_line, printable

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
        for name, kind in (
            *(("F64", "f8"), ("F32", "f4"), ("F16", "f2"), ("I64", "i8"), ("I32", "i4"), ("I16", "i2")),
            *(("U32", "u4"), ("U16", "u2")),
        )
    },
    **dict.fromkeys(("F8_E4M3", "F8_E8M0", "F4", "I8", "U8"), _BYTES),
    "BF16": BFLOAT16,
}
MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones, too


class ShardError(ValueError):
    """A file that is not a whole safetensors file; the message names what was found and what was
    expected.
    """


class Stored(NamedTuple):
    """A tensor in a file: safetensors' dtype name, the shape it states, and its bytes' place from
    the file's start.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shard:
    """A safetensors file. Opening reads the header alone; the file is mapped when a tensor is first
    asked for.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header of ``path``; raise ``ShardError`` for a truncated or corrupt
        file.
        """
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.entries = self._read()
        self._map: Mapped | None = None

    def array(self, name: str) -> Host:
        """View a tensor, read-only: BF16 as ml_dtypes' bfloat16; E4M3, E8M0, FP4 as uint8, FP4 in
        its packed shape.
        """
        stored = self.entries.get(name)
        if stored is None or stored.dtype not in VIEWS:
            has = f"is {stored.dtype}, which nothing here reads" if stored else "is not there"
            raise ShardError(f"{self.path}: tensor {one_line(name, 120)} {has}; is this the right file?")
        shape = (*stored.shape[:-1], stored.shape[-1] // 2) if stored.dtype == "F4" else stored.shape
        if self._map is None:
            self._map = Mapped(self.path, self.stamp)
        count = math.prod(shape)
        if not count:  # frombuffer has no empty views
            return np.empty(shape, VIEWS[stored.dtype])
        array = np.frombuffer(self._map.pages, VIEWS[stored.dtype], count, stored.begin).reshape(shape)
        return np.require(
            array, requirements="A"
        )  # a header of odd length leaves wider types unaligned: those are copied

    def changed(self) -> bool:
        """Whether the file is no longer the one whose header was read (``files.mapped``)."""
        try:
            return of(self.path.stat()) != self.stamp
        except OSError:
            return True

    def release(self) -> None:
        """Give back the pages of the file that are in memory; they are read again when they are
        used again.
        """
        if self._map is not None:
            self._map.release()

    def _read(self) -> dict[str, Stored]:
        size = regular(self.path)
        with opened(self.path) as descriptor:
            if what := mistaken(pread(descriptor, min(size, 64), 0, self.path)):
                raise ShardError(what)
            length = int.from_bytes(pread(descriptor, 8, 0, self.path), "little") if size >= 8 else 0
            if size < 8 or length > size - 8:
                stated = f"a header of {length} bytes" if size >= 8 else "8 bytes of header length"
                raise ShardError(f"truncated: the file needs {stated} and has {size} bytes in all; copy it again")
            if length > MAX_HEADER:
                raise ShardError(
                    f"corrupt header: its length {length} is over {MAX_HEADER}; is this a safetensors file?"
                )
            text = pread(descriptor, length, 8, self.path)
            self.stamp = of(os.fstat(descriptor))
        self.begin = 8 + length
        self.size = size
        entries = self._entries(text)
        end = self._check(entries, self.begin)
        if end != size:
            problem = "truncated" if size < end else "longer than its header says"
            raise ShardError(f"{problem}: the header says {end} bytes, the file has {size}; copy it again")
        return entries

    def _entries(self, text: bytes) -> dict[str, Stored]:
        try:
            header = json_text(text, dict[str, msgspec.Raw], "corrupt header", "copy the file again")
            metadata = header.pop("__metadata__", msgspec.Raw(b"{}"))
            self.metadata = json_text(bytes(metadata), dict[str, str], "corrupt header: __metadata__", "copy it again")
            entries = {}
            for name, raw in header.items():
                try:
                    tensor = msgspec.json.decode(raw, type=forms.Tensor)
                except (msgspec.MsgspecError, UnicodeDecodeError):  # said in words, with the tensor's name
                    json_text(
                        bytes(raw), forms.Tensor, f"corrupt header: tensor {one_line(name, 120)}", "copy it again"
                    )
                    raise
                if printable(name) != name or "\n" in name or "\t" in name:
                    raise ShardError(f"corrupt header: a tensor's name has control characters: {one_line(name, 120)}")
                begin, end = tensor.data_offsets
                entries[name] = Stored(tensor.dtype, tuple(tensor.shape), self.begin + begin, self.begin + end)
        except FileError as error:
            raise ShardError(str(error)) from None
        return entries

    @staticmethod
    def _check(entries: dict[str, Stored], at: int) -> int:
        """Hold every tensor to its dtype and shape, and all of them to following each other; give
        the file's length.
        """
        for name, stored in sorted(entries.items(), key=lambda item: item[1][2:]):
            dtype, shape, begin, end = stored
            if dtype not in BITS:
                raise ShardError(
                    f"tensor {name} has dtype {dtype!r}, which dsv4 does not read (it reads {', '.join(BITS)}); use the "
                    "published checkpoint"
                )
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
