"""``dsv4 bench``."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsv4_core.cli.options import BackendFlags, backend_options, model_directory

if TYPE_CHECKING:
    from dsv4_core.graph.model import Model
    from dsv4_core.planning.plan import Ceiling


@click.command("bench")
@click.argument("model", required=False)
@click.option("--prompt", default=512, show_default=True, type=click.IntRange(1), help="Tokens of each prompt.")
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(1), help="Tokens decoded after it.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Sequences side by side.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1), help="Repetitions; one more warms up.")
@click.option("--chunk", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of a prefill step.")
@click.option(
    "--hardware",
    metavar="NAME",
    help="Also the share of this device's roofline, as `dsv4 plan` counts it: h100x1, h200x1 ...",
)
@backend_options
def command(
    model: str | None,
    prompt: int,
    tokens: int,
    batch: int,
    runs: int,
    chunk: int,
    hardware: str | None,
    flags: BackendFlags,
) -> None:
    """Measure prefill and decode of MODEL (the embedded one if left out): tokens per second, median of the runs.

    Prompts are random ids. A decode step ends when its token is on the host, as in generation.
    """
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.cli.running import Session, expert_format

    directory = Path(model_directory(model))
    loaded = Session.open(directory, flags).model
    positions = loaded.config.max_position_embeddings
    if prompt + tokens > positions:
        raise click.UsageError(
            f"--prompt {prompt} and --tokens {tokens} together exceed the model's {positions} positions; choose fewer"
        )
    measure(loaded, prompt, tokens, batch, chunk)
    times = [measure(loaded, prompt, tokens, batch, chunk) for _ in range(runs)]
    ceilings = (
        roofline(loaded, prompt, tokens, batch, chunk, hardware, expert_format(Checkpoint(directory)))
        if hardware
        else {}
    )
    be = loaded.backend
    click.echo(
        f"{be.describe().splitlines()[0]}, numerics {be.numerics}; model {model or 'embedded'}, "
        f"{prompt} tokens and {tokens} after them, batch {batch}; median of {runs} (slowest to fastest)"
    )
    counts = {"prefill": batch * prompt, "decode": batch * tokens}
    for i, phase in enumerate(("prefill", "decode")):
        seconds = sorted(run[i] for run in times)
        rate = counts[phase] / statistics.median(seconds)
        line = (
            f"{phase:8} {rate:10.1f} tokens/s ({counts[phase] / seconds[-1]:.1f} to {counts[phase] / seconds[0]:.1f})"
        )
        if phase in ceilings:
            best = ceilings[phase]
            line += f"; {rate / best.tokens_per_second:.1%} of {hardware}'s roofline, {best.tokens_per_second:.0f} tokens/s bound by {best.limit} (counted)"
        click.echo(line)


def measure(model: Model, prompt: int, tokens: int, batch: int, chunk: int) -> tuple[float, float]:
    """Seconds of a prefill up to its first token on the host, and of the ``tokens`` decode steps after it."""
    import numpy as np

    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.generate import prefill
    from dsv4_core.graph.replay import Replay
    from dsv4_core.graph.step import Step

    be, vocab = model.backend, model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, (batch, prompt))
    cache = Cache(be, model.config, batch, prompt + tokens, rewindable=0)
    uniform = be.from_numpy(np.zeros(batch, np.float32))
    began = time.perf_counter()
    logits = model.logits(prefill(model, cache, ids, chunk=chunk).streams)
    picked = np.asarray(be.to_numpy(be.sample(logits, uniform, temperature=0.0, top_p=1.0)))
    first = time.perf_counter()
    replay = Replay(model, cache)
    for _ in range(tokens):
        step = Step(cache, picked[:, None])
        logits = replay.logits(step)
        cache.advance(step.sequences, step.ends)
        picked = np.asarray(be.to_numpy(be.sample(logits, uniform, temperature=0.0, top_p=1.0)))
    return first - began, time.perf_counter() - first


def roofline(
    model: Model, prompt: int, tokens: int, batch: int, chunk: int, hardware: str, fmt: str
) -> dict[str, Ceiling]:
    """The best that one such device could do, from operations and bytes counted on the graph; nothing here is measured."""
    from typing import cast

    from dsv4_core.contract.dtypes import Format
    from dsv4_core.planning.counting import Count, total
    from dsv4_core.planning.plan import Ceiling, Graph, Hardware

    device = Hardware.parse(hardware)
    graph = Graph(model.config, numerics=model.backend.numerics, expert_format=cast("Format", fmt))
    filling = Count()
    for start in range(0, prompt, chunk):
        filling.add(total(graph.step(batch, min(chunk, prompt - start), start)), 1)
    middle = min(prompt + tokens // 2, model.config.max_position_embeddings - 1)
    return {
        "prefill": Ceiling.of(filling, device, batch * prompt),
        "decode": Ceiling.of(total(graph.step(batch, 1, middle)), device, batch),
    }
