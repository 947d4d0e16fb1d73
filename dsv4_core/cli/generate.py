"""``dsv4 generate``."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4_core.cli.commands import Command, option
from dsv4_core.cli.options import BackendFlags, Finite, RankFlags, backend_options, json_option, rank_options
from dsv4_core.files import reading
from dsv4_core.files.words import for_terminal, printable

if TYPE_CHECKING:
    from dsv4_core.generation import Generation
    from dsv4_core.session import Session

prompt = functools.partial(option, heading="Prompt (one kind; several run as one batch)")
generation = functools.partial(option, heading="Generation")


@click.command("generate", cls=Command)
@click.argument("model", required=False)
@prompt(
    "--prompt",
    "-p",
    "texts",
    multiple=True,
    help="Text to continue; control tokens that it spells are words. - reads it from stdin.",
)
@prompt("--chat", "chats", multiple=True, help="A user's turn, in the published chat format; - reads it from stdin.")
@prompt("--tokens", "ids", multiple=True, help="Token ids instead of text, e.g. 0,3,128; - reads them from stdin.")
@prompt(
    "--prompts",
    "file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="A file (- for stdin) with a text a line; *.jsonl: a text, a list of ids or a conversation's turns a line.",
)
@prompt("--system", default="", help="With --chat: the system turn.")
@prompt("--thinking", is_flag=True, help="With --chat: let the model think first.")
@generation("--max-tokens", "-n", type=click.IntRange(1), default=64, show_default=True, help="New tokens at most.")
@generation("--temperature", type=float, help="0 is greedy [default: as generation_config.json asks, else 0].")
@generation(
    "--top-p",
    type=float,
    help="Draw from the likeliest that make up this much [default: as generation_config.json asks, else 1].",
)
@generation("--top-k", type=int, default=0, show_default=True, help="Draw from so many likeliest; 0: from all.")
@generation(
    "--min-p", type=float, default=0.0, show_default=True, help="Draw from those so likely beside the likeliest."
)
@generation("--seed", type=int, default=0, show_default=True, help="The same seed draws the same tokens.")
@generation("--stop", multiple=True, metavar="TEXT", help="Text that ends a sequence, and is not printed.")
@generation("--stop-token", "stop_tokens", type=int, multiple=True, metavar="ID", help="Token id that does.")
@generation("--ignore-eos", is_flag=True, help="Go on after end-of-sentence.")
@generation(
    "--speculative",
    is_flag=False,
    flag_value=0,
    type=click.IntRange(0),
    metavar="[K]",
    help="Draft K tokens a step (without K as many as can be) by MTP or DSpark: the same tokens, sooner.",
)
@generation(
    "--drafter",
    metavar="DIR",
    help="With --speculative: a directory whose MTP block or DSpark drafts for MODEL; `embedded`: the one made for the embedded model.",
)
@generation(
    "--draft-confidence",
    type=Finite(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="DSpark's drafts end where the chance that all are kept falls below this.",
)
@generation("--chunk", type=click.IntRange(1), default=2048, show_default=True, help="Tokens of a prefill step.")
@backend_options
@rank_options
@json_option
def command(
    model: str | None,
    texts: tuple[str, ...],
    chats: tuple[str, ...],
    ids: tuple[str, ...],
    file: Path | None,
    system: str,
    thinking: bool,
    flags: BackendFlags,
    asked: RankFlags,
    as_json: bool,
    speculative: int | None,
    drafter: str | None,
    **request: Any,
) -> None:
    """Generate from MODEL: a checkpoint's directory, OWNER/NAME of one in the hub's local cache, or
    the embedded one.

    \b
    dsv4 generate --chat "What is kludge?"
    dsv4 generate MODEL_DIR -p "Once upon a time" -n 200 --temperature 0.7
    """  # noqa: D301  click keeps the lines after a backspace as they are
    from dsv4_core.cli.running import open_model, report
    from dsv4_core.session import PromptError

    if sum(map(bool, (texts, chats, ids, file))) != 1:
        raise click.UsageError(
            "give one of --prompt, --chat, --tokens and --prompts; each but --prompts may be repeated"
        )
    if (system or thinking) and (texts or ids):
        raise click.UsageError("--system and --thinking are of a conversation; use --chat, or --prompts with turns")
    if request["draft_confidence"] and speculative is None:
        raise click.UsageError("--draft-confidence shortens drafts; give --speculative, too")
    if drafter and speculative is None:
        raise click.UsageError("--drafter says what drafts; give --speculative, too")
    request["speculative"] = speculative is not None and (speculative or True)
    prompts = read_prompts(texts, chats, ids, file, system)
    with open_model(model, flags, asked, drafter) as session:
        try:
            events = session.generate(prompts, thinking=thinking, **request)
        except PromptError as error:
            if file is None:
                raise
            raise ValueError(f"{_name(file)}, line {error.index + 1}: {error.said}") from None
        wanted = session.defaults
        if session.speaks and wanted.said and None in {request["temperature"], request["top_p"]}:
            report(
                f"sampling as generation_config.json asks (temperature {wanted.temperature:g}, top-p {wanted.top_p:g}) "
                "where --temperature and --top-p do not say; --temperature 0 is greedy"
            )
        if session.speaks and not as_json:
            show(session, events, prompts)
        events.run()
        session.checkpoint.hold()
        stats = session.ranks.report() if asked.stats else ""
        if session.speaks:
            if as_json:
                print_json(session, events, model)
            report(f"{events.summary()}\n{stats}".rstrip())


def read_prompts(
    texts: tuple[str, ...], chats: tuple[str, ...], ids: tuple[str, ...], file: Path | None, system: str
) -> list[Any]:
    """Give what was asked for as prompts of ``Session.generate``; raise ``ValueError`` for what is
    none.
    """
    if sum(given == "-" for given in (*texts, *chats, *ids)) > 1:
        raise click.UsageError("standard input can be read once: give - once")
    if file is not None:
        return [_turns(line, system) if _are_turns(line) else line for line in _lines(file)]
    if ids:
        return [_ids(_given(text)) for text in ids]
    if chats:
        return [_turns([{"role": "user", "content": _given(text)}], system) for text in chats]
    return [_given(text) for text in texts]


def _given(text: str) -> str:
    return sys.stdin.read().rstrip("\n") if text == "-" else text


def _ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if wrong := [word for word in words if not re.fullmatch("-?[0-9]+", word)]:
        raise click.UsageError(f"--tokens: {wrong[0]!r} is no token id; write numbers, e.g. 0,3,128")
    return [int(word) for word in words]


def _are_turns(line: Any) -> bool:
    return isinstance(line, list) and bool(line) and isinstance(line[0], dict)


def _turns(turns: list[Any], system: str) -> list[Any]:
    return [{"role": "system", "content": system}, *turns] if system else turns


def _name(file: Path) -> str:
    return "standard input" if str(file) == "-" else str(file)


def _lines(file: Path) -> list[Any]:
    """Read a prompts file; raise ``ValueError`` naming the line that is no prompt."""
    name = _name(file)
    lines = (_given("-") if str(file) == "-" else reading.text(file)).splitlines()
    if not lines:
        raise ValueError(f"{name}: no prompt; write one a line")
    prompts: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{name}, line {number}: empty; write one prompt a line")
        if file.suffix != ".jsonl":
            prompts.append(line)
            continue
        value: Any = reading.json_text(line, object, f"{name}, line {number}", "write one prompt a line")
        is_ids = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        is_turns = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
        if not value or not (isinstance(value, str) or is_ids or is_turns):
            raise ValueError(
                f'{name}, line {number}: must be a text "...", ids [1, 2] or turns [{{"role": "user", "content": "..."}}]'
            )
        prompts.append(value)
    return prompts


def show(session: Session, events: Generation, prompts: list[Any]) -> None:
    """Print one sequence as it comes; several one after the other, each once it is whole and those
    before it are.

    ``color``: what a model says is left as it is in a pipe, colours included.
    """
    if len(prompts) == 1:
        for event in events:
            click.echo(for_terminal(event.text) if session.tokenizer else f"{event.token} ", nl=False, color=True)
            sys.stdout.flush()
        click.echo()
        return
    printed = 0
    for event in events:
        while event.finish and printed < len(prompts) and events.finish[printed]:
            if session.tokenizer is None:
                click.echo(" ".join(map(str, events.tokens[printed])))
            else:
                click.echo(for_terminal(f"> {_heading(prompts[printed])}\n{events.texts[printed]}\n"), color=True)
            printed += 1


def _heading(given: Any) -> str:
    """Give a prompt's first line, to tell sequences apart."""
    if _are_turns(given):
        given = next((turn.get("content") for turn in reversed(given) if turn.get("role") == "user"), given)
    line = " ".join(map(str, given)) if isinstance(given, list) else str(given)
    return printable(line.splitlines()[0][:100]) if line.strip() else repr(line)


def print_json(session: Session, events: Generation, model: str | None) -> None:
    """Print the document."""
    from dsv4_core.cli import schema

    be, drafts = session.backend, events.drafts
    written = zip(events.prompts, events.tokens, events.texts, events.finish, strict=True)
    sequences = [
        schema.Sequence(
            prompt_tokens=len(ids), tokens=tokens, text=text if session.tokenizer else None, finish=finish or "length"
        )
        for ids, tokens, text, finish in written
    ]
    result = schema.Generated(
        run=schema.Run(model=model, backend=be.describe().splitlines()[0], numerics=be.numerics),
        sequences=sequences,
        prefill_seconds=events.prefill_seconds,
        decode_seconds=events.decode_seconds,
        drafts=schema.Drafts(proposed=drafts.proposed, accepted=drafts.accepted, steps=drafts.steps)
        if drafts.proposed
        else None,
    )
    schema.emit("generate", result)
