"""``dsv4 completion``."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, get_completion_class

from dsv4_core.cli.commands import Command


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "fish", "zsh"]))
def command(shell: str) -> None:
    """Print a script that completes dsv4's commands, options and backends in SHELL.

    \b
    bash: dsv4 completion bash > ~/.local/share/bash-completion/completions/dsv4
    zsh:  dsv4 completion zsh > ~/.zfunc/_dsv4      (fpath+=~/.zfunc before compinit)
    fish: dsv4 completion fish > ~/.config/fish/completions/dsv4.fish
    """  # noqa: D301  click keeps the lines after a backspace as they are
    from dsv4_core.cli import COMPLETION, root

    made = get_completion_class(shell)
    assert made is not None
    complete = made(root, {}, "dsv4", COMPLETION)
    # bash's own source() first runs bash to ask for its version; the script is the same
    click.echo(
        complete.source_template % complete.source_vars() if isinstance(complete, BashComplete) else complete.source()
    )
