"""``dsv4 ascend prove``: what a machine with an NPU can show of this backend, in stages of ten
minutes, into one folder and one report.

``dsv4_core/cli/stages.py`` runs them, each command in a process of its own: an exception on AI Core
leaves a process without a usable device. Nothing needs a network. With ``simulate`` the same stages
run on simulated CANN; the report's first line says that nothing of hardware was proven.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from dsv4_backend_ascend import triton
from dsv4_backend_ascend.capability import GENERATIONS
from dsv4_backend_ascend.selftest_cases import CASES
from dsv4_core.cli.stages import STAGE_SECONDS, WELL, Ran, Stage, Stages
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.ops import OPS
from dsv4_core.files.writing import write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

DSV4 = (sys.executable, "-m", "dsv4_core")
BLOCKING = {"ASCEND_LAUNCH_BLOCKING": "1"}  # the launch that raises is the one that is named


class Prover(Stages):
    """The stages of an NPU; with ``simulate`` on simulated CANN."""

    def __init__(self, out: Path, *, simulate: str | None = None, seconds: float = STAGE_SECONDS) -> None:
        """Raise ``BackendError`` for a chip that there is not, and for a folder that holds another
        kind of run.
        """
        if simulate is not None and simulate not in GENERATIONS:
            raise BackendError(f"ascend prove: simulate {simulate!r} is not one of {', '.join(GENERATIONS)}")

        def another(known: dict[str, Any]) -> BackendError:
            chip = known.get("simulate")
            kind = "on an NPU" if chip is None else f"on simulated {chip}"
            kind = kind if "simulate" in known else "of another backend"
            return BackendError(f"ascend prove: {out} holds a run {kind}; choose another folder")

        super().__init__(out, {"simulate": simulate}, another, seconds=seconds)
        self.simulate = simulate

    @property
    def heading(self) -> str:
        """What the run is of."""
        if self.simulate:
            return f"on simulated CANN ({self.simulate}), on a CPU: nothing of hardware was proven"
        return "on an NPU"

    def run(self, name: str, *argv: object, on_npu: bool = False, env: dict[str, str] | None = None) -> Ran:
        """Run a command, unless it has ended before. ``on_npu``: a simulated run leaves it out."""
        return self.command(
            name, argv, left_out="no NPU in a simulated run" if self.simulate and on_npu else "", env=env
        )

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
        write(path, "\n".join(text))
        return path

    def status(self, names: Sequence[str]) -> int:
        """Exit status of stages: 1 something failed, 3 something is left to run."""
        states = {self.stages[name].state for name in names}
        return 1 if "failed" in states else 3 if states - WELL else 0

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
    same = len({p.generated(ran) for ran in made}) == 1
    p.run("twice-the-same", sys.executable, "-c", f"raise SystemExit({0 if same else 1})")
    p.run("bench", *DSV4, "bench", "--backend", "ascend", on_npu=True)


def kernels(p: Prover) -> None:
    """Where Triton-Ascend is installed: the self-test with the vector kernels of our own, contract
    by contract, and a text made with them.
    """
    without = "" if triton.installed("simulated" if p.simulate else "found") else "no triton-ascend is installed"
    for contract in triton.KERNELS:
        report = p.out / "kernels" / f"{contract}.json"
        words = (
            "ascend",
            "selftest",
            *p.chip,
            "--small",
            "--prefer",
            "triton",
            "--contract",
            contract,
            "--report",
            report,
        )
        if any(case.contract == contract for case in CASES):
            p.command(contract, (*DSV4, *words), left_out=without, env=BLOCKING)
    device = ["-O", f"simulate={p.simulate}"] if p.simulate else []
    words = ("generate", "--tokens", "0,3,327", "-n", "4", "--backend", "ascend", *device, "-O", "prefer=triton")
    p.command("generate", (*DSV4, *words), left_out=without)


def counts(p: Prover) -> None:
    """What a decode step of Flash launches on this chip by this installation's plan, and whether it
    can be recorded.
    """
    soc = ("--soc", p.simulate) if p.simulate else ()
    p.run("launches", *DSV4, "ascend", "launches", *soc, "--report", p.out / "counts" / "launches.json")


STAGES: dict[str, Callable[[Prover], None]] = {
    "installation": installation, "selftest": selftest, "addresses": addresses, "smoke": smoke, "texts": texts, "kernels": kernels,
    "counts": counts,
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
