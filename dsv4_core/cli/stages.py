"""Stages of commands, for what a backend proves on its hardware (``prove``).

A stage is a few commands, each a process of its own. A command's output is kept under the folder,
and what ended is not run again, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4_core.files.writing import write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from typing_extensions import Self

STAGE_SECONDS = 600.0
WELL = frozenset({"passed", "left out"})
"""States of a stage that ended and in which nothing failed."""


@dataclass
class Ran:
    """One command: how it ended and where its output is. ``state``: passed, failed, late (ran past
    its stage's time), or left out.
    """

    name: str
    argv: list[str]
    state: str
    status: int | None = None
    seconds: float = 0.0
    log: str = ""
    why: str = ""


@dataclass
class Stage:
    """What is known of a stage."""

    name: str
    ran: dict[str, Ran] = field(default_factory=dict)
    ended: bool = False

    @property
    def state(self) -> str:
        """The worst of its commands; left out where all were."""
        states = {r.state for r in self.ran.values()}
        if worst := next((s for s in ("failed", "late") if s in states), ""):
            return worst
        return "not finished" if not self.ended else "left out" if states == {"left out"} else "passed"

    @property
    def line(self) -> str:
        """How it ended, in one line."""
        by = [ran.state for ran in self.ran.values()]
        counts = ", ".join(f"{by.count(s)} {s}" for s in dict.fromkeys(by))
        seconds = sum(ran.seconds for ran in self.ran.values())
        failed = ", ".join(ran.name for ran in self.ran.values() if ran.state == "failed")
        return f"{self.name:14} {self.state:12} {counts}, {seconds:.0f} s{f': failed {failed}' if failed else ''}"


class Stages:
    """Runs commands of stages and remembers them in ``prove.json`` under ``out``."""

    def __init__(
        self, out: Path, of: Mapping[str, Any], another: Callable[[dict[str, Any]], Exception], *, seconds: float
    ) -> None:
        """``of``: what the run is of, kept beside its stages; raise what ``another`` makes of the
        memory of a folder that holds a run of something else. ``seconds``: the most a stage takes.
        """
        self.out, self.of, self.seconds = out, dict(of), seconds
        self.memory = out / "prove.json"
        out.mkdir(parents=True, exist_ok=True)
        known = json.loads(self.memory.read_text(encoding="utf-8")) if self.memory.exists() else self.of
        if {key: value for key, value in known.items() if key != "stages"} != self.of:
            raise another(known)
        self.stages = {
            name: Stage(name, {k: Ran(**r) for k, r in s["ran"].items()}, s["ended"])
            for name, s in known.get("stages", {}).items()
        }
        self.current, self.deadline = Stage(""), 0.0

    def stage(self, name: str, steps: Callable[[Self], None], *, again: bool = False) -> Stage:
        """Run a stage, or what is left of it."""
        if again or name not in self.stages:
            self.stages[name] = Stage(name)
        self.current, self.deadline = self.stages[name], time.monotonic() + self.seconds
        if not self.current.ended:
            (self.out / name).mkdir(exist_ok=True)
            steps(self)
            self.current.ended = not any(r.state == "late" for r in self.current.ran.values())
            self._remember()
        return self.current

    def command(
        self, name: str, argv: Iterable[object], *, left_out: str = "", env: Mapping[str, str] | None = None
    ) -> Ran:
        """Run a command, unless it has ended before; ``left_out`` says why it cannot run here."""
        words = [str(word) for word in argv]
        before = self.current.ran.get(name)
        if before and before.state in {"passed", "failed"}:
            return before
        log = self.out / self.current.name / f"{name}.log"
        left, ran = self.deadline - time.monotonic(), Ran(name, words, "passed", log=str(log.relative_to(self.out)))
        if left_out:
            ran.state, ran.why = "left out", left_out
        elif left <= 0:
            ran.state, ran.why = "late", "its stage's time was over; run the stage again to go on"
        else:
            began = time.monotonic()
            try:
                with log.open("w", encoding="utf-8") as sink:
                    done = subprocess.run(  # noqa: S603  our own commands
                        words,
                        stdout=sink,
                        stderr=subprocess.STDOUT,
                        timeout=left,
                        check=False,
                        env={**os.environ, **(env or {})},
                    )
                ran.status, ran.state = done.returncode, "passed" if done.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                ran.state, ran.why = "late", f"ended after {left:.0f} s; run the stage again to go on"
            except FileNotFoundError:
                ran.state, ran.why = "left out", f"{words[0]} is not on the path"
            ran.seconds = round(time.monotonic() - began, 1)
        self.current.ran[name] = ran
        self._remember()
        return ran

    def text(self, ran: Ran) -> str:
        """What a command printed."""
        path = self.out / ran.log
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def generated(self, ran: Ran) -> str:
        """What ``dsv4 generate`` printed, without the timing's line."""
        return "\n".join(line for line in self.text(ran).splitlines() if " ms per token" not in line)

    def _remember(self) -> None:
        state = {**self.of, "stages": {n: asdict(s) for n, s in self.stages.items()}}
        write(self.memory, json.dumps(state, indent=1) + "\n")
