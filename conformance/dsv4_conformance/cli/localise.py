"""``dsv4 conformance localise``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4_conformance.check import Session
from dsv4_conformance.model import trace_file
from dsv4_conformance.model.localise import chosen, judge_all, ranges, report, save_findings, text_of
from dsv4_conformance.model.record import Recorded, Recorder, record
from dsv4_core.checkpoint.locate import find_model
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.cli.commands import Command, command_line
from dsv4_core.cli.options import BackendFlags, backend_options

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command("localise", cls=Command)
@click.argument("model", required=False)
@click.option("--against", metavar="NAME", help="Another backend, judged on the same inputs.")
@click.option("--tokens", default="160", show_default=True, help="How many random ones, or a .npy file [batch, total].")
@click.option(
    "--decode", type=click.IntRange(0), default=4, show_default=True, help="How many of them are fed one by one."
)
@click.option("--layers", metavar="0,2-5", help="Only these layers.")
@click.option("--positions", metavar="150-159", help="Only steps that feed one of these positions.")
@click.option(
    "--dump",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the run as a trace here, to be judged elsewhere.",
)
@click.option(
    "--trace",
    "traced",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Judge on a trace instead of a run.",
)
@click.option(
    "--cases",
    type=click.Path(path_type=Path, file_okay=False),
    default="localised",
    show_default=True,
    help="Where findings are saved.",
)
@backend_options
def command(
    flags: BackendFlags,
    model: str | None,
    against: str | None,
    tokens: str,
    decode: int,
    layers: str | None,
    positions: str | None,
    dump: Path | None,
    traced: Path | None,
    cases: Path,
) -> None:
    """Find the first op at which a backend, or two, leave the budget on a real model; exit status 1
    if there is one.
    """
    flags = flags.settled()
    name = str(flags.backend)
    session, ended = Session(flags.create()), ""
    if traced:
        calls = trace_file.read(traced, session.numerics)
        recorded = trace_file.stated(traced).checkpoint
        if model is not None and (here := Checkpoint(find_model(model)).identity()) != recorded:
            raise ValueError(f"{traced}: recorded on checkpoint {recorded}; {model} is {here}")
        click.echo(f"{traced}: {len(calls)} calls of checkpoint {recorded}")
        judged, names = judge_all(calls, session, again=True), (name, "trace")
    else:
        calls, ended = _run(find_model(model), session, tokens, decode, layers, positions)
        if dump:
            _dump(calls, dump, session, Checkpoint(find_model(model)).identity())
            return
        other = Session(_second(flags, against)) if against else None
        judged, names = judge_all(calls, session, other), (name, against or "")
    for line in report(judged, names):
        click.echo(line)
    if ended:
        click.echo(f"the run ended there: {ended}")
    replay = ["conformance", "run", "--backend", name, *flags.arguments(), "--case"]
    for path in save_findings(judged, cases, session.numerics):
        click.echo(f"saved; replay: {command_line([*replay, str(path)])}")
    raise click.exceptions.Exit(0 if all(j.ok for j in judged) and not ended else 1)


def _run(
    directory: Path, session: Session, tokens: str, decode: int, layers: str | None, positions: str | None
) -> tuple[list[Recorded], str]:
    checkpoint = Checkpoint(directory)
    ids = text_of(tokens, checkpoint.config)
    decode = min(decode, ids.shape[1] - 1)
    count, layer = checkpoint.config.num_hidden_layers, ranges(layers)
    if not any(map(layer, range(count))):
        raise ValueError(f"--layers {layers}: the model has layers 0 to {count - 1}")
    if not any(map(ranges(positions), range(ids.shape[1]))):
        raise ValueError(f"--positions {positions}: the run has positions 0 to {ids.shape[1] - 1}")
    recorder = Recorder(session.backend, chosen(layers, positions, ids.shape[1] - decode))
    return record(checkpoint, recorder, ids, decode), recorder.ended


def _second(flags: BackendFlags, against: str) -> Any:
    from dsv4_core.contract import registry

    return registry.create(against, numerics=flags.numerics)


def _dump(calls: Sequence[Recorded], directory: Path, session: Session, checkpoint: str) -> None:
    packed = trace_file.pack(calls, session.numerics, checkpoint)
    click.echo(f"{len(calls)} calls, {len(packed.tensors)} tensors, {packed.nbytes / 1e6:.1f} MB -> {directory}")
    trace_file.write(packed, directory)
    click.echo(f"judge it elsewhere: dsv4 conformance localise --trace {directory} --backend NAME")
