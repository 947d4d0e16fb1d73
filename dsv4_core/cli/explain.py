"""``dsv4 explain``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from dsv4_core.cli.commands import Command, option
from dsv4_core.cli.options import BackendFlags, backend_options, json_option

if TYPE_CHECKING:
    from dsv4_core.cli.schema import Explained, Run
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Support
    from dsv4_core.planning.shapes import Call


@click.command("explain", cls=Command)
@option("--model", "-m", help="A preset (tiny, flash, pro) or a checkpoint's directory; the embedded one if left out.")
@option("--layer", type=int, help="Only the ops of one layer.")
@backend_options
@json_option
def command(model: str | None, layer: int | None, flags: BackendFlags, as_json: bool) -> None:
    """Say op by op who would run MODEL's prefill and decode, and where nobody can, why.

    Required ops that this backend is never asked for, because it runs fused ops whole, are there
    with no calls. Reads no weight; exits with 1 if an op is missing.
    """
    from dsv4_core.cli import schema
    from dsv4_core.cli.running import model_config
    from dsv4_core.planning.support import planned_calls, uncalled

    config, fmt = model_config(model)
    if layer is not None and not 0 <= layer < config.layers:
        raise click.UsageError(
            f"--layer {layer}: the model has layers 0 .. {config.layers - 1}, the MTP block's among them"
        )
    backend = flags.create()
    calls = [call for call in planned_calls(config, backend, fmt) if layer is None or call.layer == layer]
    name, *notes = backend.describe().split("\n")
    result = explained(backend, calls, schema.Run(model=model, backend=name, numerics=backend.numerics))
    if layer is None:
        result.ops += [
            schema.ExplainedOp(
                op=op, weight="", calls=0, by=answer.by or None, reason=answer.reason, proof=answer.proof
            )
            for op, answer in uncalled(config, backend, fmt, calls)
        ]
        result.missing = sum(op.by is None for op in result.ops)
    if as_json:
        schema.emit("explain", result, ok=not result.missing)
    else:
        print_table(result, notes)
    raise click.exceptions.Exit(1 if result.missing else 0)


def explained(backend: Backend, calls: list[Call], run: Run) -> Explained:
    """One entry for each op and weight's dtype: who runs it, and (of backends that keep account)
    how far that was proven.
    """
    from dsv4_core.cli.schema import Explained, ExplainedOp

    rows: Counter[tuple[str, str, Support]] = Counter()
    for call in calls:
        weight = next((v.dtype for name, v in call.operands.items() if name in _WEIGHTS and hasattr(v, "dtype")), "")
        rows[call.op, weight, backend.supports(call.op, **call.operands)] += 1
    ops = [
        ExplainedOp(op=op, weight=weight, calls=n, by=answer.by or None, reason=answer.reason, proof=answer.proof)
        for (op, weight, answer), n in rows.items()
    ]
    return Explained(run=run, ops=ops, missing=sum(1 for op in ops if op.by is None))


def print_table(result: Explained, notes: list[str]) -> None:
    """Write a row for each entry."""
    run = result.run
    title = f"{run.backend}, numerics {run.numerics}, model {run.model or 'embedded'}"
    click.echo(f"{title}: calls of a 512-token prefill and a decode step together")
    click.echo("".join(f"{note}\n" for note in notes))
    table = [
        ("op", "weight", "calls", "run by", "proof" if any(op.proof for op in result.ops) else ""),
        *((op.op, op.weight, str(op.calls), op.by or f"NOBODY: {op.reason}", op.proof) for op in result.ops),
    ]
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo(f"\n{len({op.op for op in result.ops})} ops, {result.missing} that nobody runs")


_WEIGHTS = ("weight", "w1", "fn")
