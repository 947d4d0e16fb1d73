"""Control tokens of the published chat format, and text as pieces: what is a control token and what
is words.

A prompt is a list of pieces, never one string: a control token that somebody spells in a message
stays words.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, THOUGHT = "<think>", "</think>"
DSML = "｜DSML｜"
TASKS = {task: f"<｜{task}｜>" for task in ("action", "query", "authority", "domain", "title", "read_url")}
MARKERS = (BEGIN, END, USER, ASSISTANT, REMINDER, THINK, THOUGHT, DSML, *TASKS.values())
_LONGEST = max(map(len, MARKERS))
_MARKER = re.compile(f"({'|'.join(map(re.escape, MARKERS))})")


class Piece(NamedTuple):
    """Words, or one control token."""

    text: str
    control: bool = False


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Put neighbouring words together; drop empty ones."""
    result: list[Piece] = []
    for piece in pieces:
        if result and not piece.control and not result[-1].control:
            result[-1] = Piece(result[-1].text + piece.text)
        elif piece.text:
            result.append(piece)
    return result


def spelt(pieces: Iterable[Piece]) -> str:
    """One string, control tokens spelt out: for people and for comparison, not for a tokenizer."""
    return "".join(piece.text for piece in pieces)


class Scanner:
    """A stream of text in which control tokens are spelt out, cut anywhere, to pieces."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        """Add text; give the pieces that are certain now: the end of it may be the beginning of a
        control token.
        """
        *before, rest = _MARKER.split(self._held + text)  # words and control tokens in turn
        tails = (at for at in range(max(0, len(rest) - _LONGEST), len(rest)) if rest[at] in "<｜")
        kept = next((len(rest) - at for at in tails if any(m.startswith(rest[at:]) for m in MARKERS)), 0)
        self._held = rest[len(rest) - kept :]
        pieces = [Piece(part, control=i % 2 == 1) for i, part in enumerate(before)]
        return joined([*pieces, Piece(rest[: len(rest) - kept])])

    def finish(self) -> list[Piece]:
        """Give what was held back."""
        held, self._held = self._held, ""
        return joined([Piece(held)])


def scan(text: str) -> list[Piece]:
    """Read trusted text, in which a control token that is spelt is one (a recorded prompt, a
    completion).
    """
    scanner = Scanner()
    return joined([*scanner.push(text), *scanner.finish()])
