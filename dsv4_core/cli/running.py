"""What the commands that run the model share: opening it, and progress bars."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from dsv4_core.cli.options import BackendFlags, RankFlags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.dtypes import Format
    from dsv4_core.session import Session

ALONE = RankFlags(tp=1, ep=1, stats=False)


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the terminal (nothing where standard error is not one)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from dsv4_core.cli.console import Console

    console = Console(stderr=True)
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"  # of several ranks the first one's
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


class Bars:
    """A session's progress: one bar after the other, each gone when it is full."""

    def __init__(self) -> None:
        self.what = ""
        self.shown = ExitStack()

    def __call__(self, what: str, done: int, of: int) -> None:
        """Show how much of ``what`` is done."""
        if what != self.what:
            self.shown.close()
            self.what, self.update = what, self.shown.enter_context(bar(what))
        self.update(done, of)
        if done >= of:
            self.shown.close()
            self.what = ""


def open_model(model: str | None, flags: BackendFlags, asked: RankFlags = ALONE, drafter: str | None = None) -> Session:
    """Open MODEL as the user said; no weight is read yet."""
    from dsv4_core.session import open_session

    return open_session(model, flags.create, drafter=drafter, tp=asked.tp, ep=asked.ep, progress=Bars())


def model_config(model: str | None, drafter: str | None = None) -> tuple[ModelConfig, Format]:
    """Give a preset's configuration, or a checkpoint's (with another directory's drafter) with the
    format of its experts; only headers are read.
    """
    from pathlib import Path

    from dsv4_core.checkpoint.config import PRESETS
    from dsv4_core.checkpoint.locate import find_drafter, find_model
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.planning.support import expert_format

    if model in PRESETS and not Path(model).is_dir():
        if drafter:
            raise ValueError(f"--drafter is for a checkpoint's directory; {model} is a preset, which has its own")
        return PRESETS[model], "e2m1"
    checkpoint = Checkpoint(find_model(model), drafter=find_drafter(drafter))
    return checkpoint.config, expert_format(checkpoint)


def report(line: Any) -> None:
    """Tell the user something that is not the program's output."""
    click.echo(line, err=True)
