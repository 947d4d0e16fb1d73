"""``dsv4 chat``: talk to a model at the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from dsv4_core.cli.commands import Command
from dsv4_core.cli.options import BackendFlags, backend_options
from dsv4_core.files.reading import fitting, json_file
from dsv4_core.files.words import for_terminal
from dsv4_core.files.writing import write_over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_core.graph.engine import Engine
    from dsv4_core.graph.sampling import Sampling
    from dsv4_core.text.chat import Message
    from dsv4_core.text.completion import Delta
    from dsv4_core.text.fixed_texts import FixedTexts, Profile
    from dsv4_core.text.tokenizer import Vocabulary

HELP = """/think on|off   let the model think first
/effort LEVEL   how much (thinking only); /effort alone takes the default
/system TEXT    begin anew with this system turn; /system alone without one
/new            begin anew
/save FILE      write the conversation as JSON
/load FILE      go on with one that was written
/stats          tokens, times and what the cache saved
/help  /quit    Ctrl-C ends a turn, Ctrl-D the program"""


@dataclass
class Talk:
    """A conversation on an engine of one slot, whose cache is kept between turns."""

    engine: Engine
    vocabulary: Vocabulary
    texts: FixedTexts | None
    ends: frozenset[int]
    sampling: Sampling
    max_tokens: int
    thinking: bool = False
    effort: str | None = None
    messages: list[Message] = field(default_factory=list)
    last: str = "no turn yet"

    def say(self, text: str, stopped: Callable[[], Any] = lambda: False) -> Iterator[Delta]:
        """Add a user's turn and give the reply as it comes, until ``stopped``; both are kept, the
        reply also where it is cut off.

        Raises ``ValueError`` where the conversation cannot be encoded or does not fit, or where the
        model fails. A turn of which nothing was said is not kept.
        """
        from dsv4_core.graph.engine import Request
        from dsv4_core.text.chat import encode
        from dsv4_core.text.completion import CompletionParser
        from dsv4_core.text.tokenizer import PieceStream

        turns: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self.vocabulary.ids(encode(turns, thinking=self.thinking, effort=self.effort, texts=self.texts))
        room = self.engine.capacity - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and the context {self.engine.capacity}; /new begins anew, --context makes room"
            )
        request = Request(tuple(ids), min(self.max_tokens, room), self.sampling, self.ends)
        parser, stream = CompletionParser(thinking=self.thinking), PieceStream(self.vocabulary)
        began, first, count, hit = time.perf_counter(), 0.0, 0, 0
        name = self.engine.submit(request)
        try:
            while not self.engine.idle and not stopped():
                for event in self.engine.step():
                    if event.error:
                        raise ValueError(f"the model failed: {event.error or repr(event.error)}") from event.error
                    if event.chosen:
                        first = first or time.perf_counter()
                        count, hit = count + 1, hit + event.hit
                        for piece in stream.push(event.chosen.token):
                            yield from parser.push(piece)
            for piece in stream.finish():
                yield from parser.push(piece)
            yield from parser.finish()
        finally:
            self.engine.cancel(name)
            self.engine.step()
            parser.finish()
            if count:
                self.messages = [*turns, cast("Message", parser.reply.message())]
            after = time.perf_counter() - (first or began)
            self.last = (
                f"{len(ids)} prompt tokens ({hit} from the cache) in {(first or time.perf_counter()) - began:.2f} s, "
                f"{count} generated" + (f", {1000 * after / (count - 1):.0f} ms each" if count > 1 else "")
            )

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; give what to print. Raises ``ValueError`` for
        what is none.
        """
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        file = Path(os.path.expanduser(rest))  # noqa: PTH111  Path's own raises for a user who is not there
        if word == "/think" and rest in {"on", "off"}:
            self.thinking = rest == "on"
            self.effort = self.effort if self.thinking else None
            return f"thinking {rest}"
        if word == "/effort":
            levels = list(self.texts.efforts) if self.texts else []
            if rest and rest not in levels:
                if not levels:
                    raise ValueError(
                        f"effort {rest!r} needs chat texts; begin with --encoding-profile preview or official"
                    )
                raise ValueError(f"effort {rest!r}; this checkpoint's chat texts have {', '.join(levels)}")
            self.effort = rest or None
            self.thinking = self.thinking or bool(rest)
            return f"effort {rest or 'as the encoder has it'}"
        if word in {"/system", "/new"} and not (word == "/new" and rest):
            system = [m for m in self.messages if m["role"] == "system"] if word == "/new" else []
            self.messages = [{"role": "system", "content": rest}] if rest else system
            return "a new conversation"
        if word == "/save" and rest:
            write_over(file, json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", alike=1)
            return f"{len(self.messages)} turns in {rest}"
        if word == "/load" and rest:
            self.messages = read_conversation(file, self.texts)
            return f"{len(self.messages)} turns from {rest}"
        if word == "/stats":
            return self.last
        if word == "/help":
            return HELP
        raise ValueError(f"{line.strip()!r} is no command:\n{HELP}")


def read_conversation(path: Path, texts: FixedTexts | None) -> list[Message]:
    """Read what /save wrote; raise ``FileError`` where it is no conversation that the encoder
    takes.
    """
    from dsv4_core.text.chat import encode

    messages = cast("list[Message]", json_file(path, list[dict[str, Any]], "/save writes one"))
    with fitting(f"{path}", "/save writes a list of messages"):
        if messages:
            encode(messages, texts=texts)
    return messages


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted in a list and not raised: what is cut in the middle of a step leaves a cache
    that nobody knows. Where it is ignored or somebody else's, it stays so.
    """
    noted, before = list[int](), signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def whole(line: str) -> str:
    """Give a line that can be sent and saved; raise ``ValueError`` for one with bytes that are no
    text.
    """
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start + 1} of the line is no UTF-8; nothing was sent") from None
    if "\0" in line:
        raise ValueError(f"character {line.index(chr(0)) + 1} of the line is NUL; nothing was sent")
    return line


def talk(session: Talk, read: Callable[[], str], write: Callable[[str, bool], Any]) -> None:
    """Read lines until there are none; ``write(text, dim)`` shows what comes."""
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if line.strip() in {"/quit", "/exit"}:
            return
        if not line.strip():
            continue
        try:
            if whole(line).startswith("/"):
                write(session.command(line) + "\n", True)
                continue
            thought = False
            with interrupts() as pressed:
                for delta in session.say(line, lambda: pressed):
                    if delta.kind == "reasoning":
                        thought = True
                        write(delta.text, True)
                    elif delta.kind == "content":
                        write(("\n\n" if thought else "") + delta.text, False)
                        thought = False
                    else:
                        write(delta.text, True)
            write("\n", False)
            if pressed:
                write("(ended)\n", True)
        except KeyboardInterrupt:
            write("\n(ended)\n", True)
        except OSError as error:
            write(f"{error.filename}: {error.strerror}\n" if error.filename else f"{error}\n", True)
        except ValueError as error:
            write(f"{error}\n", True)


@click.command("chat", cls=Command)
@click.argument("model", required=False)
@click.option("--system", default="", help="The system turn.")
@click.option("--thinking", is_flag=True, help="Let the model think first; what it thinks is dimmed.")
@click.option("--effort", help="How much: low, high or max, as the checkpoint has them.")
@click.option(
    "--max-tokens", "-n", type=click.IntRange(1), default=1024, show_default=True, help="New tokens of a turn at most."
)
@click.option("--context", type=click.IntRange(2), help="Tokens of the conversation (else 8192, or the model's).")
@click.option("--temperature", type=float, help="0 is greedy [default: as generation_config.json asks, else 1].")
@click.option("--top-p", type=float, help="[default: as generation_config.json asks, else 1]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--speculative", is_flag=True, help="Draft with what the checkpoint has for it, MTP or DSpark.")
@click.option(
    "--encoding-profile",
    type=click.Choice(["preview", "official"]),
    help="Chat texts for a copy without encoding/: preview (April) or official (from July on).",
)
@backend_options
def command(
    model: str | None,
    system: str,
    thinking: bool,
    effort: str | None,
    max_tokens: int,
    context: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int,
    speculative: bool,
    encoding_profile: Profile | None,
    flags: BackendFlags,
) -> None:
    """Talk to MODEL (a checkpoint's directory; the embedded one if left out). /help says what may
    be typed.
    """
    from dsv4_core.cli.running import open_model, report
    from dsv4_core.graph.engine import Engine
    from dsv4_core.graph.sampling import Sampling
    from dsv4_core.text.fixed_texts import fixed_texts
    from dsv4_core.text.tokenizer import Vocabulary

    Sampling(
        temperature or 0.0, 1.0 if top_p is None else top_p, seed
    )  # what is wrong is said before anything is opened
    with open_model(model, flags) as session:
        wanted = session.defaults
        sampling = Sampling(
            temperature if temperature is not None else wanted.temperature if wanted.said else 1.0,
            wanted.top_p if top_p is None else top_p,
            seed,
        )
        texts = fixed_texts(session.directory, encoding_profile)
        if session.tokenizer is None:
            raise ValueError(f"{session.directory} has no tokenizer.json; copy the tokenizer beside config.json")
        most = session.config.max_position_embeddings
        if context is not None and context > most:
            raise ValueError(
                f"--context {context}: the model has {most} positions (max_position_embeddings of config.json)"
            )
        read = _reader()
        engine = Engine(
            session.model,
            slots=1,
            capacity=context or min(8192, most),
            chunk=512,  # a Ctrl-C waits no longer
            drafts=session.load_drafter() if speculative else 0,
        )
        ends = session.defaults.ends
        vocabulary = Vocabulary(session.tokenizer)
        talking = Talk(engine, vocabulary, texts, ends, sampling, max_tokens, thinking=thinking or effort is not None)
        if effort is not None:
            talking.command(f"/effort {effort}")
        if system:
            talking.command(whole(f"/system {system}"))
        report(
            f"{session.directory.name}, {engine.capacity} tokens of context; /help says what may be typed, Ctrl-D ends"
        )
        before = {number: signal.getsignal(number) for number in ENDING}
        for number in ENDING:
            if before[number] is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _leave)
        try:
            talk(talking, read, _write)
        except SystemExit as end:
            raise click.exceptions.Exit(end.code if isinstance(end.code, int) else 1) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def _leave(number: int, _: Any) -> None:
    """End by an exception, so that a terminal is left as it was before a line was edited."""
    raise SystemExit(128 + number)


def _write(text: str, dim: bool) -> None:
    text = for_terminal(text)
    dim = dim and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    click.echo(click.style(text, dim=True) if dim else text, nl=False, color=True)
    sys.stdout.flush()


def _reader() -> Callable[[], str]:
    """Lines of the terminal with editing and history, or of a pipe as they are."""
    if not sys.stdin.isatty():
        return _line
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        raise click.ClickException("dsv4 chat at a terminal needs prompt_toolkit: pip install 'dsv4[chat]'") from None
    session: Any = PromptSession()
    return lambda: str(session.prompt("> "))


def _line() -> str:
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode(errors="surrogateescape").rstrip("\r\n")
