"""``dsv4 ascend prove``: what a machine with an NPU can show of this backend, in stages of ten
minutes, into one folder and one report.

A stage is a few commands, each a process of its own: an exception on AI Core leaves a process
without a usable device. A command's output is kept, and what ended is not run again, so that a run
that was cut off goes on where it stopped. Nothing needs a network. With ``simulate`` the same
stages run on simulated CANN; the report's first line says that nothing of hardware was proven.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from dsv4_backend_ascend.capability import GENERATIONS
from dsv4_backend_ascend.selftest_cases import CASES
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.ops import OPS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

DSV4 = (sys.executable, "-m", "dsv4_core")
BLOCKING = {"ASCEND_LAUNCH_BLOCKING": "1"}  # the launch that raises is the one that is named
ENDED = ("passed", "failed")


@dataclass
class Ran:
    """One command. ``state``: passed, failed, late (ran past its stage's time), or left out."""

    name: str
    argv: list[str]
    state: str
    status: int | None = None
    seconds: float = 0.0
    why: str = ""


@dataclass
class Stage:
    """What is known of a stage."""

    name: str
    ran: dict[str, Ran] = field(default_factory=dict)
    ended: bool = False

    @property
    def state(self) -> str:
        """The worst of its commands."""
        states = {r.state for r in self.ran.values()}
        return next((s for s in ("failed", "late") if s in states), "passed" if self.ended else "not finished")


class Prover:
    """Runs stages and remembers them in ``prove.json`` under ``out``."""

    def __init__(self, out: Path, *, simulate: str | None = None, seconds: float = 600.0) -> None:
        """Raise ``BackendError`` for a chip that there is not, and for a folder that holds another
        kind of run.
        """
        if simulate is not None and simulate not in GENERATIONS:
            raise BackendError(f"ascend prove: simulate {simulate!r} is not one of {', '.join(GENERATIONS)}")
        self.out, self.simulate, self.seconds = out, simulate, seconds
        out.mkdir(parents=True, exist_ok=True)
        self.memory = out / "prove.json"
        known = (
            json.loads(self.memory.read_text(encoding="utf-8"))
            if self.memory.exists()
            else {"simulate": simulate, "stages": {}}
        )
        if "simulate" not in known:
            raise BackendError(f"ascend prove: {out} holds a run of another backend; choose another folder")
        if known["simulate"] != simulate:
            kind = f"simulated {known['simulate']}" if known["simulate"] else "an NPU"
            raise BackendError(f"ascend prove: {out} holds a run on {kind}; choose another folder")
        self.stages = {
            name: Stage(name, {k: Ran(**r) for k, r in s["ran"].items()}, s["ended"])
            for name, s in known["stages"].items()
        }
        self.current, self.deadline = Stage(""), 0.0

    @property
    def heading(self) -> str:
        """What the run is of."""
        if self.simulate:
            return f"on simulated CANN ({self.simulate}), on a CPU: nothing of hardware was proven"
        return "on an NPU"

    def stage(self, name: str, *, again: bool = False) -> Stage:
        """Run a stage, or what is left of it."""
        if again or name not in self.stages:
            self.stages[name] = Stage(name)
        self.current, self.deadline = self.stages[name], time.monotonic() + self.seconds
        if not self.current.ended:
            (self.out / name).mkdir(exist_ok=True)
            STAGES[name](self)
            self.current.ended = not any(r.state == "late" for r in self.current.ran.values())
            self._remember()
        return self.current

    def run(self, name: str, *argv: object, on_npu: bool = False, env: dict[str, str] | None = None) -> Ran:
        """Run a command, unless it has ended before. ``on_npu``: a simulated run leaves it out."""
        words = [str(word) for word in argv]
        before = self.current.ran.get(name)
        if before and before.state in ENDED:
            return before
        left, ran = self.deadline - time.monotonic(), Ran(name, words, "passed")
        if self.simulate and on_npu:
            ran.state, ran.why = "left out", "no NPU in a simulated run"
        elif left <= 0:
            ran.state, ran.why = "late", "its stage's time was over; run the stage again to go on"
        else:
            began = time.monotonic()
            try:
                with self.log(name).open("w", encoding="utf-8") as sink:
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

    def log(self, name: str) -> Path:
        """Where a command's output is."""
        return self.out / self.current.name / f"{name}.log"

    def write_report(self) -> Path:
        """Write ``report.md``: the heading, then every stage and what it ran."""
        text = [f"# `dsv4 ascend prove` {self.heading}", ""]
        for name, steps in STAGES.items():
            stage = self.stages.get(name, Stage(name))
            text += [f"## {name}: {stage.state}", "", " ".join((steps.__doc__ or "").split()), ""]
            for ran in stage.ran.values():
                text.append(
                    f"- {ran.name}: {ran.state}, {ran.seconds} s{f' ({ran.why})' if ran.why else ''}: `{name}/{ran.name}.log`"
                )
            text.append("")
        path = self.out / "report.md"
        path.write_text("\n".join(text), encoding="utf-8")
        return path

    def status(self, names: Sequence[str]) -> int:
        """Exit status of stages: 1 something failed, 3 something is left to run."""
        states = {self.stages[name].state for name in names}
        return 1 if "failed" in states else 3 if states - {"passed"} else 0

    def _remember(self) -> None:
        state = {"simulate": self.simulate, "stages": {n: asdict(s) for n, s in self.stages.items()}}
        fresh = self.memory.with_suffix(".new")
        fresh.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.memory)

    @property
    def chip(self) -> tuple[str, ...]:
        """Words that name the chip to a command of this backend."""
        return ("--simulate", self.simulate) if self.simulate else ()


def installation(p: Prover) -> None:
    """What is installed: driver, CANN, torch-npu, HCCL's settings, operators and their schemas."""
    p.run("npu-smi", "npu-smi", "info", on_npu=True)
    p.run("packages", sys.executable, "-m", "pip", "freeze")
    p.run("doctor", *DSV4, "doctor", "--backend", "ascend", on_npu=True)
    p.run("plan", *DSV4, "explain", "--backend", "ascend", *p.chip, "--model", "flash")


def selftest(p: Prover) -> None:
    """Every contract of the npu ops in a process of its own, against plain PyTorch ops and recorded
    expectations; small cases.
    """
    for contract in dict.fromkeys(case.contract for case in CASES):
        report = p.out / "selftest" / f"{contract}.json"
        p.run(
            contract,
            *DSV4,
            "ascend",
            "selftest",
            *p.chip,
            "--small",
            "--contract",
            contract,
            "--report",
            report,
            env=BLOCKING,
        )


def addresses(p: Prover) -> None:
    """The same with rows past 2^31 bytes and elements, and a million tokens: up to 10 GB of an
    NPU's memory.
    """
    for contract in dict.fromkeys(case.contract for case in CASES if case.gigabytes):
        report = p.out / "addresses" / f"{contract}.json"
        p.run(
            contract, *DSV4, "ascend", "selftest", "--contract", contract, "--report", report, on_npu=True, env=BLOCKING
        )


def smoke(p: Prover) -> None:
    """The conformance suite's smoke tier, a process a check."""
    p.run("suite", *DSV4, "conformance", "run", "--backend", "ascend", *p.chip, "--tier", "smoke", *(() if p.simulate else ("--isolate",)),
          "--quiet", "--report", p.out / "smoke" / "suite")  # fmt: skip


def standard(p: Prover) -> None:
    """The conformance suite's standard tier, op by op, so that it goes on where it stopped; and all
    of the rest at once.
    """
    suite = (*DSV4, "conformance", "run", "--backend", "ascend", "--tier", "standard", "--isolate", "--quiet")
    for op in OPS:
        p.run(op, *suite, "--op", op, "--report", p.out / "standard" / op, on_npu=True)


def whole(p: Prover) -> None:
    """The standard tier whole, with models and laws: the report that proves a level. Give it the
    time that ``standard`` took.
    """
    p.run("suite", *DSV4, "conformance", "run", "--backend", "ascend", "--tier", "standard", "--require", "3", "--quiet",
          "--report", p.out / "whole" / "suite", on_npu=True)  # fmt: skip


def texts(p: Prover) -> None:
    """The embedded model's text, twice the same and as plain PyTorch ops make it; then launches one
    by one and as a graph.
    """
    device = ["-O", f"simulate={p.simulate}"] if p.simulate else []
    generate = (*DSV4, "generate", "--tokens", "0,3,327", "-n", "4" if p.simulate else "200", "--backend", "ascend")
    made = [p.run(f"generate-{i}", *generate, *device) for i in (1, 2)]
    p.run("generate-composed", *generate, *device, "-O", "tier=composed")
    same = len({_text(p.log(ran.name)) for ran in made}) == 1
    p.run("twice-the-same", sys.executable, "-c", f"raise SystemExit({0 if same else 1})")
    p.run("bench", *DSV4, "bench", "--backend", "ascend", on_npu=True)


def counts(p: Prover) -> None:
    """What a decode step of Flash launches on this chip by this installation's plan, and whether it
    can be recorded.
    """
    soc = ("--soc", p.simulate) if p.simulate else ()
    p.run("launches", *DSV4, "ascend", "launches", *soc, "--report", p.out / "counts" / "launches.json")


def _text(log: Path) -> str:
    """What was generated, without the timing's line."""
    printed = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(line for line in printed.splitlines() if " ms per token" not in line)


STAGES: dict[str, Callable[[Prover], None]] = {
    "installation": installation, "selftest": selftest, "addresses": addresses, "smoke": smoke, "texts": texts, "counts": counts,
    "standard": standard, "whole": whole,
}  # fmt: skip
"""In the order of a first run: what is needed to understand a failure comes before it."""


def stages(chosen: Sequence[str]) -> tuple[str, ...]:
    """The stages to run; all where none was chosen. Raises ``BackendError`` for one that there is
    not.
    """
    if unknown := [name for name in chosen if name not in STAGES]:
        raise BackendError(f"ascend prove: stage {unknown[0]!r} is not one of {', '.join(STAGES)}")
    return tuple(chosen) or tuple(STAGES)


def line(stage: Stage) -> str:
    """A stage in one line."""
    failed = [ran.name for ran in stage.ran.values() if ran.state == "failed"]
    seconds = sum(ran.seconds for ran in stage.ran.values())
    return f"{stage.name:14} {stage.state:12} {len(stage.ran)} commands, {seconds:.0f} s{f': failed {chr(44).join(failed)}' if failed else ''}"
