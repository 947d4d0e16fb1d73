"""Mapped files that change under us.

A page past the end of a file that became shorter raises the signal SIGBUS where it is read. A
handler says which file it was and ends the process with a status of its own; it costs nothing until
then. A file that was written over in place shows in its stamp, which is looked at when loading and
when a run ends; one that was replaced (renamed over) stays as it was mapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import weakref
from typing import TYPE_CHECKING

from dsv4_core.files.reading import FileError, opened
from dsv4_core.files.words import printable

if TYPE_CHECKING:
    from pathlib import Path

SHORTER = 74  # status of a process whose mapped file became shorter: EX_IOERR
_open: weakref.WeakSet[Mapped] = weakref.WeakSet()


class Mapped:
    """A regular file mapped for reading, as it was when its header was read; ``stamp`` says when
    that was.
    """

    def __init__(self, path: Path, stamp: tuple[int, ...]) -> None:
        """Raise ``FileError`` where the file is another one by now."""
        self.path, self.stamp = path, stamp
        with opened(path) as descriptor:
            if of(os.fstat(descriptor)) != stamp:
                raise FileError(f"{path}: changed since its header was read; start again once nobody writes it")
            self.pages = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        watch()
        _open.add(self)

    def release(self) -> None:
        """Give back the pages that are in memory; they are read again when they are used again."""
        self.pages.madvise(mmap.MADV_DONTNEED)
        with opened(self.path) as descriptor:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def of(status: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size and time of the last write, in ns: what tells a file from another at the
    same path.
    """
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _ended(number: int) -> None:
    """Name the file that became shorter and end; any other cause ends as it would have."""
    for file in list(_open):
        try:
            size: object = file.path.stat().st_size
        except OSError:
            size = "no file"
        if size != file.stamp[2]:
            text = f"{file.path}: became shorter while it was read ({size} of {file.stamp[2]} bytes); copy it again"
            os.write(2, f"dsv4: {printable(text)}\n".encode())
            os._exit(SHORTER)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_ended)
_watching = threading.Event()


def watch() -> None:
    """Set the handler, once. It is one of the C library: Python's own only run once the faulting
    read has returned.

    It may do what a handler usually may not (allocate, take Python's lock), because the signal
    comes from the very instruction that reads a weight, never from inside the allocator or the
    interpreter.
    """
    if not _watching.is_set():
        _watching.set()
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGBUS), _handler)
