"""Which checkpoint this is: a hash of its content, so that copies, ranks, traces and resumed runs
of two models never mix.

The identity covers ``config.json``, and of every shard its name, size, header and bytes: all of
them up to ``WHOLE`` bytes, else the start of every tensor that is not a routed expert's, and
``BLOCKS`` blocks evenly over the file. A change of a few bytes elsewhere in a large shard is found
by ``whole=True`` alone, which reads everything.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from dsv4_core.files.reading import contents, opened, pread, regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

WHOLE = 16 << 20  # bytes of a shard that are hashed without choosing: a hundredth of a second
BLOCKS, BLOCK = 256, 4096  # of a larger shard: with the usual 4 GB, a block every 16 MB
LENGTH = 32  # hexadecimal digits that are kept: 128 bits


def of_checkpoint(directory: Path, begins: Mapping[Path, Iterable[int]], *, whole: bool = False) -> str:
    """Hash ``config.json`` and every shard of a directory; ``begins``: of each where its samples
    begin beside the even ones.
    """
    digest = hashlib.sha256(contents(directory / "config.json"))
    for path, starts in sorted(begins.items()):
        digest.update(f"{path.name} {of_file(path, starts, whole=whole)}".encode())
    return digest.hexdigest()[:LENGTH]


def of_file(path: Path, begins: Iterable[int] = (), *, whole: bool = False) -> str:
    """Hash a shard: size, header, and all of its bytes or samples, those that begin at ``begins``
    among them.
    """
    size = regular(path)
    digest = hashlib.sha256(str(size).encode())
    with opened(path) as descriptor:
        if whole or size <= WHOLE:
            for at in range(0, size, 1 << 22):
                digest.update(pread(descriptor, min(1 << 22, size - at), at, path))
            return digest.hexdigest()[:LENGTH]
        header = min(8 + int.from_bytes(pread(descriptor, 8, 0, path), "little"), size)
        digest.update(pread(descriptor, header, 0, path))
        even = (header + (size - header - BLOCK) * i // (BLOCKS - 1) for i in range(BLOCKS))
        if hasattr(os, "posix_fadvise"):  # reading ahead would read most of the file
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for at in sorted({*even, *begins}):
            digest.update(pread(descriptor, max(0, min(BLOCK, size - at)), at, path))
    return digest.hexdigest()[:LENGTH]
