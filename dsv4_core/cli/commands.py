"""Commands and groups as dsv4 shows them: options in named groups, a suggestion for a misspelt
command, the words typed.
"""

from __future__ import annotations

import difflib
import shlex
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TYPED = "dsv4.typed"


class Option(click.Option):
    """An option that ``--help`` lists under a heading."""

    def __init__(self, *args: Any, heading: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


def option(*names: str, heading: str = "", **kwargs: Any) -> Callable[[Any], Any]:
    """``click.option`` with the heading under which ``--help`` lists it; the first headings are a
    newcomer's.
    """
    return click.option(*names, cls=Option, heading=heading, **kwargs)


class Command(click.Command):
    """A command whose ``--help`` lists options by heading, in the order in which headings first
    appear.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the words as they were typed."""
        ctx.meta[_TYPED] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                headings.setdefault(getattr(parameter, "heading", ""), []).append(record)
        rest = headings.pop("", [])
        for heading, records in [*headings.items(), ("Other options" if headings else "Options", rest)]:
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class Group(click.Group):
    """A group that suggests what a misspelt command may have been."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with the nearest names."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(close)}?" if close else f" `{ctx.command_path} --help` lists them."
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)


def typed() -> list[str]:
    """Give the words that the running command was given, as they were typed."""
    ctx = click.get_current_context(silent=True)
    return list(ctx.meta.get(_TYPED, ())) if ctx else []


def command_line(words: Sequence[str]) -> str:
    """Write a command of dsv4's as it may be pasted into a shell."""
    return shlex.join(["dsv4", *words])


def words_of(ctx: click.Context, *, without: Sequence[str] = ()) -> list[str]:
    """Give the options that the user wrote, one spelling each, but for those of the parameters
    ``without``.
    """
    words: list[str] = []
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if not isinstance(parameter, click.Option) or source is not ParameterSource.COMMANDLINE or name in without:
            continue
        opt, value = max(parameter.opts, key=len), ctx.params[name]
        for one in value if parameter.multiple else (value,):
            if parameter.is_flag:
                words.append(opt)
            else:
                words += [opt, "=".join(map(_word, one)) if isinstance(one, tuple) else _word(one)]
    return words


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
