"""Where the compiled C kernels are: carried by the package for several kinds of CPU, or built once
with the compiler that is there.

A wheel carries a library for each of ``LEVELS`` (``python -m dsv4_backend_torch.kept DIR`` builds
them); the best that this CPU runs is taken. A source install builds one for this very CPU when it
is first needed. What is kept then runs in this process, so the folder must be the user's own and
closed to others, and the file what its hash beside it says. Anything else is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).parent / "c"
FLAGS = ("-O3", "-pthread", "-fPIC", "-shared", "-fvisibility=hidden")
"""Hidden: a name of ours (``compress``) must not be found in a library that the program has loaded
before (zlib).
"""
PATIENCE = 60  # seconds on an idle machine: a compiler that takes longer hangs; this one takes ten
CARRIED = Path(__file__).parent / "built"
_AVX2 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS: dict[str, tuple[tuple[str, ...], set[str]]] = {  # best first: a compiler's flags, and what /proc/cpuinfo must name
    "amx": (
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"),
        _AVX512 | {"avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16"},
    ),
    "avx512bf16": (("-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi"), _AVX512 | {"avx512_bf16", "avx512vbmi"}),
    "avx512": (("-march=x86-64-v4",), _AVX512),
    "avx2": (("-march=x86-64-v3",), _AVX2),
} if platform.machine() in {"x86_64", "AMD64"} else {"any": ((), set())}  # fmt: skip


class NotCompiledError(Exception):
    """Why the kernels cannot be built or loaded here, and what to do."""


def patience() -> float:
    """Seconds that a compiler gets: as much longer as more processes than cores run."""
    return PATIENCE * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def run(command: list[str]) -> str:
    """Run a compiler; give what it prints. Raises ``NotCompiledError``."""
    seconds = patience()
    try:
        done = subprocess.run(  # noqa: S603  the user's own compiler
            command, capture_output=True, text=True, check=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise NotCompiledError(f"no C compiler {command[0]!r}: install one (gcc), or name it in CC") from None
    except OSError as error:
        raise NotCompiledError(
            f"C compiler {command[0]!r} does not start: {error.strerror}; name another in CC"
        ) from None
    except subprocess.TimeoutExpired:
        raise NotCompiledError(
            f"{command[0]} was ended after {seconds:.3g} s on c/*.c; name another compiler in CC"
        ) from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip().splitlines() or ["nothing"])[0]
        raise NotCompiledError(f"{command[0]} does not build c/*.c: {said}; name another compiler in CC") from None
    return done.stdout


def compiler() -> list[str]:
    """The command of the C compiler, of CC or ``cc``; raise ``NotCompiledError`` where CC is no
    command.
    """
    given = os.environ.get("CC") or "cc"
    try:
        return shlex.split(given)
    except ValueError as error:
        raise NotCompiledError(f"CC={given!r} is no command: {error}; name a C compiler in CC") from None


def folder() -> Path:
    """The user's own folder for compiled kernels, closed to others; made where it is missing.
    Raises ``NotCompiledError``.
    """
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
    """Say whether a kept library is the user's own file, written by nobody else, and what the hash
    beside it says.
    """
    try:
        said = _content(path.with_suffix(".sha256"))
        return hashlib.sha256(_content(path)).hexdigest().encode() == said.strip()
    except OSError:
        return False


def _content(path: Path) -> bytes:
    """A plain file of the user's; raise ``OSError`` for a link, another's, or one that others may
    write.
    """
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
def cpu_flags() -> frozenset[str]:
    """Instruction sets that this CPU and its system have, in Linux's words; none where it does not
    say.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def sources() -> list[Path]:
    """What the kernels are compiled from."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in {".c", ".h"})


def compile_kernels(command: list[str], made: Path) -> None:
    """Compile all to the library ``made``; raise ``NotCompiledError``."""
    run([*command, *FLAGS, *map(str, (s for s in sources() if s.suffix == ".c")), "-lm", "-o", str(made)])


def carried(folder: Path = CARRIED) -> tuple[Path, str] | None:
    """The best library that the package brings for this CPU, and its level; None where it brings
    none made of these sources.
    """
    for level, (_, needed) in LEVELS.items():
        path = folder / f"{level}-{_digest('')}.so"
        if needed <= cpu_flags() and path.exists():
            return path, f"{level}, carried by the package"
    return None


def carry(folder: Path) -> list[Path]:
    """Build what a wheel carries into ``folder``; raise ``NotCompiledError``."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {folder / f"{level}-{_digest('')}.so": flags for level, (flags, _) in LEVELS.items()}
    for path, flags in made.items():
        compile_kernels([*compiler(), *flags], path)
    return list(made)


def _digest(target: str) -> str:
    key = hashlib.sha256("\0".join([target, *FLAGS]).encode() + b"".join(source.read_bytes() for source in sources()))
    return key.hexdigest()[:16]


@functools.cache
def library() -> tuple[Path, str]:
    """The kernels for this CPU, and who made them; raise ``NotCompiledError`` where there are none.

    ``CC`` asks for a build: what it names is used, also where the package carries a library, and
    with a ``-march`` of its own.
    """
    from dsv4_core.files.writing import write  # not needed where a wheel is built, nor is the package there

    if not os.environ.get("CC") and (found := carried()):
        return found
    command = compiler()
    if not any(word.startswith(("-march=", "-mcpu=")) for word in command):
        command.append("-march=native")
    target = run([*command, "-dM", "-E", "-x", "c", os.devnull])  # its version, every instruction set
    version = next((line for line in target.splitlines() if " __VERSION__ " in line), '""').split('"')[1]
    path = folder() / f"torch-backend-{_digest(target)}.so"
    try:
        with _locked(path.with_suffix(".lock")):
            if not sound(path):
                with tempfile.TemporaryDirectory(dir=path.parent) as own:
                    made = Path(own) / path.name
                    compile_kernels(command, made)
                    content = made.read_bytes()
                for old in (path.with_suffix(".sha256"), path):  # whatever it is: a pipe, a link, another's
                    old.unlink(missing_ok=True)
                write(path, content, 0o600)
                write(path.with_suffix(".sha256"), hashlib.sha256(content).hexdigest(), 0o600)
    except OSError as error:
        raise NotCompiledError(
            f"C kernels cannot be kept: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return path, f"{command[0]} {version}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(
            f"usage: python -m dsv4_backend_torch.kept DIR: build the libraries that a wheel carries ({CARRIED}) into DIR"
        )
    try:
        print("\n".join(map(str, carry(Path(sys.argv[1])))))
    except NotCompiledError as error:
        sys.exit(str(error))
