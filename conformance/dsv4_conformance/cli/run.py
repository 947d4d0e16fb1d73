"""``dsv4 conformance run``, and what the other commands that judge share with it."""

from __future__ import annotations

import functools
import math
import os
import shlex
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from dsv4_core.cli.commands import Command, command_line, option, typed, words_of
from dsv4_core.cli.options import BackendFlags, backend_options, json_option
from dsv4_core.cli.schema import Failure, Judged, emit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsv4_conformance.check import Finding, Session
    from dsv4_conformance.run.isolate import Workers
    from dsv4_conformance.run.runner import Run
    from dsv4_core.contract.spec import Tier


SELECTS = (
    "tier",
    "ops",
    "cases",
    "require",
    "xfails",
    "report",
    "jobs",
    "listed",
    "quiet",
    "as_json",
    "backend",
    "watch",
    "dump",
)
"""Parameters of a run that say what is run and printed, not how."""


@dataclass(frozen=True)
class Commands:
    """The command that was run, with the backend that it chose; and the one that ``--case ID``
    completes.
    """

    whole: str
    rerun: str

    @classmethod
    def running(cls, backend: str) -> Commands:
        """Of the command that is being run."""
        named = ["--backend", backend]
        ctx = click.get_current_context()
        written = typed()
        chosen = [] if ctx.get_parameter_source("backend") is ParameterSource.COMMANDLINE else named
        run = ["conformance", "run"]
        return cls(
            whole=command_line([*run, *chosen, *written]),
            rerun=command_line([*run, *named, *words_of(ctx, without=SELECTS)]),
        )


chosen = functools.partial(option, heading="What is chosen")
outcome = functools.partial(option, heading="What is written")
processes = functools.partial(option, heading="In which processes")


@click.command("run", cls=Command)
@chosen(
    "--tier",
    type=click.Choice(["smoke", "standard", "full"]),
    default="standard",
    show_default=True,
    help="How much is run.",
)
@chosen("--op", "ops", multiple=True, metavar="NAME", help="Only this op or law; may be repeated.")
@chosen("--case", "cases", multiple=True, metavar="ID", help="Only this case, of whatever tier; may be repeated.")
@chosen("--require", type=click.IntRange(0, 4), help="Fail unless this level is reached, claimed or not.")
@chosen(
    "--xfails", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file of expected failures."
)
@outcome(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.json, junit.xml and report.html here.",
)
@processes(
    "--jobs", default=1, show_default=True, type=click.IntRange(1, 1024), help="Run checks in this many processes."
)
@processes("--isolate", is_flag=True, help="Run checks in another process, which may crash, hang or eat memory.")
@processes("--time-limit", default=120.0, show_default=True, help="Seconds a check may take with --isolate.")
@processes("--memory-limit", default=8192, show_default=True, help="Megabytes a process may use with --isolate.")
@outcome(
    "--dump",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write operands, results and what was wanted of each failing op case here, as .npz.",
)
@processes("--watch", is_flag=True, help="Run again whenever a file of the backend's changes; Ctrl-C ends.")
@outcome("--list", "listed", is_flag=True, help="Print the ids that would run, and stop.")
@outcome("--quiet", "-q", is_flag=True, help="Failures and the closing lines only.")
@backend_options
@json_option
def run_command(
    flags: BackendFlags,
    as_json: bool,
    tier: str,
    ops: tuple[str, ...],
    cases: tuple[str, ...],
    require: int | None,
    xfails: Path | None,
    report: Path | None,
    jobs: int,
    isolate: bool,
    time_limit: float,
    memory_limit: int,
    dump: Path | None,
    watch: bool,
    listed: bool,
    quiet: bool,
) -> None:
    """Run the suite on a backend.

    Exit status: 0 all that was claimed or required passed, 1 something failed, 2 could not run.
    """
    if watch:
        from dsv4_conformance.run.watching import watching
        from dsv4_core.contract import registry

        raise click.exceptions.Exit(
            watching(registry.installed()[flags.choose().name].module, [w for w in typed() if w != "--watch"])
        )
    from dsv4_conformance.run.isolate import THREADS

    for variable in THREADS:  # before a library reads them: cases are small, and threads that wait for work spin
        os.environ.setdefault(variable, "1")
    from dsv4_conformance.check import Session
    from dsv4_conformance.laws.invariance import cost
    from dsv4_conformance.run import runner
    from dsv4_conformance.run import xfails as expected
    from dsv4_conformance.run.catalogue import collect
    from dsv4_conformance.run.isolate import Workers
    from dsv4_core.contract import registry

    flags = flags.settled()
    name = str(flags.backend)
    backend = flags.create()
    session = Session(backend, cast("Tier", tier), dump=dump)
    if listed:
        for check in runner.select(collect(session.tier, session.numerics, backend), ops, cases):
            click.echo(check.id)
        return
    commands = Commands.running(name)
    seconds, megabytes = (time_limit, memory_limit) if isolate else (math.inf, math.inf)
    on_device = str(getattr(session.backend, "device", "cpu")) != "cpu"
    place = Workers(name, session.numerics, flags.options, session.tier)
    workers = replace(place, seconds=seconds, megabytes=megabytes, jobs=jobs, dump=str(dump or ""), sticky=on_device)
    result = runner.run(
        session,
        ops=ops,
        cases=cases,
        require=require,
        xfails=expected.load(xfails) if xfails else (),
        execute=workers.execute if isolate or jobs > 1 else None,
        progress=Progress(commands.rerun, quiet=quiet, detailed=bool(cases), aside=as_json),
        version=registry.installed()[name].version,
    )
    result.backend = name
    if not cases:
        earlier_calls(result, session, place, aside=as_json)
    if flags.options.get("batch_invariant") and not result.partial:
        click.echo(cost(backend), err=as_json)
    finish(result, report, commands, flags, as_json=as_json)


def earlier_calls(result: Run, session: Session, place: Workers, *, aside: bool) -> None:
    """Say of the first failures of op cases whether they need an earlier call."""
    from dsv4_conformance.run import earlier
    from dsv4_conformance.run.catalogue import collect

    known = {c.id: c for c in collect("full", session.numerics, session.backend)}
    failed = [f for f in result.failures() if f.status == "failed" and f.group == "op" and f.id in known]
    for finding in failed[: earlier.LOOKED_AT]:
        ran = [f.id for f in result.findings[: result.findings.index(finding)] if f.op == finding.op]
        chain = earlier.explain(
            known[finding.id], [known[i] for i in ran if i in known], lambda checks: list(place.execute(checks))
        )
        if chain:
            finding.message += f"; {earlier.words(chain)}"
            click.echo(f"{finding.id} {earlier.words(chain)}", err=aside)


IN_FULL = 5  # failures of an op; what is behind them shows in the first few


class Progress:
    """One line that moves, a block for each of an op's first failures, a line for each later one
    and for each that was not claimed.
    """

    def __init__(self, rerun: str, *, quiet: bool, detailed: bool, aside: bool = False) -> None:
        """``aside``: print to standard error, since standard output is for a document."""
        self.rerun, self.detailed, self.aside = rerun, detailed, aside
        self.moving = not quiet and sys.stderr.isatty()
        self.failures: Counter[str] = Counter()

    def __call__(self, finding: Finding, done: int, of: int) -> None:
        """Show a finding."""
        if self.moving:
            click.echo(f"\r\x1b[2K{done}/{of} {finding.id}", nl=done == of, err=True)
        if finding.status in {"passed", "unsupported", "xfailed"} and not self.detailed:
            return
        clear = "\r\x1b[2K" if self.moving else ""
        if not finding.counts and finding.status != "passed" and not self.detailed:
            click.echo(f"{clear}not claimed, and {finding.status}: {finding.id}", err=self.aside)
            return
        colour = "green" if finding.status == "passed" else "red"
        click.echo(f"{clear}{click.style(finding.status.upper(), fg=colour)} {finding.id}", err=self.aside)
        self.failures[finding.op] += 1
        if not self.detailed and self.failures[finding.op] > IN_FULL:
            if self.failures[finding.op] == IN_FULL + 1:
                click.echo(
                    f"    from here on {finding.op}'s failures are named only: --case ID and --report say more",
                    err=self.aside,
                )
            return
        if finding.message:
            click.echo(f"    {finding.message}", err=self.aside)
        for line in beside(finding.worst):
            click.echo(f"    {line}", err=self.aside)
        if finding.status == "passed":
            figures = ", ".join(f"{k} {v:.3g}" for k, v in finding.metrics.items())
            worst = f", worst at {finding.worst['element']}" if "element" in finding.worst else ""
            said = f"    {finding.used:.3g} of the budget used{worst}" + (f"; {figures}" if figures else "")
            click.echo(said, err=self.aside)
        else:
            claim = "" if finding.counts else " (not claimed)"
            click.echo(
                f"    op {finding.op}, level {finding.level}{claim}; re-run: {self.rerun} --case {finding.id}",
                err=self.aside,
            )


def beside(worst: Mapping[str, Any]) -> list[str]:
    """A failing element among its neighbours, both sides one above the other."""
    if not (near := worst.get("around")):
        return []
    at, first = worst["element"], near["from"]
    columns = [f"{first + i}" for i in range(len(near["got"]))]
    rows = [columns, *([f"{x:.6g}" for x in near[side]] for side in ("got", "want"))]
    width = max(len(text) for row in rows for text in row)
    here = at[-1] - first
    said = [" ".join(f"[{t:>{width}}]" if i == here else f" {t:>{width}} " for i, t in enumerate(row)) for row in rows]
    where = f"{at[:-1]}, " if len(at) > 1 else ""
    return [
        f"{where}channel {said[0]}",
        *(f"{name:>{len(where) + 7}} {row}" for name, row in zip(("got", "want"), said[1:], strict=True)),
    ]


def finish(
    result: Run, report: Path | None, commands: Commands, flags: BackendFlags | None, *, as_json: bool = False
) -> None:
    """Print the closing lines or the document, write the reports, leave with the run's exit
    status.
    """
    from dsv4_conformance.report.write import write

    if report:
        write(result, report, commands.whole, commands.rerun, flags)
    if as_json:
        emit("conformance run", judged(result, report, commands), ok=result.ok)
        raise click.exceptions.Exit(0 if result.ok else 1)
    if report:
        click.echo(f"report: {report / 'report.html'}")
    for line in result.summary():
        click.echo(line)
    raise click.exceptions.Exit(0 if result.ok else 1)


def judged(result: Run, report: Path | None, commands: Commands) -> Judged:
    """What a run comes to, for scripts; every figure of it is in report.json."""
    failures = [
        Failure(
            id=f.id,
            status=f.status,
            claimed=f.claimed,
            message=f.message,
            rerun=f"{commands.rerun} --case {shlex.quote(f.id)}",
        )
        for f in result.failures()
    ]
    return Judged(
        backend=result.backend,
        version=result.version,
        numerics=result.numerics,
        tier=result.tier,
        command=commands.whole,
        level=result.level,
        claimed=result.claims_level,
        required=result.require,
        statuses=dict(Counter(f.status for f in result.findings)),
        failures=failures,
        stale=result.stale,
        report=str(report / "report.json") if report else None,
    )
