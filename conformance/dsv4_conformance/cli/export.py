"""``dsv4 conformance export`` and ``judge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from dsv4_conformance.check import TIERS
from dsv4_conformance.cli.run import Commands, Progress, finish
from dsv4_conformance.exchange.export import MANIFEST, export, judge, read_manifest
from dsv4_conformance.run.runner import Run
from dsv4_core.cli.commands import Command, command_line, typed
from dsv4_core.cli.options import NUMERICS
from dsv4_core.contract.spec import OPS
from dsv4_core.files.writing import writing_alone

if TYPE_CHECKING:
    from dsv4_core.contract.spec import Numerics, Tier


@click.command("export", cls=Command)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--tier", type=click.Choice(list(TIERS)), default="smoke", show_default=True, help="Which cases.")
@click.option(
    "--op", "ops", multiple=True, type=click.Choice(list(OPS)), metavar="NAME", help="Only this op; may be repeated."
)
@click.option(
    "--narrower",
    multiple=True,
    type=click.Choice([n for n, s in OPS.items() if s.narrower]),
    metavar="NAME",
    help="Budgets for what this op's contract lets a backend declare.",
)
@click.option("--numerics", type=NUMERICS, default="native", show_default=True, help="The mode that is judged.")
def command(directory: Path, tier: str, ops: tuple[str, ...], narrower: tuple[str, ...], numerics: str) -> None:
    """Write cases, inputs, expected outputs and budgets as safetensors and JSON; README.md there
    describes the layout.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory}: not an empty directory; give a new one, nothing is overwritten")
    declared = {op: OPS[op].narrower for op in narrower}
    with writing_alone(directory):
        count = sum(1 for _ in export(directory, cast("Tier", tier), cast("Numerics", numerics), ops, declared))
    size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
    click.echo(
        f"{count} cases, {size / 1e6:.1f} MB -> {directory}; judge results with: dsv4 conformance judge {directory} RESULTS"
    )


@click.command("judge", cls=Command)
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("results", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--op", "ops", multiple=True, type=click.Choice(list(OPS)), metavar="NAME", help="Only this op; may be repeated."
)
@click.option("--case", "cases", multiple=True, metavar="ID", help="Only this case; may be repeated.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.json, junit.xml and report.html here.",
)
def judge_command(
    directory: Path, results: Path, ops: tuple[str, ...], cases: tuple[str, ...], report: Path | None
) -> None:
    """Judge tensors that another program wrote to RESULTS for the cases in DIRECTORY; a case
    without results fails.
    """
    manifest = read_manifest(directory)
    judging = ["conformance", "judge"]
    commands = Commands(
        whole=command_line([*judging, *typed()]), rerun=command_line([*judging, str(directory), str(results)])
    )
    run = Run(
        f"results in {results}", tier=manifest["tier"], numerics=manifest["numerics"], partial=True, device="not stated"
    )
    progress, total = Progress(commands.rerun, quiet=False, detailed=False), len(manifest["cases"])
    for finding in judge(directory, results, ops, cases):
        run.findings.append(finding)
        progress(finding, len(run.findings), total)
    if not run.findings:
        raise ValueError(
            f"{directory}: holds no such case ({', '.join((*ops, *cases)) or 'none at all'}); {MANIFEST} lists them"
        )
    finish(run, report, commands, None)
