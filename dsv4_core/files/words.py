"""Words from elsewhere (names in files, what a peer or a library says) made safe to print."""

from __future__ import annotations

import re
import sys

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Spell out what moves a terminal's cursor or colours it: control characters but newline and
    tab, bidirectional marks, and halves of surrogate pairs (bytes that were no UTF-8).
    """
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str, limit: int = 500) -> str:
    """The same, without line breaks and not longer than ``limit``."""
    line = " ".join(printable(text).split())
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def for_terminal(text: str) -> str:
    """Text of a model as it may be printed: as it is into a file or a pipe, made safe on a
    terminal.
    """
    return printable(text) if sys.stdout.isatty() else text
