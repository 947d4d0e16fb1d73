"""``dsv4 ...``: subcommands found by name and imported when they are run, so that ``dsv4 backends`` stays fast.

A core command ``name`` is ``dsv4_core.cli.name:command``; other packages add theirs through the entry-point group
``dsv4.commands``.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from typing import cast

import click

from dsv4_core import __version__
from dsv4_core.cli.commands import Group

COMMANDS = (
    "demo",
    "generate",
    "logits",
    "inspect",
    "init",
    "backends",
    "explain",
    "doctor",
    "plan",
    "rehearse",
    "convert",
    "bench",
    "completion",
)
GROUP = "dsv4.commands"


class LazyGroup(Group):
    """A group whose commands are imported only when they are named (or all of them for ``--help``)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core's commands in the order of a user's day, then those of other packages."""
        del ctx
        return [*COMMANDS, *sorted(entry.name for entry in metadata.entry_points(group=GROUP))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        del ctx
        if cmd_name in COMMANDS:
            return cast("click.Command", import_module(f"dsv4_core.cli.{cmd_name}").command)
        for entry in metadata.entry_points(group=GROUP, name=cmd_name):
            return cast("click.Command", entry.load())
        return None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsv4")
def root() -> None:
    """DeepSeek-V4 on any hardware: run the model, look inside, judge a backend."""


def main() -> None:
    """Run the command line; errors that a user can act on are printed as one message, without a traceback, and exit
    with 2.
    """
    from dsv4_core.contract.spec import BackendError

    try:
        sys.exit(root(standalone_mode=False))  # click gives back the status that a command exits with
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("aborted", err=True)
        sys.exit(130)
    except (BackendError, ValueError, OSError) as error:
        click.echo(f"dsv4: {error}", err=True)
        sys.exit(2)
