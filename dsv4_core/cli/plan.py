"""``dsv4 plan``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.table import Table

from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.cli.commands import Command, option
from dsv4_core.cli.console import wide_console
from dsv4_core.cli.options import Finite, json_option
from dsv4_core.planning.claims import claims
from dsv4_core.planning.plan import Ceiling, Hardware, Plan, per_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.dtypes import Format

GROWTH = tuple(1 << i for i in range(12, 21))  # 4K to 1M


class Tokens(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A number of tokens: ``4096``, ``64K``, ``1M`` (binary)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or fail naming the accepted forms."""
        text = str(value).upper()
        number, unit = (text[:-1], {"K": 1 << 10, "M": 1 << 20}[text[-1]]) if text[-1:] in {"K", "M"} else (text, 1)
        if not (number.isascii() and number.isdigit()) or int(number) < 1:
            self.fail(f"{value!r} is not a number of tokens; write e.g. 4096, 64K or 1M", param, ctx)
        return int(number) * unit


sequences = functools.partial(option, heading="What runs")
devices = functools.partial(option, heading="On which machine")
instead = functools.partial(option, heading="Other figures")


@click.command("plan", cls=Command)
@sequences(
    "--model", "-m", help="A preset (flash, pro-0813, ...) or a checkpoint's directory (only its headers are read)."
)
@sequences("--drafter", metavar="DIR", help="A directory whose MTP block or DSpark drafts for --model's.")
@sequences(
    "--context",
    type=Tokens(),
    show_default="the most that the model has positions for",
    help="Tokens a sequence holds, e.g. 64K.",
)
@sequences("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences decoded together.")
@devices(
    "--hardware",
    default="h100x8",
    show_default=True,
    help="h100, h200, b200, 910B, 910C, 950 and x devices; or a JSON file.",
)
@devices("--tp", type=click.IntRange(1), help="Ranks that share heads and vocabulary; else the best found.")
@devices("--ep", type=click.IntRange(1), help="Groups of such ranks, among which experts are spread.")
@devices("--price", type=Finite(0), help="Dollars an hour for the whole machine: gives the cost per million tokens.")
@instead(
    "--claims",
    "only_claims",
    is_flag=True,
    help="Published efficiency figures against those of our graph, and nothing else.",
)
@instead(
    "--picture",
    type=click.Path(path_type=Path),
    help="Draw FLOPs and cache against context (V3.2, Pro, Flash) to a file.",
)
@json_option
def command(
    model: str | None,
    drafter: str | None,
    context: int | None,
    batch: int,
    hardware: str,
    tp: int | None,
    ep: int | None,
    price: float | None,
    only_claims: bool,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Say whether a model fits a machine, and how fast it could be at best.

    The figures come from running the real graph on shapes; nothing is measured and no weight is
    read.
    """
    if only_claims:
        print_claims(as_json=as_json)
        return
    if picture:
        from dsv4_core.planning.picture import draw

        draw(picture)
        click.echo(f"wrote {picture}")
        if model is None:
            return
    if model is None:
        raise click.UsageError(
            "--model is needed: a preset (flash, pro, flash-0731, pro-0813) or a checkpoint's directory"
        )
    from dsv4_core.cli.running import bar, model_config

    machine = Hardware.parse(hardware)
    config, fmt = model_config(model, drafter)
    context = context or config.max_position_embeddings
    with bar("counting") as progress:
        plan = choose(config, context, machine, batch=batch, tp=tp, ep=ep, fmt=fmt, progress=progress)
        report = describe(plan, model, price, progress=progress)
    if as_json:
        from dsv4_core.cli import schema

        schema.emit("plan", msgspec.convert(report, schema.Planned))
    else:
        print_report(report)


def choose(
    config: ModelConfig,
    context: int,
    machine: Hardware,
    *,
    batch: int,
    tp: int | None,
    ep: int | None,
    fmt: Format,
    progress: Callable[[int, int], None],
) -> Plan:
    """Plan with the split that was asked for, else with the one that fits and decodes fastest."""
    devices = machine.devices
    if tp or ep:
        place = Place(tp or max(1, devices // (ep or 1)), ep or max(1, devices // (tp or 1)))
        return Plan(config, context, machine, place, batch, fmt)
    places = [Place(n, devices // n) for n in range(1, devices + 1) if devices % n == 0]
    plans = [Plan(config, context, machine, place, batch, fmt) for place in places if suits(place, config)]
    if not plans:
        raise ValueError(
            f"no split of {devices} devices suits {config.n_routed_experts} experts and {config.o_groups} o_groups"
        )
    reached = []
    for i, plan in enumerate(plans):
        reached.append((plan.verdict[0], plan.ceiling("decode").tokens_per_second))
        progress(i + 1, len(plans) + 1 + len(GROWTH))
    return plans[reached.index(max(reached))]


def suits(place: Place, config: ModelConfig) -> bool:
    """Whether a model can be cut so."""
    try:
        place.check(config)
    except ValueError:
        return False
    return True


def describe(plan: Plan, model: str, price: float | None, *, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Put everything in one dictionary, as ``schema.Planned`` has it."""
    fits, why = plan.verdict
    machine = plan.hardware
    ceilings = {}
    for phase in ("prefill", "decode"):
        ceiling = plan.ceiling(phase)
        rate = ceiling.tokens_per_second
        ceilings[phase] = {
            "tokens_per_second": rate,
            "limit": ceiling.limit,
            "seconds": ceiling.seconds,
            **({"dollars_per_million_tokens": price / 3600 / rate * 1e6} if price is not None else {}),
        }
    growth = []
    contexts = [context for context in GROWTH if context <= plan.config.max_position_embeddings]
    for i, context in enumerate(contexts):
        progress(i + 1, len(contexts))
        growth.append(grown(plan, context))
    return {
        "model": model,
        "context": plan.context,
        "batch": plan.batch,
        "hardware": {
            "name": machine.name,
            "devices": machine.devices,
            "memory": machine.memory,
            "source": machine.source,
        },
        "tp": plan.place.tp,
        "ep": plan.place.ep,
        "fits": fits,
        "why": why,
        "memory_per_rank": plan.memory,
        "cache_per_sequence": plan.graph.cache_bytes(plan.context),
        "sequences": plan.sequences,
        "decode_per_token_and_rank": per_token(plan.decode, plan.batch_per_group),
        "prefill_per_token_and_rank": per_token(plan.prefill, plan.context),
        "ceilings": ceilings,
        "growth": growth,
    }


def grown(plan: Plan, context: int) -> dict[str, Any]:
    """Decode at another context, on the same machine with as many sequences."""
    count = plan.graph.decode(plan.batch_per_group, context)
    ceiling = Ceiling.of(count, plan.hardware, plan.batch)
    return {
        "context": context,
        "equivalent_fp8": count.equivalent / plan.batch_per_group,
        "cache_per_sequence": plan.graph.cache_bytes(context),
        "weights_read": count.weights / plan.batch_per_group,
        "cache_read": count.read["cache"] / plan.batch_per_group,
        "tokens_per_second": ceiling.tokens_per_second,
        "limit": ceiling.limit,
    }


def print_report(report: dict[str, Any]) -> None:
    """Tables."""
    console, machine = wide_console(), report["hardware"]
    where = f"{machine['devices']} x {machine['name']} (tp {report['tp']}, ep {report['ep']})"
    console.print(report["model"], style="bold", end="")
    console.print(f" at {size(report['context'])} tokens, {report['batch']} sequence(s), on {where}")
    console.print(report["why"], style="green" if report["fits"] else "red")
    console.print(f"hardware: {machine['source']}")
    memory = table("memory of a rank", "kind", "GB")
    for kind, n in sorted(report["memory_per_rank"].items(), key=lambda item: -item[1]):
        memory.add_row(kind, f"{n / 1e9:.3f}")
    memory.add_row("in all", f"{sum(report['memory_per_rank'].values()) / 1e9:.3f}", style="bold")
    console.print(memory)
    console.print(
        f"cache of a sequence: {report['cache_per_sequence'] / 1e9:.3f} GB; {report['sequences']} such sequences fit\n"
    )

    work = table("per token and rank", "", "decode", "prefill")
    phases = [report["decode_per_token_and_rank"], report["prefill_per_token_and_rank"]]
    work.add_row("equivalent FP8 GFLOP", *(f"{p['equivalent_fp8'] / 1e9:.2f}" for p in phases), style="bold")
    for group, unit, scale in (
        ("operations", "GFLOP", 1e9),
        ("read", "MB read", 1e6),
        ("written", "MB written", 1e6),
        ("sent", "MB sent", 1e6),
    ):
        for key in dict.fromkeys([*phases[0][group], *phases[1][group]]):
            work.add_row(f"{key}, {unit}", *(f"{p[group].get(key, 0) / scale:.3f}" for p in phases))
    console.print(work)

    rates = table("ceiling (every limit at its peak, perfect overlap)", "", "tokens/s", "limit", "$ per million tokens")
    for phase, c in report["ceilings"].items():
        rates.add_row(
            phase,
            f"{c['tokens_per_second']:.1f}",
            c["limit"],
            f"{c['dollars_per_million_tokens']:.3f}" if len(c) > 3 else "-",
        )
    console.print(rates)

    growth = table(
        "decode, per rank",
        "context",
        "GFLOP (FP8)",
        "weights GB",
        "cache read MB",
        "cache GB/sequence",
        "tokens/s",
        "limit",
    )
    for g in report["growth"]:
        figures = (
            g["equivalent_fp8"] / 1e9,
            g["weights_read"] / 1e9,
            g["cache_read"] / 1e6,
            g["cache_per_sequence"] / 1e9,
            g["tokens_per_second"],
        )
        growth.add_row(size(g["context"]), *(f"{x:.2f}" for x in figures), g["limit"])
    console.print(growth)


def print_claims(*, as_json: bool) -> None:
    """Published against ours."""
    found = claims()
    if as_json:
        from dsv4_core.cli import schema

        rows = [schema.PublishedClaim(**vars(c), holds=c.holds) for c in found]
        schema.emit("plan --claims", schema.Claimed(claims=rows), ok=all(c.holds for c in found))
    else:
        shown = table("published figures against the graph's own", "", "published", "ours", "allowed", "")
        for c in found:
            shown.add_row(
                c.what,
                f"{c.published:g} {c.unit}",
                f"{c.ours:.2f} {c.unit}",
                f"{c.tolerance:g}",
                "holds" if c.holds else "differs",
                style="" if c.holds else "red",
            )
        wide_console().print(shown)
        click.echo(
            "A decode step at 2^20 tokens (mean over the last 128 positions), operations in FP8s: BF16 counts 2, FP4 x FP4 1/2,\n"
            "float32 4, elementwise work nothing. V3.2's side is counted from its published figures, ours by the graph and its cache."
        )
    if not all(c.holds for c in found):
        raise click.exceptions.Exit(1)


def table(title: str, *columns: str) -> Table:
    """Make a table whose figures are set to the right."""
    made = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return made


def size(tokens: int) -> str:
    """Write a number of tokens as it is said."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)
