"""``dsv4 ...``: subcommands found by name and imported when they are run, so that ``dsv4 backends``
stays fast.

A core command ``name`` is ``dsv4_core.cli.name:command``; other packages add theirs through the
entry-point group ``dsv4.commands``.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from importlib import import_module
from typing import NoReturn, cast

import click

from dsv4_core.cli.commands import Group
from dsv4_core.cli.verdict import UNFORESEEN, in_a_child, wanted
from dsv4_core.contract import registry
from dsv4_core.contract.spec import BackendError
from dsv4_core.files.words import one_line, printable
from dsv4_core.version import __version__

COMMANDS = (
    "demo",
    "chat",
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


class LazyGroup(Group):
    """A group whose commands are imported only when they are named (or all of them for
    ``--help``).
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core's commands in the order of a user's day, then those of other packages."""
        del ctx
        return [*COMMANDS, *sorted(registry.entries(registry.COMMANDS).keys() - set(COMMANDS))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; one of another package that cannot be had says so in its place, and
        stops no other.
        """
        del ctx
        if cmd_name in COMMANDS:
            return cast("click.Command", import_module(f"dsv4_core.cli.{cmd_name}").command)
        for entry in registry.entries(registry.COMMANDS).get(cmd_name, [])[:1]:
            try:
                command = registry.loaded(entry)
                if isinstance(command, click.Command):
                    return command
                problem = f"{cmd_name!r} of distribution {entry.distribution} is no click command: {command!r}"
            except BackendError as error:
                problem = str(error)
            return unusable(cmd_name, problem)
        return None

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; whoever read its output may leave early (``| head``), which is no error to
        tell.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            if nobody_reads():
                ctx.exit(LEFT)
            raise


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has left; what is still buffered then goes
    nowhere.
    """
    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def unusable(name: str, problem: str) -> click.Command:
    """Stand in for a command that cannot be imported: ``--help`` says why, and calling it is an
    error.
    """

    def say(**_: object) -> None:
        raise BackendError(problem)

    return click.Command(
        name,
        callback=say,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        help=f"Cannot be used: {problem}",
        short_help=f"Cannot be used: {one_line(problem, 90)}",
        context_settings={"ignore_unknown_options": True},
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsv4")
@click.option("--traceback", is_flag=True, help="After an error show where it happened (else DSV4_TRACEBACK=1).")
def root(traceback: bool) -> None:
    """DeepSeek-V4 on any hardware: run the model, look inside, judge a backend."""
    if traceback:
        os.environ["DSV4_TRACEBACK"] = "1"


LONGEST = 1000  # characters of an error's line
LEFT = 141  # what a shell says of a program that SIGPIPE ended
COMPLETION = "_DSV4_COMPLETE"  # how a shell asks what may come next; `dsv4 completion` prints the script that does


def main() -> None:
    """Run the command line. Errors that a user can act on are printed as one message and exit with
    2; what nobody foresaw is one line, too, and exits with 70. Nothing exits with 0 that did not
    come to its end.
    """
    open_streams()
    if COMPLETION in os.environ:
        root(prog_name="dsv4", complete_var=COMPLETION)  # answers the shell, and leaves
    say = in_a_child() if wanted() else None
    no_silent_exit()
    try:
        status = root(standalone_mode=False)  # click gives back the status that a command exits with
        sys.stdout.flush()
    except BrokenPipeError as error:
        status = LEFT if nobody_reads() else told(f"dsv4: {error}", 2)
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except click.ClickException as error:
        click.echo(f"{printable(usage(error))}Error: {printable(error.format_message())}", err=True)
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("aborted", err=True)
        status = 130
    except OSError as error:
        status = told(f"dsv4: {printable(system_error(error))}", 2)
    except (BackendError, ValueError, MemoryError) as error:
        status = told(f"dsv4: {printable(str(error) or repr(error))}", 2)
    except SystemExit as stop:  # dsv4's own commands never raise it
        ended = f"{stop.code!r}" if stop.code else "0 before the command was done"
        status = stop.code if isinstance(stop.code, int) and stop.code else UNFORESEEN
        told(f"dsv4: something ended the program with sys.exit({one_line(ended)})", status)
    except BaseException as error:  # noqa: BLE001  the last net: no input may end in a traceback
        said = one_line(f"{type(error).__name__}: {error}")
        status = told(f"dsv4: an error that was not foreseen: {said}; `dsv4 --traceback ...` shows where", UNFORESEEN)
    if say:
        say(status if isinstance(status, int) else 0)
    sys.exit(status)


def open_streams() -> None:
    """Put something where a standard stream was closed (``<&-``), before another file takes its
    number: an empty input, an output that cannot be written to, and errors that go nowhere.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            raw = io.FileIO(os.open(os.devnull, flags), "r" if name == "stdin" else "w")
            setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", write_through=True))


def system_error(error: OSError) -> str:
    """An error of the system as one line that begins with what it is about."""
    if error.strerror is None:
        return str(error) or repr(error)
    written = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF}
    about = error.filename if error.filename is not None else "standard output" if written else ""
    said = error.strerror[:1].lower() + error.strerror[1:]
    return f"{about}: {said}" if about != "" else said


def usage(error: click.ClickException) -> str:
    """The usage line, where a command was called wrongly."""
    context = getattr(error, "ctx", None)
    return f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n\n" if context else ""


def told(message: str, status: int) -> int:
    """Print an error, behind its traceback where that was asked for; give the status. A file's own
    words may make a line of any length, which nobody would read.
    """
    message = "\n".join(line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in message.split("\n"))
    if os.environ.get("DSV4_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()
    with suppress(OSError):  # standard error may be closed
        click.echo(message, err=True)
    return status


def no_silent_exit() -> None:
    """Let no plug-in end this process with ``os._exit(0)``, which would look like success."""
    leave, process = os._exit, os.getpid()

    def _exit(status: int) -> NoReturn:
        if status == 0 and os.getpid() == process:
            os.write(2, b"dsv4: something ended the program with os._exit(0) before the command was done\n")
            status = UNFORESEEN
        leave(status)

    os._exit = _exit
