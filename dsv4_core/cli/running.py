"""What the commands that run the model share: the check before weights load, loading with a progress bar, and text that
streams.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dsv4_core.checkpoint.layout import QUANTISED
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.backend import BackendError, missing_ops
from dsv4_core.graph.generate import Drafts, generate, speculate
from dsv4_core.graph.model import ALONE, Model
from dsv4_core.graph.sampling import Sampling
from dsv4_core.planning.rank_trace import trace_rank
from dsv4_core.planning.shapes import trace_calls
from dsv4_core.text.tokenizer import TextStream, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.checkpoint.rank_part import Place
    from dsv4_core.cli.options import BackendFlags
    from dsv4_core.cli.ranks import Team
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Format
    from dsv4_core.planning.shapes import Call


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the terminal (nothing where standard error is not one)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"  # of several ranks the first one's
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def check_support(config: ModelConfig, backend: Backend, expert_format: Format, place: Place | None = None) -> None:
    """Raise ``BackendError`` with a table of what is missing and why; no weight has been read yet."""
    calls = [(call.op, call.operands) for call in planned_calls(config, backend, expert_format, place)]
    if missing := missing_ops(backend, calls):
        rows = "\n".join(f"  {op}: {reason}" for op, reason in missing)
        raise BackendError(
            f"backend {backend.name!r} cannot run this model:\n{rows}\n`dsv4 explain` shows every op; no other backend is used in its place"
        )


def planned_calls(
    config: ModelConfig, backend: Backend, expert_format: Format, place: Place | None = None
) -> list[Call]:
    """Every op that a prefill and a later decode step would call, with dtypes and shapes: at a ``place`` of several, its own."""
    prompt = min(
        512, config.max_position_embeddings
    )  # closes windows of 4 and 128 and leaves the indexer something to choose
    later = min(4096, config.max_position_embeddings - 1)
    calls: list[Call] = []
    for seq, start in ((prompt, 0), (1, later)):
        if place and place.ranks > 1:
            calls += trace_rank(config, backend, place, seq=seq, start=start, expert_format=expert_format)
            continue
        calls += trace_calls(
            config,
            type(backend),
            numerics=backend.numerics,
            seq=seq,
            start=start,
            mtp=config.draft != "",
            expert_format=expert_format,
        )
    return calls


def expert_format(checkpoint: Checkpoint) -> Format:
    """FP4, FP8 or int8, as the experts' tensors are stored (not as config.json says)."""
    return "int8" if checkpoint.is_int8 else QUANTISED.get(checkpoint.expert_dtype, "e4m3")


@dataclass
class Session:
    """A loaded model with its tokenizer, if it has one."""

    model: Model
    tokenizer: Tokenizer | None
    speaks: bool = True

    @classmethod
    def open(
        cls,
        directory: Path,
        flags: BackendFlags,
        team: Team | None = None,
        request: dict[str, Any] | None = None,
        *,
        draft: bool = True,
    ) -> Session:
        """Check, then load. ``team``: this process is one of several ranks, which were all given the same ``request``.

        ``draft``: what drafts is wanted, too; without, it is not loaded.
        """
        backend = team.ranks.backend if team and team.ranks else flags.create()
        checkpoint = team.open(directory) if team else Checkpoint(directory)
        source, parallel = team.share(checkpoint, request or {}) if team else (checkpoint, ALONE)
        place = team.source.place if team and team.source else None
        check_support(checkpoint.config, backend, expert_format(checkpoint), place)
        with bar("loading") as progress:
            model = Model(source, backend, parallel=parallel, draft=draft, progress=progress)
        return cls(model, load_tokenizer(directory), team is None or team.speaks)

    def run(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        speculative: int | None,
        stop: set[int],
        chunk: int,
        confidence: float = 0.0,
    ) -> Finished:
        """Generate from one prompt, printing text (or ids) as it comes. ``speculative``: drafts a step, 0 for all that can be."""
        text = TextStream(self.tokenizer) if self.tokenizer else None
        drafts = Drafts()
        began = time.perf_counter()
        first = began
        produced: list[int] = []
        with bar("prefill") as progress:
            tokens: Iterator[int | None]
            if speculative is not None:
                tokens = speculate(
                    self.model,
                    prompt,
                    max_tokens=max_tokens,
                    sampling=sampling,
                    stop=stop,
                    chunk=chunk,
                    count=speculative or None,
                    confidence=confidence,
                    drafts=drafts,
                    progress=progress,
                )
            else:
                steps = generate(
                    self.model,
                    [prompt],
                    max_tokens=max_tokens,
                    sampling=sampling,
                    stop=stop,
                    chunk=chunk,
                    progress=progress,
                )
                tokens = (step[0] for step in steps)
            head = next(tokens, None)
            first = time.perf_counter()
        while head is not None:
            produced.append(head)
            if self.speaks:
                click.echo(text.push(head) if text else f"{head} ", nl=False)
                sys.stdout.flush()
            head = next(tokens, None)
        if self.speaks:
            click.echo()
        return Finished(len(prompt), produced, first - began, time.perf_counter() - first, drafts)


@dataclass
class Finished:
    """Counts and times of one generation."""

    prompt_tokens: int
    produced: list[int]
    prefill_seconds: float
    decode_seconds: float
    drafts: Drafts

    def summary(self) -> str:
        """One line for people."""
        n = len(self.produced)
        line = f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s"
        if n > 1:
            line += f", {n} generated, {1000 * self.decode_seconds / (n - 1):.0f} ms per token after the first"
        if self.drafts.proposed:
            rate = self.drafts.tokens / self.drafts.steps
            line += f"; {self.drafts.accepted} of {self.drafts.proposed} drafts accepted, {rate:.2f} tokens a step"
        return line


def stop_tokens(config: ModelConfig, extra: Sequence[int]) -> set[int]:
    """End-of-sentence, and what the user adds."""
    end = config.eos_token_id
    return {*(end if isinstance(end, tuple) else (end,)), *extra}


def report(line: Any) -> None:
    """Tell the user something that is not the program's output."""
    click.echo(line, err=True)
