"""``dsv4 backends``."""

from __future__ import annotations

import click

from dsv4_core.contract.registry import faults, installed


@click.command("backends")
def command() -> None:
    """List installed backends, what each declares to need, and whether that is here. Imports none of them."""
    table()


def table() -> None:
    """Print the table; whether a backend's device is there only `dsv4 doctor` and the backend itself can tell."""
    rows = [("backend", "from", "needs", "missing here")]
    for b in sorted(installed().values(), key=lambda b: b.name):
        if b.problem:
            rows.append((b.name, f"{b.distribution} {b.version}", "?", f"cannot be chosen: {b.problem}"))
            continue
        needs = ", ".join(b.requires) if b.extra else "nothing beyond the package"
        rows.append(
            (
                b.name,
                f"{b.distribution} {b.version}",
                needs,
                f"{', '.join(b.missing)}: {b.install_command}" if b.missing else "nothing",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for fault in faults():
        click.echo(fault, err=True)
