"""Texts that end a generation: found where they come in pieces, and not given out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopTexts:
    """Text in pieces; what may be the beginning of a stop text is held back until it is known not
    to be.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raise ``ValueError`` for an empty stop text, which would stop at once."""
        if "" in stops:
            raise ValueError("stop: an empty text would end every generation at once; give at least one character")
        self.stops = stops
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Add a piece; give what is certain now. Once a stop text is ``found``, nothing after it is
        given.
        """
        if self.found:
            return ""
        text = self.held + piece
        places = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            self.found, self.held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Give what was held back: the text has ended, and it was no stop text."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of ``text`` that ``stop`` begins with, less than all of
    it.
    """
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
