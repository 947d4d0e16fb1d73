"""Writing files so that a half never looks whole: under a name of one's own, on the disk, then
renamed; one writer at a time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dsv4_core.files.reading import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def whole(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; once all is written and on the disk, it becomes
    ``path``.

    ``mode``: the permissions of the file, less what the user's mask takes away.

    After an error nothing is left, and what was at ``path`` stands as it was. Raises ``FileError``
    where ``path`` is a directory or something that cannot be replaced (a device, a pipe).
    """
    if path.exists() and not path.is_file():
        raise FileError(f"{path}: not a regular file; it cannot be written over")
    with named(path):
        yield from _whole(path, mode)


def _whole(path: Path, mode: int) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0)
    os.umask(mask)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode & ~mask)
            yield file
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    settle(path.parent)


def write(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a whole file, or leave what was there."""
    with whole(path, mode) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_over(path: Path, content: str | bytes, alike: int = 8) -> None:
    """Write a whole file under a name that a user gave, where nothing lies but an earlier one of
    its kind, which begins with the same ``alike`` bytes. A link stays, and what it leads to is
    written.
    """
    path = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    replaceable(path, data[:alike])
    write(path, data)


def replaceable(path: Path, begins: bytes) -> None:
    """Raise ``FileError`` where a file lies that begins otherwise than what is to be written: it is
    of another kind, perhaps a model's, and a slip of the tongue must not destroy it.
    """
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        if file.read(len(begins)) != begins:
            raise FileError(f"{path}: a file of another kind lies there, and is not replaced; give another name")


def free_bytes(path: Path) -> int:
    """Give the bytes that are free on the disk where ``path``, which need not exist, is or will
    be.
    """
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Name ``path`` in an error of the system that names no file: a full disk, a lost one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def settle(directory: Path) -> None:
    """Have the disk keep the names in a directory: what was renamed stays renamed after a power
    cut.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no such call for directories
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing_alone(directory: Path) -> Iterator[None]:
    """Keep other processes from writing ``directory`` (which need not exist) meanwhile.

    The lock is a file beside it, held by the system: it is free as soon as its process is gone,
    however that ended. Raises ``FileError`` naming the process that holds it.
    """
    import fcntl

    place = directory.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(place.parent)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "?"
            os.close(descriptor)
            raise FileError(f"{directory}: process {holder} is writing it; wait until it has ended") from None
        if lock.exists() and os.fstat(descriptor).st_ino == lock.stat().st_ino:
            break
        os.close(descriptor)  # whoever held it has ended and taken the file away
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)
