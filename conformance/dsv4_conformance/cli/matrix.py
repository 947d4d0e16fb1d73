"""``dsv4 conformance matrix``."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4_conformance.report.matrix import BEGIN, END, between, load, matrix, summary
from dsv4_core.files.reading import text as read_text
from dsv4_core.files.writing import write, write_over


@click.command("matrix")
@click.argument("reports", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--brief", is_flag=True, help="A line a report, without the ops.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it here instead of printing it.")
@click.option(
    "--into",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help=f"Put it into this document, between the lines {BEGIN} and {END}.",
)
def command(reports: tuple[Path, ...], brief: bool, out: Path | None, into: Path | None) -> None:
    """Build the support matrix from report.json files (or directories that hold one)."""
    text = (summary if brief else matrix)([load(path) for path in reports])
    if out:
        write_over(out, text)
    if into:
        write(into, between(read_text(into), text, str(into)))
    if not out and not into:
        click.echo(text, nl=False)
