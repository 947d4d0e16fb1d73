"""``dsv4 bench``."""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING

import click

from dsv4_core.cli.commands import Command, option
from dsv4_core.cli.options import BackendFlags, backend_options, json_option

if TYPE_CHECKING:
    from dsv4_core.cli.schema import Rate
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array
    from dsv4_core.graph.model import Model
    from dsv4_core.planning.plan import Ceiling

measured = functools.partial(option, heading="What is measured")


@click.command("bench", cls=Command)
@click.argument("model", required=False)
@measured("--prompt", default=512, show_default=True, type=click.IntRange(1), help="Tokens of each prompt.")
@measured("--tokens", default=32, show_default=True, type=click.IntRange(1), help="Tokens decoded after it.")
@measured("--batch", default=1, show_default=True, type=click.IntRange(1), help="Sequences side by side.")
@measured("--runs", default=3, show_default=True, type=click.IntRange(1), help="Repetitions; one more warms up.")
@measured("--chunk", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of a prefill step.")
@measured(
    "--hardware",
    metavar="NAME",
    help="Also the share of this device's roofline, as `dsv4 plan` counts it: h100x1, h200x1 ...",
)
@backend_options
@json_option
def command(
    model: str | None,
    prompt: int,
    tokens: int,
    batch: int,
    runs: int,
    chunk: int,
    hardware: str | None,
    flags: BackendFlags,
    as_json: bool,
) -> None:
    """Measure prefill and decode of MODEL (the embedded one if left out): tokens per second, median
    of the runs.

    Prompts are random ids. A decode step ends when its token is on the host, as in generation.
    """
    from dsv4_core.cli import schema
    from dsv4_core.cli.running import open_model
    from dsv4_core.planning.plan import Hardware
    from dsv4_core.planning.support import expert_format

    if hardware:
        Hardware.parse(hardware)  # before weights load
    with open_model(model, flags) as session:
        positions, be = session.config.max_position_embeddings, session.backend
        if prompt + tokens > positions:
            raise click.UsageError(
                f"--prompt {prompt} and --tokens {tokens} together exceed the model's {positions} positions; choose fewer"
            )
        loaded = session.model
        measure(loaded, prompt, tokens, batch, chunk)
        times = [measure(loaded, prompt, tokens, batch, chunk) for _ in range(runs)]
        fmt = expert_format(session.checkpoint)
        ceilings = roofline(loaded, prompt, tokens, batch, chunk, hardware, fmt) if hardware else {}
    counts = {"prefill": batch * prompt, "decode": batch * tokens}
    rates = {
        phase: rate(counts[phase], [run[i] for run in times], hardware, ceilings.get(phase))
        for i, phase in enumerate(("prefill", "decode"))
    }
    run = schema.Run(model=model, backend=be.describe().splitlines()[0], numerics=be.numerics)
    if as_json:
        result = schema.Benched(run=run, prompt=prompt, tokens=tokens, batch=batch, runs=runs, **rates)
        schema.emit("bench", result)
        return
    click.echo(
        f"{run.backend}, numerics {run.numerics}; model {model or 'embedded'}, "
        f"{prompt} tokens and {tokens} after them, batch {batch}; median of {runs} (slowest to fastest)"
    )
    for phase, r in rates.items():
        line = f"{phase:8} {r.tokens_per_second:10.1f} tokens/s ({r.slowest:.1f} to {r.fastest:.1f})"
        if best := r.roofline:
            line += f"; {best.share:.1%} of {hardware}'s roofline, {best.tokens_per_second:.0f} tokens/s bound by {best.limit} (counted)"
        click.echo(line)


def rate(tokens: int, seconds: list[float], hardware: str | None, best: Ceiling | None) -> Rate:
    """Tokens per second of several runs, and beside the best that a machine could do."""
    from dsv4_core.cli.schema import Rate, Roofline

    middle = tokens / statistics.median(seconds)
    share = None
    if hardware and best:
        share = Roofline(
            hardware=hardware,
            tokens_per_second=best.tokens_per_second,
            limit=best.limit,
            share=middle / best.tokens_per_second,
        )
    return Rate(tokens_per_second=middle, slowest=tokens / max(seconds), fastest=tokens / min(seconds), roofline=share)


def measure(model: Model, prompt: int, tokens: int, batch: int, chunk: int) -> tuple[float, float]:
    """Seconds of a prefill up to its first token on the host, and of the ``tokens`` decode steps
    after it.
    """
    import numpy as np

    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.generate import prefill
    from dsv4_core.graph.replay import Replay
    from dsv4_core.graph.sampling import NoNumberError
    from dsv4_core.graph.step import Step

    be, vocab = model.backend, model.config.vocab_size

    def picked_of(logits: Array) -> Host:
        picked = np.asarray(be.to_numpy(be.sample(logits, uniform, temperature=0.0, top_p=1.0)))
        if (picked < 0).any():
            raise NoNumberError(int(cache.lengths[0]))
        return picked

    ids = np.random.default_rng(0).integers(0, vocab, (batch, prompt))
    cache = Cache(be, model.config, batch, prompt + tokens, rewindable=0)
    uniform = be.from_numpy(np.zeros(batch, np.float32))
    began = time.perf_counter()
    logits = model.logits(prefill(model, cache, ids, chunk=chunk).streams)
    picked = picked_of(logits)
    first = time.perf_counter()
    replay = Replay(model, cache)
    for _ in range(tokens):
        step = Step(cache, picked[:, None])
        logits = replay.logits(step)
        cache.advance(step.sequences, step.ends)
        picked = picked_of(logits)
    return first - began, time.perf_counter() - first


def roofline(
    model: Model, prompt: int, tokens: int, batch: int, chunk: int, hardware: str, fmt: str
) -> dict[str, Ceiling]:
    """The best that one such device could do, from operations and bytes counted on the graph;
    nothing here is measured.
    """
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
