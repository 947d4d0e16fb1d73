"""``dsv4 conformance next``: the op to write next, and how far a backend is to each level."""

from __future__ import annotations

import click

from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import BackendFlags, backend_options


@click.command("next", cls=Command)
@backend_options
def command(flags: BackendFlags) -> None:
    """Say which op to write or mend next; runs the smoke cases of the ops that are there.

    Exit status: 0, whatever is missing; 1 where an op that is there fails.
    """
    from dsv4_conformance.run import progress

    backend = flags.create()
    found = progress.states(backend)
    for line in progress.lines(found, backend):
        click.echo(line)
    raise click.exceptions.Exit(int(any(s.failing for s in found)))
