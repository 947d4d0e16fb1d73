"""``dsv4 ascend ...``."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4_core.files.writing import write_over

if TYPE_CHECKING:
    from dsv4_backend_ascend.backend import AscendBackend
    from dsv4_backend_ascend.selftest import Outcome


@click.group("ascend")
def command() -> None:
    """What only Ascend NPUs need."""


@command.command("selftest")
@click.option(
    "--simulate", metavar="CHIP", help="Dry run on simulated CANN: 910B, 910C or 950. Else on the NPU that is there."
)
@click.option("--device", help="Which NPU, e.g. npu:1.")
@click.option("--seed", default=0, show_default=True, help="Of the operands.")
@click.option("--small", is_flag=True, help="Without the cases at high addresses, which need up to 10 GB.")
@click.option("--contract", "contracts", multiple=True, help="Only this contract's cases; may be given several times.")
@click.option("--prefer", default="", metavar="triton", help="With the vector kernels of our own, too.")
@click.option("--together", is_flag=True, help="On an NPU: all in one process. Else each contract has one of its own.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the outcomes as JSON here.")
def selftest(
    simulate: str | None,
    device: str | None,
    seed: int,
    small: bool,
    contracts: tuple[str, ...],
    prefer: str,
    together: bool,
    report: Path | None,
) -> None:
    """Compare every CANN op that the backend calls with plain PyTorch ops on the same chip and with
    recorded expectations.

    Exit status: 0 no difference, 1 some, 2 could not run.
    """
    from dsv4_backend_ascend import selftest as tests
    from dsv4_backend_ascend.backend import AscendBackend

    given = {"simulate": simulate, "device": device, "prefer": prefer or None}
    backend = AscendBackend(**{name: value for name, value in given.items() if value is not None})
    click.echo(backend.describe().split("\n")[0])
    outcomes = []
    cases = tests.chosen(contracts)
    apart = backend.standing == "found" and not together and len({case.contract for case in cases}) > 1
    ran = (
        tests.apart(cases, seed=seed, small=small, device=device, words=["--prefer", prefer] if prefer else [])
        if apart
        else tests.run(backend, cases, seed=seed, small=small)
    )
    for outcome in ran:
        outcomes.append(outcome)
        click.echo(_line(outcome))
    differ = sum(bool(o.found) for o in outcomes)
    asked = sum(not o.skipped for o in outcomes)
    proven = "on simulated CANN: on hardware, not run" if simulate else "on this chip"
    click.echo(
        f"{asked} cases of the cann tier {proven}, {differ} differ; {len(outcomes) - asked} cases composed here, held against the expectations alone"
    )
    if report:
        write_over(report, json.dumps(_report(backend, outcomes), indent=1) + "\n")
    raise click.exceptions.Exit(1 if differ else 0)


@command.command("launches")
@click.option("--model", default="flash", show_default=True, help="A published model's sizes: flash or pro.")
@click.option("--soc", "socs", multiple=True, help="910B, 910C, 950; may be given several times. All, where none is.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    help="composed, cann, vendor; may be given several times. The latter two, where none is.",
)
@click.option("--start", default=5000, show_default=True, help="Tokens before the step.")
@click.option("--batch", default=1, show_default=True, help="Sequences, a token each.")
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the counts as JSON here.")
@click.option(
    "--before", type=click.Path(path_type=Path, dir_okay=False, exists=True), help="An earlier report, to stand beside."
)
def launches(
    model: str,
    socs: tuple[str, ...],
    tiers: tuple[str, ...],
    start: int,
    batch: int,
    report: Path | None,
    before: Path | None,
) -> None:
    """Count what one decode step launches, by contract and by where it runs, and capture it dry.
    Needs no NPU.

    Counted are operators as torch-npu is handed them. Exit status: 1 where one runs on AICPU or at
    no place that is known, or where the step could not be recorded.
    """
    from dsv4_backend_ascend import counted

    old = json.loads(before.read_text(encoding="utf-8")) if before else None
    found = counted.report(model, socs, tiers, start=start, batch=batch, before=old, said=click.echo)
    if report:
        write_over(report, json.dumps(found, indent=1) + "\n")
    raise click.exceptions.Exit(0 if counted.clean(found) else 1)


@command.command("prove")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of logs and report; what ended there is not run again.",
)
@click.option(
    "--simulate",
    metavar="CHIP",
    help="Go through the stages on simulated CANN: 910B, 910C or 950. Proves nothing of hardware.",
)
@click.option("--stage", "chosen", multiple=True, help="Only this stage; may be given several times.")
@click.option("--again", is_flag=True, help="Forget what the chosen stages did before.")
@click.option(
    "--seconds", default=600.0, show_default=True, help="The most a stage may take; what is left is run the next time."
)
def prove(out: Path, simulate: str | None, chosen: tuple[str, ...], again: bool, seconds: float) -> None:
    """Everything that a machine with an NPU can show, in stages of ten minutes, into one folder and
    one report.

    Needs no network. Run it again to go on. Exit status: 0 all passed, 1 something failed, 2 could
    not run, 3 not finished.
    """
    from dsv4_backend_ascend import prove as proving

    prover = proving.Prover(out, simulate=simulate, seconds=seconds)
    for name in proving.stages(chosen):
        stage = prover.stage(name, proving.STAGES[name], again=again)
        click.echo(stage.line)
    click.echo(f"{prover.write_report()}: {prover.heading}")
    raise click.exceptions.Exit(prover.status(proving.stages(chosen)))


def _line(outcome: Outcome) -> str:
    said = f"DIFFERS {outcome.found}" if outcome.found else "agrees"
    if outcome.skipped:
        said += f"; composed: {outcome.skipped}"
    return f"  {outcome.contract:14} {outcome.case:40} {', '.join(outcome.ops) or '-':40} {said}"


def _report(backend: AscendBackend, outcomes: list[Outcome]) -> dict[str, Any]:
    import torch

    return {
        "says": "every contract of the cann tier against the composed tier and recorded expectations",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "chip": backend.generation,
        "standing": backend.standing,
        "CANN": backend.cann_version,
        "torch": torch.__version__,
        "outcomes": [outcome._asdict() for outcome in outcomes],
    }
