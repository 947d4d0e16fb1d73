"""``dsv4 explain``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.cli.options import BackendFlags, backend_options, model_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Format
    from dsv4_core.contract.spec import Support
    from dsv4_core.planning.shapes import Call


@click.command("explain")
@click.option(
    "--model", "-m", help="A preset (tiny, flash, pro) or a checkpoint's directory; the embedded one if left out."
)
@click.option("--layer", type=int, help="Only the ops of one layer.")
@backend_options
def command(model: str | None, layer: int | None, flags: BackendFlags) -> None:
    """Say op by op who would run MODEL's prefill and decode, and where nobody can, why.

    Reads no weight; exits with 1 if an op is missing.
    """
    from dsv4_core.cli.running import planned_calls

    config, fmt = _model(model)
    backend = flags.create()
    calls = [call for call in planned_calls(config, backend, fmt) if layer is None or call.layer == layer]
    name, *notes = backend.describe().split("\n")
    title = f"{name}, numerics {backend.numerics}, model {model or 'embedded'}"
    raise click.exceptions.Exit(print_table(backend, calls, title, notes))


def _model(model: str | None) -> tuple[ModelConfig, Format]:
    if model in PRESETS and not Path(model).is_dir():
        return PRESETS[model], "e2m1"
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.cli.running import expert_format

    checkpoint = Checkpoint(model_directory(model))
    return checkpoint.config, expert_format(checkpoint)


def print_table(backend: Backend, calls: list[Call], title: str, notes: Sequence[str] = ()) -> int:
    """One row for each op, who runs it, and (of backends that keep account) how far that was proven; give the exit status."""
    rows: Counter[tuple[str, str, Support]] = Counter()
    for call in calls:
        weight = next((v.dtype for name, v in call.operands.items() if name in _WEIGHTS and hasattr(v, "dtype")), "")
        rows[call.op, weight, backend.supports(call.op, **call.operands)] += 1
    click.echo(f"{title}: calls of a 512-token prefill and a decode step together")
    click.echo("".join(f"{note}\n" for note in notes))
    table = [
        ("op", "weight", "calls", "run by", "proof" if any(answer.proof for _, _, answer in rows) else ""),
        *((op, w, str(n), a.by or f"NOBODY: {a.reason}", a.proof) for (op, w, a), n in rows.items()),
    ]
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    missing = sum(1 for _, _, answer in rows if not answer)
    click.echo(f"\n{len({op for op, *_ in rows})} ops, {missing} that nobody runs")
    return 1 if missing else 0


_WEIGHTS = ("weight", "w1", "fn")
