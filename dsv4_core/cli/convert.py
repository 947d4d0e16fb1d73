"""``dsv4 convert``."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4_core.checkpoint.convert import Options, Tally, convert
from dsv4_core.cli.commands import Command


@click.command("convert", cls=Command)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tp", type=click.IntRange(1), help="Ranks that share heads, shared expert and vocabulary.")
@click.option("--ep", type=click.IntRange(1), help="Groups of such ranks; routed experts are spread over all ranks.")
@click.option(
    "--experts", type=click.Choice(["fp8"]), help="Routed experts from FP4 to FP8; lossless where scales allow."
)
@click.option(
    "--to",
    "form",
    type=click.Choice(["bf16", "transformers", "w8a8-int8"]),
    help="bf16: every quantised weight to BF16, lossless; transformers: the same, for its loader. w8a8-int8: int8 per channel, lossy: the error is printed.",
)
@click.option("--allow-lossy", is_flag=True, help="Round values that FP8 cannot hold; the blocks are counted.")
@click.option("--verify", is_flag=True, help="Read every byte of SOURCE to tell it from others, not samples.")
def command(
    source: Path,
    out: Path,
    tp: int | None,
    ep: int | None,
    experts: str | None,
    form: str | None,
    allow_lossy: bool,
    verify: bool,
) -> None:
    """Write a copy of the checkpoint SOURCE to OUT in another form.

    Started again after an interruption, it goes on where it stopped.
    """
    from dsv4_core.cli.running import bar

    tally = Tally()
    options = Options(tp, ep, experts or "", form in {"bf16", "transformers"}, form == "w8a8-int8", allow_lossy)
    with bar("converting (shards)") as progress:
        counts = convert(source, out, options, progress=progress, tally=tally, verify=verify)
    shards = f"{counts['written']} shards written, {counts['kept']} kept"
    click.echo(f"{out}: {counts['tensors']} tensors, {shards}; {counts['lossy_blocks']} blocks rounded")
    if tally:
        click.echo("W8A8 is lossy. Error of the weights, relative to their root mean square:")
        for kind, error in tally.errors().items():
            click.echo(f"  {kind:14} {error['relative_rms']:.3%}, worst tensor {error['worst_tensor']:.3%}")
