"""``dsv4 backends``."""

from __future__ import annotations

import click

from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import json_option
from dsv4_core.contract import registry
from dsv4_core.contract.look import look


@click.command("backends", cls=Command)
@json_option
def command(as_json: bool) -> None:
    """List installed backends, what each needs, and whether it can run here. Loads none of their
    libraries.
    """
    if not as_json:
        table()
        return
    from dsv4_core.cli import schema

    entries = []
    for b in _sorted():
        found = look(b.name)
        entries.append(
            schema.BackendEntry(
                name=b.name,
                distribution=b.distribution,
                version=b.version,
                requires=list(b.requires),
                missing=list(b.missing),
                install=b.install_command if b.missing else None,
                status=found.status,
                note=found.note,
            )
        )
    choice = registry.choose(None)
    schema.emit("backends", schema.Listed(backends=entries, chosen=schema.Chosen(name=choice.name, why=choice.why)))


def _sorted() -> list[registry.Installed]:
    return sorted(registry.installed().values(), key=lambda b: b.name)


def table() -> None:
    """Print the table. `dsv4 doctor -b NAME` loads a backend's libraries, too."""
    rows = [("backend", "from", "needs", "here")]
    for b in _sorted():
        found = look(b.name)
        needs = ", ".join(b.beyond) or "nothing beyond the package"
        note = f": {found.note}" if found.note else ""
        rows.append((b.name, f"{b.distribution} {b.version}", "?" if b.problem else needs, f"{found.status}{note}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for fault in registry.faults():
        click.echo(fault, err=True)
