"""``dsv4 rehearse``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.tensors import INDEX
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import BackendFlags, ByteSize, backend_options
from dsv4_core.planning import rehearse


@click.command("rehearse", cls=Command)
@click.option("--preset", type=click.Choice(sorted(PRESETS)), required=True, help="Which model.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory for the sparse checkpoint; one written before is used again.",
)
@click.option("--tokens", type=click.IntRange(1), default=3, show_default=True, help="Tokens to generate.")
@click.option("--prompt", type=click.IntRange(1), default=1, show_default=True, help="Tokens of the prompt.")
@click.option(
    "--memory",
    type=ByteSize(),
    default="8GiB",
    show_default=True,
    help="Give weights' pages back when more than this is resident.",
)
@backend_options
def command(preset: str, out: Path, tokens: int, prompt: int, memory: int, flags: BackendFlags) -> None:
    """Write a full-size checkpoint as sparse files and generate a few tokens through all its
    layers.

    Big weights are holes that read as zero, so the text means nothing; time, memory and bytes
    touched are real, and printed next to what the planner says.
    """
    from dsv4_core.cli.running import bar
    from dsv4_core.planning.support import check_support, expert_format

    if not (out / INDEX).exists():
        began = time.perf_counter()
        with bar("writing (MiB)") as progress:
            size = rehearse.write(out, PRESETS[preset], progress=lambda done, of: progress(done >> 20, of >> 20))
        disk = rehearse.on_disk(out) / 1e9
        click.echo(
            f"wrote {out}: {size / 1e9:.2f} GB of tensors, {disk:.2f} GB on the disk, in {time.perf_counter() - began:.1f} s"
        )
    began = time.perf_counter()
    backend, checkpoint = flags.create(), Checkpoint(out)
    if checkpoint.config != PRESETS[preset]:
        raise ValueError(f"{out} is not a checkpoint of {preset} (its config.json differs); give another directory")
    check_support(checkpoint.config, backend, expert_format(checkpoint))
    with bar("loading") as progress:
        model = rehearse.Rehearsal(checkpoint, backend, memory=memory, progress=progress)
    click.echo(
        f"opened and mapped {len(checkpoint.names)} tensors, {checkpoint.nbytes / 1e9:.2f} GB, {checkpoint.config.layers} layers, in"
        f" {time.perf_counter() - began:.1f} s; backend {backend.name}, {rehearse.resident() / 1e9:.2f} GB resident"
    )
    reports = []
    for r in rehearse.run(model, [1] * prompt, tokens):
        reports.append(r)
        click.echo(
            f"{r.tokens} token(s): {r.seconds:.1f} s, touched {r.touched / 1e9:.3f} GB of weights, plan said {r.predicted / 1e9:.3f}"
            f" ({r.touched / r.predicted - 1:+.1%}), at most {r.peak / 1e9:.2f} GB resident, sampled {r.sampled}"
        )
    s = rehearse.summary(reports)
    if s["difference"] < -0.1:
        click.echo(
            "fewer pages were counted than read: memory ran short and the system took some back first; run it with a smaller "
            "--memory, or with nothing beside it",
            err=True,
        )
    weights = f"touched {s['touched'] / 1e9:.2f} GB, plan said {s['predicted'] / 1e9:.2f} ({s['difference']:+.2%})"
    click.echo(
        f"{len(reports)} steps in {s['seconds']:.1f} s: {weights}; peak resident {rehearse.peak_resident() / 1e9:.2f} GB"
    )
