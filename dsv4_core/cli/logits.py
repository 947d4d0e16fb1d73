"""``dsv4 logits``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import BackendFlags, RankFlags, backend_options, rank_options


@click.command("logits", cls=Command)
@click.argument("model", required=False)
@click.option(
    "--tokens", "tokens_file", required=True, type=click.Path(path_type=Path), help="Token ids, .npy [batch, total]."
)
@click.option(
    "--prefill", type=click.IntRange(1), required=True, help="Tokens fed as the prompt; the rest follow one by one."
)
@click.option("--chunk", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of a prefill step.")
@click.option("--mtp", is_flag=True, help="Also the MTP block's logits after the prompt (needs total > prefill).")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Where to write: .npz with logits, mtp_logits."
)
@rank_options
@backend_options
def command(
    model: str | None,
    tokens_file: Path,
    prefill: int,
    chunk: int,
    mtp: bool,
    out: Path,
    flags: BackendFlags,
    asked: RankFlags,
) -> None:
    """Teacher-forced logits: of the last prompt token and of each token after it, [batch, 1 + total
    - prefill, vocab].
    """
    import numpy as np

    from dsv4_core.cli.running import bar, open_model, report
    from dsv4_core.files.reading import integers
    from dsv4_core.files.writing import replaceable, whole
    from dsv4_core.graph.evaluate import teacher_forced
    from dsv4_core.graph.sampling import NO_NUMBER
    from dsv4_core.graph.step import check_ids

    replaceable(out, b"PK")
    tokens = integers(tokens_file, "write ids [batch, total] with numpy.save")
    total = tokens.shape[1] if tokens.ndim == 2 else -1
    if total < prefill + mtp:
        need = "more than" if mtp else "at least"
        raise ValueError(
            f"{tokens_file}: shape {list(tokens.shape)} must be [batch, total] with total {need} --prefill {prefill}"
        )
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    request = {"tokens": digest, "shape": tokens.shape, "prefill": prefill, "chunk": chunk, "mtp": mtp}
    with open_model(model, flags, asked) as session:
        check_ids(tokens, session.config.vocab_size)
        session.ranks.agree({"request": request})
        if mtp and session.config.draft != "mtp":
            raise ValueError(f"--mtp: {session.directory} has no MTP block; leave it out")
        graph = session.model
        if mtp:
            session.load_drafter()
        with bar("tokens") as progress:
            results = teacher_forced(graph, tokens, prefill=prefill, chunk=chunk, mtp=mtp, progress=progress)
        session.checkpoint.hold()
        stats = session.ranks.report() if asked.stats else ""
    if not session.speaks:
        return
    if stats:
        report(stats.rstrip())
    with whole(out) as file:  # under the very name that was asked for
        np.savez(file, **results)  # type: ignore[arg-type]  # its stub takes allow_pickle for an array
    for name, values in results.items():
        click.echo(f"{out}: {name} {list(values.shape)} {values.dtype}")
    if wrong := [
        f"{name} {at[0].tolist()}" for name, values in results.items() if len(at := np.argwhere(~np.isfinite(values)))
    ]:
        raise ValueError(f"{out}: {wrong[0]} is the first that is no finite number; {NO_NUMBER}")
