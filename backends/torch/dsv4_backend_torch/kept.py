"""Where the compiled C kernels are kept: built once with the compiler that is there, and loaded only where they are sound.

What is loaded runs in this process, so the folder must be the user's own and closed to others, and the file what its hash beside it
says. Anything else is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shlex
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4_core.files.writing import write

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).parent / "c"
FLAGS = ("-O3", "-march=native", "-pthread", "-fPIC", "-shared")
PATIENCE = 60  # seconds: a compiler that takes longer hangs; this one takes five


class NotCompiledError(Exception):
    """Why the kernels cannot be built or loaded here, and what to do."""


def run(command: list[str]) -> str:
    """Run a compiler; give what it prints. Raises ``NotCompiledError``."""
    try:
        done = subprocess.run(  # noqa: S603  the user's own compiler
            command, capture_output=True, text=True, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise NotCompiledError(f"no C compiler {command[0]!r}: install one (gcc), or name it in CC") from None
    except OSError as error:
        raise NotCompiledError(
            f"C compiler {command[0]!r} does not start: {error.strerror}; name another in CC"
        ) from None
    except subprocess.TimeoutExpired:
        raise NotCompiledError(
            f"{command[0]} was ended after {PATIENCE} s on c/*.c; name another compiler in CC"
        ) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[0]
        raise NotCompiledError(f"{command[0]} does not build c/*.c: {said}; name another compiler in CC") from None
    return done.stdout


def compiler() -> list[str]:
    """The command of the C compiler, of CC or ``cc``; raise ``NotCompiledError`` where CC is no command."""
    given = os.environ.get("CC") or "cc"
    try:
        return shlex.split(given)
    except ValueError as error:
        raise NotCompiledError(f"CC={given!r} is no command: {error}; name a C compiler in CC") from None


def folder() -> Path:
    """The user's own folder for compiled kernels, closed to others; made where it is missing. Raises ``NotCompiledError``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"  # a relative one is to be ignored
        path = base / "dsv4"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotCompiledError(f"{path} is no folder (a link is not followed); remove it, or set XDG_CACHE_HOME")
        if found.st_uid != os.geteuid():
            raise NotCompiledError(
                f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()}); remove it, or set XDG_CACHE_HOME to a folder of your own"
            )
        if stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise NotCompiledError(
            f"C kernels cannot be kept: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return path


def sound(path: Path) -> bool:
    """Say whether a kept library is the user's own file, written by nobody else, and what the hash beside it says."""
    try:
        said = _content(path.with_suffix(".sha256"))
        return hashlib.sha256(_content(path)).hexdigest().encode() == said.strip()
    except OSError:
        return False


def _content(path: Path) -> bytes:
    """A plain file of the user's; raise ``OSError`` for a link, another's, or one that others may write."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{path} is not a file of yours alone")
        return file.read()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait and find what it made."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@functools.cache
def library() -> tuple[Path, str]:
    """The kernels for this CPU, and the compiler that made them; raise ``NotCompiledError`` where there are none."""
    command = compiler()
    target = run([*command, "-march=native", "-dM", "-E", "-x", "c", os.devnull])  # its version, every instruction set
    version = next((line for line in target.splitlines() if " __VERSION__ " in line), '""').split('"')[1]
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256("\0".join([target, *FLAGS]).encode() + b"".join(source.read_bytes() for source in sources))
    path = folder() / f"torch-backend-{key.hexdigest()[:16]}.so"
    try:
        with _locked(path.with_suffix(".lock")):
            if not sound(path):
                with tempfile.TemporaryDirectory(dir=path.parent) as own:
                    made = Path(own) / path.name
                    run([*command, *FLAGS, *map(str, (s for s in sources if s.suffix == ".c")), "-lm", "-o", str(made)])
                    content = made.read_bytes()
                path.with_suffix(".sha256").unlink(missing_ok=True)
                write(path, content, 0o600)
                write(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest(), 0o600)
    except OSError as error:
        raise NotCompiledError(
            f"C kernels cannot be kept: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return path, f"{command[0]} {version}"
