"""``dsv4 conformance run``, and what the other commands that judge share with it."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from dsv4_core.cli.options import BackendFlags, backend_options

if TYPE_CHECKING:
    from dsv4_conformance.check import Finding
    from dsv4_conformance.run.runner import Run
    from dsv4_core.contract.spec import Tier


def rerun_command(flags: BackendFlags, backend: str) -> str:
    """The command line that repeats a run of this backend; ``--case ID`` completes it."""
    words = ["dsv4", "conformance", "run", "--backend", backend]
    if flags.numerics != "native":
        words += ["--numerics", flags.numerics]
    for name, value in flags.options.items():
        words += ["--option", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return shlex.join(words)


@click.command("run")
@click.option(
    "--tier",
    type=click.Choice(["smoke", "standard", "full"]),
    default="standard",
    show_default=True,
    help="How much is run.",
)
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this op or law; may be repeated.")
@click.option("--case", "cases", multiple=True, metavar="ID", help="Only this case, of whatever tier; may be repeated.")
@click.option("--require", type=click.IntRange(0, 4), help="Fail unless this level is reached, claimed or not.")
@click.option(
    "--xfails", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file of expected failures."
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.json, junit.xml and report.html here.",
)
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Run checks in this many processes.")
@click.option("--isolate", is_flag=True, help="Run checks in another process, which may crash, hang or eat memory.")
@click.option("--time-limit", default=120.0, show_default=True, help="Seconds a check may take with --isolate.")
@click.option("--memory-limit", default=8192, show_default=True, help="Megabytes a process may use with --isolate.")
@click.option("--list", "listed", is_flag=True, help="Print the ids that would run, and stop.")
@click.option("--quiet", "-q", is_flag=True, help="Failures and the closing lines only.")
@backend_options
def run_command(
    flags: BackendFlags,
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
    listed: bool,
    quiet: bool,
) -> None:
    """Run the suite on a backend.

    Exit status: 0 all that was claimed or required passed, 1 something failed, 2 could not run.
    """
    from dsv4_conformance.check import Session
    from dsv4_conformance.laws.invariance import cost
    from dsv4_conformance.run import runner
    from dsv4_conformance.run import xfails as expected
    from dsv4_conformance.run.catalogue import collect
    from dsv4_conformance.run.isolate import Workers
    from dsv4_core.contract import registry

    name = flags.choose().name
    backend = flags.create()
    session = Session(backend, cast("Tier", tier))
    if listed:
        for check in runner.select(collect(session.tier, session.numerics, backend), ops, cases):
            click.echo(check.id)
        return
    rerun = rerun_command(flags, name)
    seconds, megabytes = (time_limit, memory_limit) if isolate else (math.inf, math.inf)
    on_device = str(getattr(session.backend, "device", "cpu")) != "cpu"
    workers = Workers(name, session.numerics, flags.options, session.tier, seconds, megabytes, jobs, sticky=on_device)
    result = runner.run(
        session,
        ops=ops,
        cases=cases,
        require=require,
        xfails=expected.load(xfails) if xfails else (),
        execute=workers.execute if isolate or jobs > 1 else None,
        progress=Progress(rerun, quiet=quiet, detailed=bool(cases)),
        version=registry.installed()[name].version,
    )
    result.backend = name
    if flags.options.get("batch_invariant") and not result.partial:
        click.echo(cost(backend))
    finish(result, report, rerun)


class Progress:
    """One line that moves, a block for each failure, a line for each that was not claimed."""

    def __init__(self, rerun: str, *, quiet: bool, detailed: bool) -> None:
        self.rerun, self.detailed = rerun, detailed
        self.moving = not quiet and sys.stderr.isatty()

    def __call__(self, finding: Finding, done: int, of: int) -> None:
        """Show a finding."""
        if self.moving:
            click.echo(f"\r\x1b[2K{done}/{of} {finding.id}", nl=done == of, err=True)
        if finding.status in {"passed", "unsupported", "xfailed"} and not self.detailed:
            return
        clear = "\r\x1b[2K" if self.moving else ""
        if not finding.counts and finding.status != "passed" and not self.detailed:
            click.echo(f"{clear}not claimed, and {finding.status}: {finding.id}")
            return
        colour = "green" if finding.status == "passed" else "red"
        click.echo(f"{clear}{click.style(finding.status.upper(), fg=colour)} {finding.id}")
        if finding.message:
            click.echo(f"    {finding.message}")
        if finding.status == "passed":
            figures = ", ".join(f"{k} {v:.3g}" for k, v in finding.metrics.items())
            click.echo(f"    {finding.used:.3g} of the budget used, worst {finding.worst}; {figures}")
        else:
            claim = "" if finding.counts else " (not claimed)"
            click.echo(f"    op {finding.op}, level {finding.level}{claim}; re-run: {self.rerun} --case {finding.id}")


def finish(result: Run, report: Path | None, rerun: str) -> None:
    """Print the closing lines, write the reports, leave with the run's exit status."""
    from dsv4_conformance.report.write import write

    if report:
        write(result, report, rerun)
        click.echo(f"report: {report / 'report.html'}")
    for line in result.summary():
        click.echo(line)
    raise click.exceptions.Exit(0 if result.ok else 1)
