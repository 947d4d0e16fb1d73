"""Reading files that may be anything: regular files alone, of a size that is bounded, checked
against a form.

Every error is a ``FileError`` whose text begins with the file's path. Forms are msgspec types: a
key that a form names must have its type and range, keys that it does not name are left alone (files
of this kind grow).
"""

from __future__ import annotations

import os
import re
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from dsv4_core.files.mistaken import mistaken
from dsv4_core.files.words import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

T = TypeVar("T")
MOST = 64 << 20  # bytes of a JSON or TOML file; the published index has 10 MB
DEEPEST = 100  # levels of nesting; a published config.json has 3
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_BRACKET_OR_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{\]}]', re.DOTALL)


class FileError(ValueError):
    """A file that is not what it should be; the message names it, what was found and what to do."""


def regular(path: Path) -> int:
    """Give the size of a regular file; raise ``FileError`` for a directory, a pipe, a socket or a
    device.

    Raises ``FileNotFoundError`` and other ``OSError`` as the system gives them.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise FileError(f"{path}: a {kind}, where a file is needed")
    return status.st_size


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a regular file for reading, as a descriptor; a pipe that takes its place in between does
    not block.
    """
    regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path}: no longer a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def pread(descriptor: int, count: int, at: int, path: Path) -> bytes:
    """Read exactly ``count`` bytes; raise ``FileError`` where the file ends before."""
    parts = []
    while count > 0:
        part = os.pread(descriptor, min(count, 1 << 30), at)
        if not part:
            raise FileError(f"{path}: ends at byte {at}; it became shorter while it was read: copy it again")
        parts.append(part)
        count, at = count - len(part), at + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def contents(path: Path, most: int = MOST) -> bytes:
    """Read a whole file of at most ``most`` bytes."""
    size = regular(path)
    if size > most:
        raise FileError(f"{path}: {size} bytes, more than the {most} that such a file may have; is it the right file?")
    with opened(path) as descriptor:
        return pread(descriptor, size, 0, path)


def text(path: Path, most: int = MOST) -> str:
    """Read a UTF-8 file."""
    try:
        return contents(path, most).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text ({error})") from None


def json_file(path: Path, form: type[T], advice: str, *, most: int = MOST) -> T:
    """Read a JSON file as ``form``; ``advice`` completes every message: what the reader should
    do.
    """
    return json_text(contents(path, most), form, f"{path}", advice)


def json_text(data: bytes | str, form: type[T], name: str, advice: str) -> T:
    """Read JSON of at most ``DEEPEST`` levels as ``form`` (``object``: any); ``name`` begins every
    message.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if _deepest(raw) > DEEPEST:
        raise FileError(f"{name}: nested over {DEEPEST} levels deep; {advice}")
    try:
        return msgspec.json.decode(raw, type=form)
    except msgspec.ValidationError as error:
        raise FileError(f"{_told(name, str(error), _decoded(raw))}; {advice}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if what := mistaken(raw[:64]):
            raise FileError(f"{name}: {what}") from None
        raise FileError(f"{name}: not JSON ({one_line(str(error))}); {advice}") from None


def _decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):  # it breaks further on
        return None


def checked(values: Any, form: type[T], name: str, advice: str) -> T:
    """Hold plain values (of JSON or TOML) to a form; raise ``FileError`` saying which key breaks
    what.
    """
    try:
        return msgspec.convert(values, form)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise FileError(f"{_told(name, str(error), values)}; {advice}") from None


def toml_file(path: Path, form: type[T], advice: str) -> T:
    """Read a TOML file as ``form``; a key that the form does not name is an error where the form
    forbids it.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    content = text(path, 1 << 20)
    if _deepest(content.encode()) > DEEPEST or max(map(len, content.splitlines()), default=0) > 1 << 16:
        raise FileError(f"{path}: nested over {DEEPEST} levels deep, or a line of over 65536 characters; {advice}")
    try:
        values = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # the library lets errors of int() and date() through
        raise FileError(f"{path}: not TOML: {one_line(str(error))}; {advice}") from None
    return checked(values, form, f"{path}", advice)


def integers(path: Path, advice: str) -> npt.NDArray[Any]:
    """Read a .npy file of integers, of at least one element; its header is held against the file's
    size first.

    No pickle is ever read.
    """
    import numpy as np

    size = regular(path)
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(file)
        except Exception as error:  # noqa: BLE001  numpy lets whatever its own parser raises through
            raise FileError(f"{path}: not a .npy file of token ids ({one_line(str(error))}); {advice}") from None
        if dtype.kind not in "iu":
            raise FileError(f"{path}: holds {dtype}; token ids are integers; {advice}")
        count = 1
        for axis in shape:
            count *= axis
        if count < 1 or len(shape) > 8 or min(shape, default=1) < 1:
            raise FileError(f"{path}: shape {list(shape)} has no token; {advice}")
        if file.tell() + count * dtype.itemsize != size:
            need = file.tell() + count * dtype.itemsize
            raise FileError(f"{path}: shape {list(shape)} of {dtype} needs {need} bytes, the file has {size}; {advice}")
        file.seek(0)
        array = np.load(file, allow_pickle=False)
    if dtype.kind == "u" and dtype.itemsize == 8 and int(array.max()) > np.iinfo(np.int64).max:
        raise FileError(f"{path}: holds {int(array.max())}, which is no token id; {advice}")
    return np.asarray(array, np.int64)


def _deepest(data: bytes) -> int:
    """Most brackets that are open at once, those in strings not counted."""
    brackets = data.translate(None, _NO_BRACKET)
    for depth in range(DEEPEST + 1):  # the usual file, quickly: each round closes the innermost pairs
        if not brackets:
            return depth
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    depth = deepest = 0
    for found in _BRACKET_OR_STRING.finditer(data):
        first = found[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        deepest = max(deepest, depth)
    return deepest


def _told(name: str, message: str, values: Any) -> str:
    sentence = _sentence(message, values)
    return f"{name} {sentence}" if sentence.startswith(("must ", "has no ")) else f"{name}: {sentence}"


def _sentence(message: str, values: Any) -> str:
    """Msgspec's message as ours: ``rope_scaling.factor = -1 must be a number > 0.0``."""
    said, _, where = message.partition(" - at `")
    value, known = values, True
    for key, index, other in re.findall(r"\.([^.\[`]+)|\[(\d+)\]|(\[\.\.\.\])", where):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, TypeError, IndexError, ValueError):
            known = False
        known = known and not other
    place = one_line(where.removesuffix("`").removeprefix("$").removeprefix("."), 120)
    if missing := re.search(r"missing required field (`[^`]+`)", said):
        return f"{place + ' ' if place else ''}has no {missing[1]}"
    rule = "Expected printable text, without control characters (of a file: a name without a path)"
    rule = rule if "regex" in said else said.partition(", got ")[0].replace("`", "")
    for theirs, ours in _KINDS.items():
        rule = re.sub(rf"\b{theirs}\b", ours, rule)
    shown = f" = {one_line(repr(value), 80)}" if known and place else ""
    return f"{place}{shown} {rule.replace('Expected', 'must be', 1)}".strip()


_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "array": "a list",
    "object": "an object",
    "bool": "true or false",
}


def inside(directory: Path, name: str, who: str) -> Path:
    """Give the path of a file that ``who`` names, which must lie in ``directory``, links
    followed.
    """
    path = directory / name
    if name.startswith("/") or ".." in name.split("/") or not path.resolve().is_relative_to(directory.resolve()):
        raise FileError(f"{who}: {name!r} leads out of {directory}; it may name files in it alone")
    return path


@contextmanager
def fitting(name: str, advice: str) -> Iterator[None]:
    """Compute with what a file holds: where its parts have the right forms and do not fit each
    other, that is the file's fault, whatever is raised. For code of dsv4's own: a backend's errors
    are findings.
    """
    try:
        yield
    except FileError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, AssertionError, MemoryError) as error:
        said = one_line(f"{type(error).__name__}: {error}", 200)
        raise FileError(f"{name}: what it holds does not fit together ({said}); {advice}") from error
