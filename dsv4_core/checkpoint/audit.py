"""What only the bytes can tell: dead scales, NaN, experts that do not exist, parts of files that
were never written.

Every one of these has shipped in a published or converted checkpoint of this family, and none
raises while loading. Files are read once, in order, through one buffer; packed FP4 is not read,
because each of its bytes is a valid pair.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.checkpoint.findings import Finding
from dsv4_core.checkpoint.tensors import Progress
from dsv4_core.checkpoint.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dsv4_core.checkpoint.shards import Stored
    from dsv4_core.contract.dtypes import Host

BUFFER = 8 << 20  # bytes read at a time: masks and comparisons of it stay near the cache


def audit(checkpoint: Checkpoint, *, progress: Progress | None = None) -> list[Finding]:
    """Give what opening found (``checkpoint.findings``), then what reading every value finds;
    ``progress`` counts bytes.

    Rules: hole, scale all zero, scale byte 0 (a note), scale byte 255, NaN or infinity; where
    opening found a tensor wrong, no more is said of it.
    """
    findings = list(checkpoint.findings)
    known = {finding.tensor for finding in checkpoint.errors}
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in checkpoint.names:
        by_file[checkpoint.file(name)].append(name)
    done, total = 0, checkpoint.nbytes
    for path, names in by_file.items():
        holes = list(_holes(path))
        with path.open("rb", buffering=0) as file:
            for name in sorted(names, key=lambda name: checkpoint.stored(name).begin):
                stored = checkpoint.stored(name)
                missing = sum(max(0, min(stored.end, end) - max(stored.begin, begin)) for begin, end in holes)
                if missing:
                    text = (
                        f"{missing} of {stored.end - stored.begin} bytes are a hole: never written, they read as zero; "
                        "fetch the file again (or, if zeros are meant, copy it with `cp --sparse=never`)"
                    )
                    findings.append(Finding("hole", name, path.name, text))
                elif name not in known:
                    for rule, text, note in _judge(name, stored, file.fileno(), checkpoint):
                        findings.append(Finding(rule, name, path.name, text, "note" if note else "error"))
                done += stored.end - stored.begin
                if progress:
                    progress(done, total)
    return findings


def _judge(name: str, stored: Stored, fd: int, checkpoint: Checkpoint) -> Iterator[tuple[str, str, bool]]:
    """Give (rule, sentence, whether it is only a note) for what the values of one tensor break."""
    count, dtype = math.prod(stored.shape), checkpoint.value_dtype(name)
    if dtype == "F8_E8M0":
        if (nan := _Count(lambda x: x == 255)).over(fd, stored, "u1"):
            yield (
                "scale byte 255",
                f"{nan.said(count, 'scale bytes')} 255, which is NaN; requantise {_weight(name)}",
                False,
            )
        if (zero := _Count(lambda x: x == 0)).over(fd, stored, "u1") == count:
            text = f"all {count} scale bytes are 0, which is 2^-127: nothing is left of {_weight(name)}; fetch it again"
            yield "scale all zero", text, False
        elif zero.found:
            yield "scale byte 0", f"{zero.said(count, 'scale bytes')} 0, which is 2^-127", True
    elif dtype in _NOT_FINITE:
        unsigned, is_bad, what = _NOT_FINITE[dtype]
        if (bad := _Count(is_bad)).over(fd, stored, unsigned):
            yield "NaN or infinity", f"{bad.said(count, 'values')} {what}; fetch it again", False


_NOT_FINITE: dict[str, tuple[str, Callable[[Host], Host], str]] = {
    "F8_E4M3": ("u1", lambda x: (x & 0x7F) == 0x7F, "NaN (codes 0x7f, 0xff)"),
    "BF16": ("<u2", lambda x: (x & 0x7F80) == 0x7F80, "NaN or infinite"),
    "F32": ("<u4", lambda x: (x & 0x7F800000) == 0x7F800000, "NaN or infinite"),
}  # dtype: the unsigned integer of its width, which of these are meant, and what they are


class _Count:
    """How many elements of a tensor a predicate holds for, and where the first one is."""

    def __init__(self, holds: Callable[[Host], Host]) -> None:
        self.holds = holds
        self.found, self.first = 0, 0
        self.shape: tuple[int, ...] = ()

    def over(self, fd: int, stored: Stored, dtype: str) -> int:
        """Count over a tensor's bytes, buffer by buffer."""
        self.shape = stored.shape
        size = np.dtype(dtype).itemsize
        for at in range(stored.begin, stored.end, BUFFER):
            values = np.frombuffer(os.pread(fd, min(BUFFER, stored.end - at), at), dtype)
            which = self.holds(values)
            found = int(np.count_nonzero(which))
            if found and not self.found:
                self.first = (at - stored.begin) // size + int(which.argmax())
            self.found += found
        return self.found

    def said(self, count: int, what: str) -> str:
        """Start of a sentence: how many of how many, and where."""
        at = [int(i) for i in np.unravel_index(self.first, self.shape)]
        return f"{self.found} of {count} {what} (first at {at}) {'is' if self.found == 1 else 'are'}"


def _weight(scale: str) -> str:
    return f"{scale.removesuffix('scale')}weight"


def _holes(path: Path) -> Iterator[tuple[int, int]]:
    """Give the ranges of a sparse file that were never written; none where the system cannot
    tell.
    """
    size = path.stat().st_size
    if not hasattr(os, "SEEK_HOLE"):
        return
    with path.open("rb") as file:
        at = 0
        while at < size:
            begin = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            if begin >= size:  # the end of a file counts as a hole
                return
            try:
                at = os.lseek(file.fileno(), begin, os.SEEK_DATA)
            except OSError:  # no data after the hole
                at = size
            yield begin, at
