"""Where tables are printed to."""

from __future__ import annotations

import rich.console


class Console(rich.console.Console):
    """Rich's console, but that a reader who leaves is what it is to every command: a broken pipe."""

    def on_broken_pipe(self) -> None:
        """Go on with the error that this is called for."""
        raise  # noqa: PLE0704  it is called in the handler of the error


def wide_console() -> Console:
    """Give a console as wide as the terminal; into a file or a pipe, wide enough for every column."""
    return Console(width=None if Console().is_terminal else 200)
