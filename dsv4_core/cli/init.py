"""``dsv4 init``."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import ByteSize


def _ratios(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read ``0,4,128``, or fail saying what may stand there."""
    try:
        return tuple(int(ratio) for ratio in value.split(",")) if value is not None else None
    except ValueError:
        text = f"{value!r} is not a list of ratios; write one of 0, 4, 128 per layer, e.g. 0,4,128"
        raise click.BadParameter(text, ctx, param) from None


@click.command("init", cls=Command)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="tiny", show_default=True, help="Which model.")
@click.option("--layers", type=int, help="Keep the first N layers, and what drafts.")
@click.option("--experts", type=int, help="Routed experts per layer.")
@click.option(
    "--expert-dtype", type=click.Choice(["fp4", "fp8"]), default="fp4", show_default=True, help="Of routed experts."
)
@click.option("--ratios", callback=_ratios, help="Compress ratios of the kept layers, e.g. 0,4,128.")
@click.option("--max-position", type=int, help="max_position_embeddings.")
@click.option("--shard-size", type=ByteSize(), default="4GiB", show_default=True, help="Most bytes of a shard.")
@click.option("--seed", type=click.IntRange(0), required=True, help="The same seed gives the same bytes.")
def command(
    model_dir: Path,
    preset: str,
    layers: int | None,
    experts: int | None,
    expert_dtype: str,
    ratios: tuple[int, ...] | None,
    max_position: int | None,
    shard_size: int,
    seed: int,
) -> None:
    """Write a random checkpoint in the published layout to MODEL_DIR, which must be new or
    empty.
    """
    from dsv4_core.checkpoint import create
    from dsv4_core.cli.running import bar

    config = create.preset(
        PRESETS[preset],
        layers=layers,
        experts=experts,
        ratios=ratios,
        max_position=max_position,
        expert_dtype=expert_dtype,
    )
    with bar("writing (MiB)") as progress:
        size = create.create(
            model_dir,
            config,
            seed=seed,
            expert_format="e2m1" if expert_dtype == "fp4" else "e4m3",
            shard_size=shard_size,
            progress=lambda done, of: progress(done >> 20, of >> 20),
        )
    click.echo(f"{model_dir}: {config.num_hidden_layers} layers, {config.n_routed_experts} experts, {size} bytes")
