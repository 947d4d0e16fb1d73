"""``dsv4 inspect``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from dsv4_core.checkpoint.locate import find_model
from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import json_option

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.checkpoint.findings import Finding
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.cli.schema import Inspected


@click.command("inspect", cls=Command)
@click.argument("model", required=False)
@click.option("--no-audit", is_flag=True, help="Read headers only, no values.")
@json_option
def command(model: str | None, no_audit: bool, as_json: bool) -> None:
    """Show MODEL's configuration, tensors and parameters, and audit its values (the embedded
    checkpoint if left out).

    Exits with 1 if something is wrong with the checkpoint, with 2 if there is none.
    """
    from dsv4_core.checkpoint.audit import audit
    from dsv4_core.checkpoint.rank_copy import cut_for, faults
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.cli.running import bar

    directory = find_model(model)
    with bar("reading headers") as progress:
        checkpoint = Checkpoint(directory, check=False, progress=progress)
    findings = checkpoint.findings
    if not no_audit:
        with bar("auditing (MiB)") as progress:
            findings = audit(checkpoint, progress=lambda done, of: progress(done >> 20, of >> 20))
    if place := cut_for(directory):  # what opening found is of a whole model
        findings = [*faults(checkpoint, place), *findings[len(checkpoint.findings) :]]
        click.echo(f"rank {place.rank} of {place.ranks} (tp {place.tp}, ep {place.ep}): a part of a model", err=as_json)
    if as_json:
        from dsv4_core.cli.schema import emit

        sound = not any(f.severity == "error" for f in findings)
        emit("inspect", _document(checkpoint, findings, audited=not no_audit), ok=sound)
    else:
        _print(checkpoint, findings, audited=not no_audit)
    raise click.exceptions.Exit(int(any(f.severity == "error" for f in findings)))


def _groups(checkpoint: Checkpoint) -> list[tuple[str, str, int, int]]:
    """Kind, dtype, tensors, bytes: in the order in which kinds appear in the model."""
    tensors: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[str, str]] = Counter()
    for name in checkpoint.names:
        stored, kind = checkpoint.stored(name), checkpoint.layout[name].kind
        tensors[kind, stored.dtype] += 1
        size[kind, stored.dtype] += stored.end - stored.begin
    order = list(dict.fromkeys(spec.kind for spec in checkpoint.layout.values()))
    keys = sorted(tensors, key=lambda key: (order.index(key[0]), key[1]))  # type: ignore[arg-type]
    return [(*key, tensors[key], size[key]) for key in keys]


def _document(checkpoint: Checkpoint, findings: Iterable[Finding], *, audited: bool) -> Inspected:
    from dsv4_core.checkpoint.layout import parameters
    from dsv4_core.cli import schema

    tensors = [
        schema.Tensors(kind=kind, dtype=dtype, count=count, bytes=size)
        for kind, dtype, count, size in _groups(checkpoint)
    ]
    return schema.Inspected(
        path=str(checkpoint.path),
        config=checkpoint.config.to_dict(),
        parameters=parameters(checkpoint.config)._asdict(),
        bytes=checkpoint.nbytes,
        tensors=tensors,
        audited=audited,
        findings=[schema.Finding(**finding._asdict()) for finding in findings],
    )


def _print(checkpoint: Checkpoint, findings: list[Finding], *, audited: bool) -> None:
    from dsv4_core.checkpoint.findings import summary
    from dsv4_core.checkpoint.layout import parameters
    from dsv4_core.cli.console import Console

    console = Console(soft_wrap=True)
    counts, total = parameters(checkpoint.config), checkpoint.nbytes
    files = len({checkpoint.file(name) for name in checkpoint.names})
    console.print(str(checkpoint.path), style="bold", end="")
    console.print(f": {len(checkpoint.names)} tensors, {_size(total)}, {files} file{'s' * (files != 1)}")
    drafter = {"": "", "mtp": "the MTP block", "dspark": "DSpark"}[checkpoint.config.draft]
    apart = f"{drafter}, {_count(counts.draft)} more, is in neither; " if drafter else ""
    console.print(
        f"parameters: {_count(counts.total)} total, {_count(counts.active)} active per token "
        f"({apart}the embedding, of which a token reads one row, is not in active)\n"
    )
    console.print(_configuration(checkpoint.config))
    table = _table("tensors", "kind", "dtype", "count>", "bytes>", "share>")
    for kind, dtype, count, size in _groups(checkpoint):
        table.add_row(kind, dtype, f"{count:,}", _size(size), f"{100 * size / (total or 1):.1f} %")
    console.print(table)
    errors = [f for f in findings if f.severity == "error"]
    for title, some in (("error", errors), ("note", [f for f in findings if f.severity == "note"])):
        for line in summary(some):
            console.print(f"{title}: {line}", style="red" if title == "error" else "yellow")
    what = "names, dtypes, shapes, scale grids" + (", values" if audited else " (values not read: --no-audit)")
    if errors:
        console.print(f"{len(errors)} error{'s' * (len(errors) != 1)} in {what}; --json lists every one")
    else:
        console.print(f"sound: {what}")


def _configuration(config: ModelConfig) -> Table:
    table = _table("configuration", "key", "value", "key", "value")
    rows = [(key, str(value)) for key, value in config.to_dict().items() if key != "compress_ratios"]
    short = [row for row in rows if len(row[1]) <= 24]
    half = -(-len(short) // 2)
    for left, right in zip(short[:half], [*short[half:], ("", "")], strict=False):
        table.add_row(*left, *right)
    ratios = Counter(config.compress_ratios[: config.num_hidden_layers])
    kinds = {0: "window", 4: "CSA", 128: "HCA"}
    table.caption = "layers: " + ", ".join(f"{n} {kinds[m]} (ratio {m})" for m, n in sorted(ratios.items()))
    drafts = {"": "none", "mtp": "an MTP block", "dspark": f"DSpark, {config.stages} stages"}
    table.caption += f"\nspeculation: {drafts[config.draft]}"
    yarn = config.rope_scaling
    table.caption += f"\nYaRN from {yarn.original_max_position_embeddings} by {yarn.factor:g} on layers with a ratio"
    table.caption_justify = "left"
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table


def _size(n: int) -> str:
    for unit, power in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= power:
            return f"{n / power:.2f} {unit}"
    return f"{n} B"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 10**9 else f"{n / 1e6:.2f}M"
