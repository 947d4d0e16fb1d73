"""``dsv4 ascend ...``."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4_core.files.writing import write

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
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the outcomes as JSON here.")
def selftest(simulate: str | None, device: str | None, seed: int, small: bool, report: Path | None) -> None:
    """Compare every CANN op that the backend calls with plain PyTorch ops on the same chip and with recorded expectations.

    Exit status: 0 no difference, 1 some, 2 could not run.
    """
    from dsv4_backend_ascend import selftest as tests
    from dsv4_backend_ascend.backend import AscendBackend

    given = {"simulate": simulate, "device": device}
    backend = AscendBackend(**{name: value for name, value in given.items() if value is not None})
    click.echo(backend.describe().split("\n")[0])
    outcomes = []
    for outcome in tests.run(backend, seed=seed, small=small):
        outcomes.append(outcome)
        click.echo(_line(outcome))
    differ = sum(bool(o.found) for o in outcomes)
    asked = sum(not o.skipped for o in outcomes)
    proven = "on simulated CANN: on hardware, not run" if simulate else "on this chip"
    click.echo(
        f"{asked} cases of the cann tier {proven}, {differ} differ; {len(outcomes) - asked} cases composed here, held against the expectations alone"
    )
    if report:
        write(report, json.dumps(_report(backend, outcomes), indent=1) + "\n")
    raise click.exceptions.Exit(1 if differ else 0)


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
