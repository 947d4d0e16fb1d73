"""Inputs in processes that may die of them: what each came to, by the rules that every surface is
held to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import mutate
from direct import DIRECT
from surfaces import LINES, Surface, run

PATIENCE = 60.0  # seconds for one input on a busy machine
ROOM = 4 << 30  # bytes of further address space
GENERATE = ["generate"]
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
    bad: list[tuple[bytes, tuple[str, ...], Outcome]] = field(default_factory=list)

    def add(self, verdict: str) -> None:
        self.counts[verdict] = self.counts.get(verdict, 0) + 1


def call(words: tuple[str, ...] | list[str]) -> tuple[int, str, str, str]:
    """Run a command with its output caught: status, output, errors, and the place of an unforeseen
    error.
    """
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
                status = _direct(words) if words[0].startswith("@") else run(*words)
            except BaseException as error:  # noqa: BLE001  anything that gets through is what we look for
                frames = traceback.extract_tb(error.__traceback__)[-1:-4:-1]
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
                status, place = 70, f"{type(error).__name__} ({error}) got through: {where}"
    finally:
        cli.told = kept
    return status, out.getvalue(), err.getvalue(), place


def _direct(words: tuple[str, ...] | list[str]) -> int:
    """Run a function of ``DIRECT``; refusals are what ``main`` takes for one."""
    from dsv4_core.contract.spec import BackendError
    from dsv4_core.files.words import printable

    try:
        DIRECT[words[0]](*words[1:])
    except (BackendError, ValueError, OSError, MemoryError) as error:
        print(f"dsv4: {printable(str(error) or repr(error))}", file=sys.stderr)
        return 2
    return 0


def judged(
    names: tuple[str, ...],
    status: int,
    out: str,
    err: str,
    place: str,
    sound: str | None,
    words: Sequence[str] = (),
) -> Outcome:
    """Hold an outcome to the rules. What a model says may hold any character: it is what was asked
    for, and goes into a pipe as it is.
    """
    said = (err + out)[-600:]
    text = err + out
    if status == 70 or "Traceback (most recent" in text:
        return Outcome("traceback", status, said, place)
    if "MemoryError" in text:
        return Outcome("memory", status, said)
    if re.search(
        r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[\d*(;\d+)*m)",
        err if words[:1] == GENERATE and not status else text,
    ):
        return Outcome("escape", status, said)
    if status == 0:
        return Outcome("wrong success" if sound is not None and out != sound else "accepted", status, said)
    if names and not any(name in text for name in names):
        return Outcome("unnamed", status, said)
    return Outcome("refused", status, said)


class Worker:
    """A child that takes inputs one after another and answers each with a line; it is replaced when
    one kills it.
    """

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


def outcome_of(worker: Worker, names: tuple[str, ...], words: Any, sound: str | None) -> Outcome:
    got = worker.run(words)
    if isinstance(got, str):
        return Outcome("hang" if got == "hang" else "signal", -1, got)
    return judged(names, *got, sound, list(words))


class Fuzzed:
    """A surface in its sound state, kept so that it can be damaged and mended again. A context: it
    is mended at the end.
    """

    def __init__(self, folder: Path, surface: Surface) -> None:
        self.folder, self.surface, self.path = folder, surface, folder / surface.file
        self.worker = Worker(folder, surface)
        self.names = (Path(surface.file).name, *surface.named)
        self.sound: dict[tuple[str, ...], str] = {}

    def __enter__(self) -> Self:
        self.good = self.path.read_bytes()
        self.kept = {n: self.folder / f"{n}.kept" for n in self.surface.fresh if (self.folder / n).exists()}
        for name, copy in self.kept.items():
            shutil.copytree(self.folder / name, copy)
        if self.surface.same or self.surface.result:
            for words in self.surface.commands:
                first = self.worker.run(words)
                assert not isinstance(first, str), first
                assert first[0] == 0, first
                self.sound[words] = self._result(first[1])
                self._fresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stop()
        self._write(self.good)
        for copy in self.kept.values():
            shutil.rmtree(copy, ignore_errors=True)

    def meet(self, data: bytes, words: tuple[str, ...]) -> Outcome:
        """What a command makes of the damaged file."""
        self._write(data)
        got = self.worker.run(words)
        if isinstance(got, str):
            outcome = Outcome("hang" if got == "hang" else "signal", -1, got)
        else:
            status, out, err, place = got
            sound = self.sound.get(words)
            result = self._result(out) if status == 0 and sound is not None else None
            outcome = judged(self.names, status, out, err, place, None, list(words))
            if outcome.verdict == "accepted" and result != sound:
                outcome = Outcome("wrong success", 0, outcome.said)
        self._fresh()
        return outcome

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)  # a link's other end stays as it is
        self.path.write_bytes(data)

    def _fresh(self) -> None:
        for name in self.surface.fresh:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if name in self.kept:
                shutil.copytree(self.kept[name], self.folder / name)

    def _result(self, out: str) -> str:
        if not self.surface.result:
            return out
        files = sorted((self.folder / self.surface.result).rglob("*"))
        held = [(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files if f.name != "convert.json"]
        return repr(held)


def fuzz(folder: Path, surface: Surface, inputs: int, seed: int, until: float = float("inf"), first: int = 0) -> Tally:
    """Damage a surface's file so many times, by the seed's inputs from ``first`` on."""
    tally = Tally()
    with Fuzzed(folder, surface) as fuzzed:
        for i in range(first, first + inputs):
            if time.monotonic() > until:
                break
            data = surface.damage(Random(f"{seed} {surface.name} {i}"), fuzzed.good)
            words = surface.commands[i % len(surface.commands)]
            if data == fuzzed.good:
                continue
            outcome = fuzzed.meet(data, words)
            tally.add(outcome.verdict)
            if outcome.verdict in BAD:
                tally.bad.append((data, words, outcome))
    return tally


def fuzz_lines(folder: Path, inputs: int, seed: int, until: float = float("inf"), first: int = 0) -> Tally:
    """Damage command lines."""
    tally, worker = Tally(), Worker(folder, None)
    for i in range(first, first + inputs):
        if time.monotonic() > until:
            break
        rng = Random(f"{seed} arguments {i}")
        given, options = LINES[i % len(LINES)]
        words = mutate.arguments(rng, given, options)
        if any("\0" in word for word in words):  # no process can be given one
            continue
        if words[:2] == ["conformance", "run"] and not {"--case", "--op"} & set(words):  # the whole suite takes minutes
            continue
        outcome = outcome_of(worker, (), words, None)
        tally.add(outcome.verdict)
        if outcome.verdict in BAD:
            tally.bad.append((b"", tuple(words), outcome))
        for made in ("made", "converted", "converted.partial", "found"):
            shutil.rmtree(folder / made, ignore_errors=True)
    worker.stop()
    return tally


HOME = b"@FOLDER@"  # stands for the folder that the states are in, which is another each time


def patch(good: bytes, bad: bytes) -> tuple[int, int, bytes]:
    """What of ``good`` is replaced, from where, so many bytes, by what: a corpus of large files in
    a few bytes.
    """
    front = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad)))
    most = min(len(good), len(bad)) - front
    back = next((i for i in range(most) if good[-1 - i] != bad[-1 - i]), most)
    return front, len(good) - front - back, bad[front : len(bad) - back]


def entry_of(folder: Path, good: bytes, data: bytes, words: tuple[str, ...]) -> dict[str, Any]:
    """An input as the corpus keeps it; ``patched`` makes it again."""
    home = os.fsencode(folder)
    at, length, new = patch(good.replace(home, HOME), data.replace(home, HOME))
    return {"words": list(words), "at": at, "length": length, "new": base64.b64encode(new).decode()}


def patched(folder: Path, good: bytes, entry: dict[str, Any]) -> bytes:
    """The input that an entry of the corpus keeps."""
    home = os.fsencode(folder)
    good, at = good.replace(home, HOME), entry["at"]
    return (good[:at] + base64.b64decode(entry["new"]) + good[at + entry["length"] :]).replace(HOME, home)


def again(folder: Path, surface: Surface | None, entries: list[dict[str, Any]]) -> list[Outcome]:
    """Try entries of the corpus once more."""
    if surface is None:
        worker = Worker(folder, None)
        try:
            return [outcome_of(worker, (), entry["words"], None) for entry in entries]
        finally:
            worker.stop()
    with Fuzzed(folder, surface) as fuzzed:
        return [fuzzed.meet(patched(folder, fuzzed.good, entry), tuple(entry["words"])) for entry in entries]
