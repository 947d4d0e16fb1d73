"""``dsv4 generate``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dsv4_core.cli.options import BackendFlags, backend_options, model_directory
from dsv4_core.cli.ranks import RankFlags, own_directory, rank_options, team

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@click.command("generate")
@click.argument("model", required=False)
@click.option(
    "--prompt",
    "-p",
    help="Text to continue, as it stands; a control token that it spells is words (--tokens takes ids).",
)
@click.option("--chat", help="A user's turn: encoded in the published chat format.")
@click.option("--system", default="", help="With --chat: the system turn.")
@click.option("--thinking", is_flag=True, help="With --chat: let the model think first.")
@click.option("--tokens", help="Token ids instead of text, e.g. 0,3,128.")
@click.option("--max-tokens", "-n", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", type=int, multiple=True, help="Token id that ends the text, beside end-of-sentence.")
@click.option("--ignore-eos", is_flag=True, help="Go on after end-of-sentence.")
@click.option(
    "--speculative",
    is_flag=False,
    flag_value=0,
    type=click.IntRange(0),
    metavar="[K]",
    help="Draft K tokens a step (as many as there can be where K is left out) with the checkpoint's MTP block or DSpark; same text.",
)
@click.option(
    "--draft-confidence",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    help="With DSpark: drafts end where the chance that all of them are kept falls below this.",
)
@click.option("--chunk", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of a prefill step.")
@rank_options
@backend_options
def command(
    model: str | None,
    prompt: str | None,
    chat: str | None,
    system: str,
    thinking: bool,
    tokens: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: tuple[int, ...],
    ignore_eos: bool,
    speculative: int | None,
    draft_confidence: float,
    chunk: int,
    flags: BackendFlags,
    asked: RankFlags,
) -> None:
    """Generate from MODEL (a checkpoint's directory; the embedded one if left out)."""
    from dsv4_core.cli.running import Session, report, stop_tokens
    from dsv4_core.graph.sampling import Sampling
    from dsv4_core.text.tokenizer import load_tokenizer

    if sum(given is not None for given in (prompt, chat, tokens)) != 1:
        raise click.UsageError("give one of --prompt, --chat and --tokens")
    sampling = Sampling(temperature, top_p, seed)
    if draft_confidence and speculative is None:
        raise click.UsageError("--draft-confidence shortens drafts; give --speculative, too")
    directory = own_directory(model_directory(model))
    if tokens is not None:
        ids = [int(t) for t in tokens.replace(",", " ").split()]
    else:
        ids = encode_prompt(load_tokenizer(directory), prompt, chat, system, thinking=thinking)
    request = {"tokens": ids, "max_tokens": max_tokens, "sampling": asdict(sampling), "chunk": chunk}
    request |= {
        "stop": sorted(stop),
        "ignore_eos": ignore_eos,
        "speculative": speculative,
        "confidence": draft_confidence,
    }
    with team(flags, asked) as ranks:
        session = Session.open(directory, flags, ranks, request, draft=speculative is not None)
        stops = set(stop) if ignore_eos else stop_tokens(session.model.config, stop)
        done = session.run(
            ids,
            max_tokens=max_tokens,
            sampling=sampling,
            speculative=speculative,
            confidence=draft_confidence,
            stop=stops,
            chunk=chunk,
        )
        if ranks.speaks:
            report(done.summary())


def encode_prompt(
    tokenizer: Tokenizer | None, prompt: str | None, chat: str | None, system: str, *, thinking: bool
) -> list[int]:
    """Text to ids; raise ``ValueError`` where the checkpoint has no tokenizer or the prompt no token."""
    from dsv4_core.text.chat import Message, encode
    from dsv4_core.text.markers import Piece
    from dsv4_core.text.tokenizer import Vocabulary

    if tokenizer is None:
        raise ValueError(
            "this checkpoint has no tokenizer.json; give --tokens with ids, or copy the tokenizer beside config.json"
        )
    if chat is not None:
        turns: list[Message] = [{"role": "system", "content": system}] if system else []
        pieces = encode([*turns, {"role": "user", "content": chat}], thinking=thinking)
    else:
        pieces = [Piece(prompt or "")]
    ids = Vocabulary(tokenizer).ids(pieces)
    if not ids:
        raise ValueError("the prompt is empty: give at least one token of text")
    return ids
