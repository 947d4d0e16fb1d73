"""``dsv4 conformance ...``: a file a command. What a command does is decided in the other rooms."""

from __future__ import annotations

from importlib import import_module
from typing import cast

import click

from dsv4_core.cli.commands import Group

COMMANDS = {
    "run": "dsv4_conformance.cli.run:run_command",
    "next": "dsv4_conformance.cli.next:command",
    "verify": "dsv4_conformance.cli.verify:command",
    "mutants": "dsv4_conformance.cli.mutants:command",
    "matrix": "dsv4_conformance.cli.matrix:command",
    "export": "dsv4_conformance.cli.export:command",
    "judge": "dsv4_conformance.cli.export:judge_command",
    "localise": "dsv4_conformance.cli.localise:command",
}


class Commands(Group):
    """Subcommands, imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        return cast("click.Command", getattr(import_module(module), name))


@click.group("conformance", cls=Commands)
def command() -> None:
    """Judge a backend: op by op, law by law, against what DeepSeek-V4 computes."""
