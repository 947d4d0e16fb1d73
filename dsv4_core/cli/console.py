"""Where tables are printed to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rich.console

from dsv4_core.files.words import printable

if TYPE_CHECKING:
    from rich.text import Text


class Console(rich.console.Console):
    """Rich's console for words from anywhere: no markup in them counts, and none moves the cursor.
    A reader who leaves is what it is to every command: a broken pipe.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Make a text of a string, which may come from a file."""
        return super().render_str(printable(text), **settings)

    def on_broken_pipe(self) -> None:
        """Go on with the error that this is called for."""
        raise  # noqa: PLE0704  it is called in the handler of the error


def wide_console() -> Console:
    """Give a console as wide as the terminal; into a file or a pipe, wide enough for every
    column.
    """
    return Console(width=None if Console().is_terminal else 200)
