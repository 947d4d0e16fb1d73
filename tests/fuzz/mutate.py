"""Damage that knows the structure of what it damages: JSON trees, safetensors headers, .npy
headers, tables, words.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 127, 128, 129, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e-38, 1e38, 1e308, -1e308, "", "0", "1", "null", "a" * 3000, "\x1b[31mred\x1b[0m", "\x00", "\n", "\r",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "..", "%s%n", "{}", "é", "\u202e", "\ud800", "NaN", "Infinity", "fp4", "fp8",
    "bfloat16", "e4m3", [], {}, [[]], [None], [0], [-1], [2**40], {"": None}, {"type": "x"}, [1] * 50,
)  # fmt: skip
TEXTS = (
    b"", b" ", b"null", b"[]", b"{}", b"0", b'""', b"NaN", b"[" * 100_000, b'{"a":' * 100_000, b"{" * 50, b"\xff\xfe", b"\xef\xbb\xbf{}",
    b"\x00" * 64, b"\x80\x04}.", b"{not json", b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b"PK\x03\x04", b"<html></html>",
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value in a tree, in order."""
    found = [path]
    if len(path) > 60:  # deep enough, and this is Python
        return found
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def tree(rng: Random, value: Any, spots: list[tuple[Any, ...]] | None = None) -> Any:
    """Change one to three places of a JSON value."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(spots or places(value))
        if not path:
            if rng.random() < 0.9:
                continue
            return copy.deepcopy(rng.choice(ODD))
        try:
            holder, key = at(value, path[:-1]), path[-1]
            old = holder[key]
        except (KeyError, IndexError, TypeError):  # an earlier change took it away
            continue
        if not isinstance(holder, dict | list):  # an earlier change made a text of it
            continue
        how = rng.randrange(9)
        if how <= 2:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[rng.choice((str(key) + "x", "", "\x1b]0;x\x07", "a" * 300, "../x"))] = holder.pop(key)
        elif how == 5 and isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 1e300:
            holder[key] = rng.choice(
                (old + 1, old - 1, -old, old * 2, old / 3, old * 2**20, str(old), float(old), old // 2)
            )
        elif how == 6 and isinstance(old, str):
            cut = rng.randrange(len(old) + 1)
            holder[key] = rng.choice(
                (old[:cut], old[cut:] + old[:cut], old + old, old.upper(), old + "\x1b[2J", list(old[:9]), f"../{old}")
            )
        elif how == 7 and isinstance(old, list):
            holder[key] = rng.choice(
                (old[::-1], old + old, old[:1], old * 200, [old], dict(enumerate(map(str, old[:9]))))
            )
        elif how == 8:
            deep: Any = old
            for _ in range(rng.choice((1, 2, 50, 5000))):
                deep = [deep]
            holder[key] = deep
            break  # nothing more: looking for places would go as deep
        else:
            holder[key] = copy.deepcopy(at(value, rng.choice(places(value))))
    return value


def written(value: Any) -> bytes:
    """JSON text, of trees too deep for the library as well."""
    try:
        return json.dumps(value, default=str).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        depth, inner = 0, value
        while isinstance(inner, (list, dict)) and inner and depth < 20_000:
            inner = next(iter(inner.values() if isinstance(inner, dict) else inner))
            depth += 1
        return b"[" * depth + b"]" * depth


def raw(rng: Random, data: bytes) -> bytes:
    """Damage bytes without looking."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        spot = rng.randrange(len(data) + 1) if data else 0
        how = rng.randrange(7)
        if how == 0 and data:
            data[spot % len(data)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[spot:]
        elif how == 2:
            del data[spot : spot + rng.choice((1, 2, 8, 64))]
        elif how == 3:
            data[spot:spot] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8))))
        elif how == 4:
            data[spot:spot] = data[max(0, spot - 20) : spot]
        elif how == 5:
            data[spot : spot + 8] = rng.choice(
                (b"\x00" * 8, b"\xff" * 8, b"9" * 8, b'"' * 8, b"[" * 8, b"\x1b[31m\x07 ")
            )
        else:
            data += rng.choice((b"\x00", b"}", b"more", b"\n\n"))
    return bytes(data)


def json_file(rng: Random, data: bytes) -> bytes:
    """A JSON file: mostly its tree, sometimes its text, sometimes another text altogether."""
    choice = rng.random()
    if choice < 0.08:
        return rng.choice(TEXTS)
    if choice < 0.25:
        return raw(rng, data)
    return written(tree(rng, json.loads(data)))


def json_lines(rng: Random, data: bytes) -> bytes:
    """A file of a JSON value a line: one line's tree, mostly."""
    lines = data.splitlines()
    spot = rng.randrange(len(lines))
    if rng.random() < 0.2:
        return raw(rng, data)
    lines[spot] = json_file(rng, lines[spot])
    return b"\n".join(lines[rng.choice((0, 0, 0, spot)) :]) + rng.choice((b"\n", b""))


def python(rng: Random, data: bytes) -> bytes:
    """Python text that is parsed and never run: its words, its bytes, and nests of brackets and
    signs.
    """
    how = rng.random()
    if how < 0.4:
        return raw(rng, data)
    deep = rng.choice((10, 90, 150, 3000, 60_000))
    new = rng.choice((
        "(" * deep + ")" * deep, "-" * deep + "1", "not " * deep + "x", "[" * deep, "x" + ".a" * deep, "f'{" * 5 + "}'" * 5, "None", "1", "{}", "b'x'",
        "{schema!z}", "'{'", "'{0}{1}'", "'{a.b[c]}'", "'{schema:>99999999}'", "lambda: 0", "{1: 2}", "{'low': 3}", "'\\ud800'", "'\x1b[31m'", "x if " * deep + "y",
    ))  # fmt: skip
    if how < 0.5:
        return (data.decode() + "\nextra = " + new).encode("utf-8", "surrogatepass")
    lines = data.decode().splitlines()
    spot = rng.randrange(len(lines))
    lines[spot] = rng.choice(
        (lines[spot].partition("=")[0] + "= " + new, new, "", lines[spot] + new, " " + lines[spot])
    )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def store(rng: Random, data: bytes) -> bytes:
    """What ranks wrote to their store, key -> text: what a stranger would write there, and what was
    damaged in one.
    """
    said = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(said))
        how = rng.randrange(5)
        if how == 0:
            said[key] = written(rng.choice(ODD)).decode("latin-1")
        elif how == 1:
            said[key] = raw(rng, said[key].encode("latin-1")).decode("latin-1")
        elif how == 2:
            said[key] = rng.choice(TEXTS).decode("latin-1")
        elif how == 3:
            said[key] = rng.choice(
                ("failed: x\x1b[2J", "ended: \n\x07", "done", "-1", "9" * 5000, "\xff\xfe", "failed: ", "0", "²")
            )
        else:
            try:
                said[key] = json_file(rng, said[key].encode("latin-1")).decode("latin-1")
            except (ValueError, RecursionError):  # no JSON, or damaged already
                said[key] = ""
    return json.dumps(said).encode()


def safetensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file: its header's tree, its length, or its bytes near the front and the
    end.
    """
    length = int.from_bytes(data[:8], "little")
    choice = rng.random()
    if choice < 0.15:
        return raw(rng, data[: rng.choice((0, 4, 8, 100, 8 + length, 8 + length + 100))]) + data[8 + length + 100 :]
    if choice < 0.3:
        stated = rng.choice((0, 1, 2, length - 1, length + 1, length + 8, 2**31, 2**62, 2**63, 2**64 - 1, len(data)))
        return stated.to_bytes(8, "little") + data[8:]
    if choice < 0.4:
        return rng.choice((data[: rng.randrange(len(data))], data + b"more", rng.choice(TEXTS)))
    if choice < 0.5:
        header = raw(rng, data[8 : 8 + length])
    else:
        values = json.loads(data[8 : 8 + length])
        first = rng.choice(list(values))
        spots = [p for p in places({first: values[first]}) if p]
        header = written(tree(rng, values, [*spots, (first,)]))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def npy(rng: Random, data: bytes) -> bytes:
    """A .npy file: its header's words or its bytes."""
    if rng.random() < 0.4:
        return raw(rng, data)
    shape = rng.choice(("(0, 4)", "(1, 100000000000)", "(4,)", "()", "(2, 3, 4)", "(-1, 4)", "(1, 4.0)", "('a', 4)", "(1, True)", "(2**70, 1)",
                        "(1, 4)", "(1" + "0" * 400 + ", 1)", "[1, 4]", "(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4)"))  # fmt: skip
    descr = rng.choice(
        (
            "<i8",
            "<i4",
            "|u1",
            "<u8",
            "<f4",
            "<f8",
            "|b1",
            "|O",
            "<U7",
            "|V8",
            ">i8",
            "<M8[s]",
            "<c8",
            "[('a','<i8')]",
            "",
            "zz",
        )
    )
    order = rng.choice(("False", "True", "3", "__import__('os')"))
    kind = descr if descr.startswith("[") else f"'{descr}'"
    header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}"
    header = rng.choice((header, header, header.replace("}", ""), "(" * 5000, header + " " * 70_000, ""))
    text = header.encode() + b"\n"
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little") if len(text) < 65536 else b"\xff\xff"
    body = rng.choice((data[-32:], b"", b"\xff" * 32, b"\x00" * 1000))
    return b"\x93NUMPY" + version + size + text + body


def words(rng: Random, data: bytes) -> bytes:
    """A text of words, keys and numbers, as TOML is."""
    if rng.random() < 0.3:
        return rng.choice((raw(rng, data), rng.choice(TEXTS), b"a = " + b"[" * 5000, b"a" + b".a" * 5000 + b" = 1"))
    parts = data.decode().split(" ")
    for _ in range(rng.choice((1, 1, 2, 3))):
        spot = rng.randrange(len(parts))
        parts[spot] = rng.choice((
            "=", "[", "]", "[[xfail]]", "[run]", '"', "'''", "3", "-1", "1e999", "nan", "inf", "true", "2027-02-30", "2027-06-30", "99999-01-01",
            "0x" + "f" * 99, "1979-05-27T07:32:00Z", '"\\u001b[31m"', '"\\ud800"', '"x"', "{}", "[]", "a.b.c", "", "\n", "9" * 5000, "07:32:00", '"ref*"',
            '"[a-"', "[[[[[[", "\x1b", "\x00", "é",
        ))  # fmt: skip
    return " ".join(parts).encode("utf-8", "surrogatepass")


def arguments(rng: Random, given: list[str], options: list[str]) -> list[str]:
    """A command line: values changed, options added, taken away and repeated."""
    odd = ["", "-1", "0", "1", "9" * 30, "9" * 400, "1e308", "1e-45", "nan", "inf", "-inf", "x", "²", "٣", "\udcff", "\x1b[31m", "\n", "a,b", "0,,1", ",",
           "/etc/passwd", "/dev/zero", ".", "..", "nowhere/x", "tiny", "--", "-", "=", "a=b", "self=1", "name=x", "numerics=native", "x" * 5000, "{}", "0-",
           "5-3", "h100x1", "1KiB", "-5GiB", "1.5.5MB", "4K", "reference", "%s", "~", "$HOME"]  # fmt: skip
    words_ = list(given)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spot = rng.randrange(1, len(words_) + 1)
        how = rng.randrange(5)
        if how == 0 and spot < len(words_):
            words_[spot] = rng.choice(odd)
        elif how == 1:
            words_[spot:spot] = [rng.choice(options), rng.choice(odd)]
        elif how == 2:
            words_[spot:spot] = [rng.choice(options)]
        elif how == 3 and spot < len(words_):
            del words_[spot]
        else:
            words_.insert(spot, rng.choice(odd))
    return words_
