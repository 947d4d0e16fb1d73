"""Where tables are printed to."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """Give a console as wide as the terminal; into a file or a pipe, wide enough for every column."""
    return Console(width=None if Console().is_terminal else 200)
