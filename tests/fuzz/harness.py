"""Inputs in processes that may die of them: what each came to, by the rules that every surface is held to."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import mutate
from surfaces import LINES, Surface, run

PATIENCE = 60.0  # seconds for one input on a busy machine
ROOM = 4 << 30  # bytes of further address space
BAD = ("traceback", "unnamed", "signal", "hang", "memory", "wrong success", "escape")


@dataclass
class Outcome:
    """What one input came to: ``verdict`` is one of ``BAD``, or refused, or accepted."""

    verdict: str
    status: int
    said: str
    place: str = ""


@dataclass
class Tally:
    """A surface's counts, and its bad inputs."""

    counts: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, bytes, tuple[str, ...], Outcome]] = field(default_factory=list)

    def add(self, verdict: str) -> None:
        self.counts[verdict] = self.counts.get(verdict, 0) + 1


def call(words: tuple[str, ...] | list[str]) -> tuple[int, str, str, str]:
    """Run a command with its output caught: status, output, errors, and the place of an unforeseen error."""
    out, err = io.StringIO(), io.StringIO()
    place = ""
    os.environ["DSV4_TRACEBACK"] = "0"
    from dsv4_core import cli

    kept = cli.told

    def told(message: str, status: int) -> int:
        nonlocal place
        if status == 70:
            frames = traceback.extract_tb(sys.exc_info()[2])
            place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-1:-4:-1])
        return kept(message, status)

    cli.told = told
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = run(*words)
            except BaseException as error:  # noqa: BLE001  anything that main lets through is what we look for
                status, place = 70, f"{type(error).__name__} through main"
    finally:
        cli.told = kept
    return status, out.getvalue(), err.getvalue(), place


def judged(
    surface: str, names: tuple[str, ...], status: int, out: str, err: str, place: str, sound: str | None
) -> Outcome:
    """Hold an outcome to the rules."""
    said = (err + out)[-600:]
    text = err + out
    if status == 70 or "Traceback (most recent" in text:
        return Outcome("traceback", status, said, place)
    if "MemoryError" in text:
        return Outcome("memory", status, said)
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[\d*(;\d+)*m)", text):
        return Outcome("escape", status, said)
    if status == 0:
        return Outcome("wrong success" if sound is not None and out != sound else "accepted", status, said)
    if names and not any(name in text for name in names):
        return Outcome("unnamed", status, said)
    return Outcome("refused", status, said)


class Worker:
    """A child that takes inputs one after another and answers each with a line; it is replaced when one kills it."""

    def __init__(self, folder: Path, surface: Surface | None) -> None:
        self.folder, self.surface = folder, surface
        self.child = 0

    def start(self) -> None:
        self.to, self.answers = os.pipe(), os.pipe()
        self.child = os.fork()
        if self.child:
            os.close(self.to[0])
            os.close(self.answers[1])
            return
        os.close(self.to[1])
        os.close(self.answers[0])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.environ |= {"DSV4_ONE_PROCESS": "1", "COLUMNS": "200"}
        os.chdir(self.folder)
        with os.fdopen(self.to[0], "rb") as inputs, os.fdopen(self.answers[1], "wb", 0) as answers:
            for line in inputs:
                words = eval(line)  # noqa: S307  our own repr
                answers.write(repr(call(words)).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)  # no teardown: the parent has what it needs

    def run(self, words: tuple[str, ...] | list[str]) -> tuple[int, str, str, str] | str:
        """What a command came to, or "hang", or "signal N"."""
        if not self.child:
            self.start()
        os.write(self.to[1], repr(list(words)).encode() + b"\n")
        answer, until = b"", time.monotonic() + PATIENCE
        while not answer.endswith(b"\n"):
            if not select.select([self.answers[0]], [], [], max(0.0, until - time.monotonic()))[0]:
                self.stop()
                return "hang"
            part = os.read(self.answers[0], 1 << 20)
            if not part:
                status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
                self._closed()
                return f"signal {-status}" if status < 0 else f"exit {status}"
            answer += part
        result: tuple[int, str, str, str] = eval(answer)  # noqa: S307
        return result

    def stop(self) -> None:
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            self._closed()

    def _closed(self) -> None:
        os.close(self.to[1])
        os.close(self.answers[0])
        self.child = 0


def outcome_of(worker: Worker, surface: str, names: tuple[str, ...], words: Any, sound: str | None) -> Outcome:
    got = worker.run(words)
    if isinstance(got, str):
        return Outcome("hang" if got == "hang" else "signal", -1, got)
    return judged(surface, names, *got, sound)


def fuzz(folder: Path, surface: Surface, inputs: int, seed: int, until: float = float("inf")) -> Tally:
    """Damage a surface's file so many times."""
    tally, path = Tally(), folder / surface.file
    good = path.read_bytes()
    kept = {name: folder / f"{name}.kept" for name in surface.fresh if (folder / name).exists()}
    for name, copy in kept.items():
        shutil.copytree(folder / name, copy)
    worker = Worker(folder, surface)
    names = (Path(surface.file).name, *surface.named)
    sound: dict[tuple[str, ...], str] = {}

    def fresh() -> None:
        for name in surface.fresh:
            shutil.rmtree(folder / name, ignore_errors=True)
            if name in kept:
                shutil.copytree(kept[name], folder / name)

    try:
        if surface.same:
            for words in surface.commands:
                first = worker.run(words)
                assert not isinstance(first, str), first
                assert first[0] == 0, first
                sound[words] = first[1]
                fresh()
        for i in range(inputs):
            if time.monotonic() > until:
                break
            rng = Random(f"{seed} {surface.name} {i}")
            data = surface.damage(rng, good)
            words = surface.commands[i % len(surface.commands)]
            if data == good:
                continue
            path.unlink(missing_ok=True)  # a hard link's other end stays as it is
            path.write_bytes(data)
            outcome = outcome_of(worker, surface.name, names, words, sound.get(words))
            tally.add(outcome.verdict)
            if outcome.verdict in BAD:
                tally.bad.append((surface.name, data, words, outcome))
            fresh()
    finally:
        worker.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(good)
        for copy in kept.values():
            shutil.rmtree(copy, ignore_errors=True)
    return tally


def fuzz_lines(folder: Path, inputs: int, seed: int, until: float = float("inf")) -> Tally:
    """Damage command lines."""
    tally, worker = Tally(), Worker(folder, None)
    for i in range(inputs):
        if time.monotonic() > until:
            break
        rng = Random(f"{seed} arguments {i}")
        given, options = LINES[i % len(LINES)]
        words = mutate.arguments(rng, given, options)
        if any("\0" in word for word in words):  # no process can be given one
            continue
        outcome = outcome_of(worker, "arguments", (), words, None)
        tally.add(outcome.verdict)
        if outcome.verdict in BAD:
            tally.bad.append(("arguments", repr(words).encode(), tuple(words), outcome))
        for made in ("made", "converted", "converted.partial"):
            shutil.rmtree(folder / made, ignore_errors=True)
    worker.stop()
    return tally


def patch(good: bytes, bad: bytes) -> tuple[int, int, bytes]:
    """What of ``good`` is replaced, from where, so many bytes, by what: a corpus of large files in a few bytes."""
    front = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    most = min(len(good), len(bad)) - front
    back = next((i for i in range(most) if good[-1 - i] != bad[-1 - i]), most)
    return front, len(good) - front - back, bad[front : len(bad) - back]
