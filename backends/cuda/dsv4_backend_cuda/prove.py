"""``dsv4 kernels prove``: everything that a machine with a GPU can show of these kernels, in stages
of ten minutes, into one folder and one report.

``dsv4_core/cli/stages.py`` runs them and remembers what ended. Nothing needs a network.
``--dry-run`` goes through the same stages on a machine without a GPU: kernels run in the
interpreter or are launched dry, tools that want a GPU are left out, and the report says so in its
first line.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.rules import RULES
from dsv4_core.cli.stages import STAGE_SECONDS, Ran, Stages
from dsv4_core.files.writing import write

SANITISED_AT_ONCE = 12
RACES = (
    "expert_linear",
    "linear",
    "sparse_attn",
    "index_select",
    "hc_pre",
    "dispatch",
)  # ops whose kernels share memory between warps
DSV4 = (sys.executable, "-m", "dsv4_core")
HERE = (sys.executable, "-m", "dsv4_backend_cuda.proving")


class Prover(Stages):
    """The stages of a GPU; with ``dry`` on a machine without one."""

    def __init__(self, out: Path, *, dry: bool, seconds: float = STAGE_SECONDS) -> None:
        """Raise ``FileExistsError`` for a folder that holds another kind of run."""

        def another(known: dict[str, Any]) -> FileExistsError:
            kind = "dry run" if known.get("dry") else "run on a GPU"
            kind = kind if "dry" in known else "run of another backend"
            return FileExistsError(f"{out} holds a {kind}; choose another folder")

        super().__init__(out, {"dry": dry}, another, seconds=seconds)
        self.dry = dry

    def run(
        self, name: str, argv: Iterable[Any], *, on_gpu: bool = False, tool: str = "", package: str = "", env: dict[str, str] | None = None
    ) -> Ran:  # fmt: skip
        """Run a command, unless it has ended before. ``on_gpu``: a dry run leaves it out; ``tool``,
        ``package``: so does a machine without it.
        """
        left_out = ""
        if self.dry and on_gpu:
            left_out = "a dry run has no GPU"
        elif tool and not shutil.which(tool):
            left_out = f"{tool} is not on the path"
        elif package and find_spec(package) is None:
            left_out = f"{package} is not installed"
        return self.command(name, argv, left_out=left_out, env=env)

    # What a GPU runs, a dry run interprets: slowly, so of few ops.

    def suite(
        self, name: str, *words: str, jobs: int = 12, report: bool = True, env: dict[str, str] | None = None
    ) -> Ran:
        """Run the conformance suite on the backend."""
        argv = [*DSV4, "conformance", "run", "--backend", "cuda", "--quiet", *words]
        if report:
            argv += ["--report", str(self.out / self.current.name / name)]
        if self.dry:
            argv += (
                ["--interpret", "--tier", "smoke", "--op", "hadamard", "--op", "act_quant"]
                if "--case" not in words
                else ["--interpret"]
            )
            jobs = 1
        return self.run(name, [*argv, "--jobs", str(jobs)], env=env)


def failing(report: Path) -> list[str]:
    """Ids of the checks that did not pass, the first of each op."""
    if not report.exists():
        return []
    fine = {"passed", "unsupported", "xfailed"}
    bad = [f for f in json.loads(report.read_text())["findings"] if f.get("status", "passed") not in fine]
    return list({f.get("op", f["id"].partition("/")[0]): f["id"] for f in reversed(bad)}.values())


def versions(p: Prover) -> None:
    """Versions and ceilings; every kernel compiled for this GPU, gated, and the specialisations of
    the models' steps in Triton's cache.
    """
    p.run("machine", ["nvidia-smi"], tool="nvidia-smi")
    p.run("packages", [sys.executable, "-m", "pip", "freeze"])
    p.run("doctor", [*DSV4, "doctor"])
    p.run("ceilings", [*HERE, "ceilings", "--json", p.out / "ceilings.json"], on_gpu=True)
    arch = launch.ARCHITECTURES[2] if p.dry else launch.architecture("cuda")
    kernels = ("--kernel", "hadamard") if p.dry else ()
    p.run("build", [*DSV4, "kernels", "build", "--untested-triton", "--arch", f"sm_{arch}", "--jobs", str(os.cpu_count() or 1), *kernels,
                    "--report", p.out / "kernels.json"])  # fmt: skip
    p.run(
        "warm",
        [
            *DSV4,
            "kernels",
            "warm",
            "--preset",
            "flash",
            "--preset",
            "pro",
            *(("--arch", "90", "--depth", "count") if p.dry else ()),
        ],
    )


def smoke(p: Prover) -> None:
    """Every op alone in a process: one op's fault stays its own. What fails is run again with
    launches one by one.
    """
    p.suite("suite", "--tier", "smoke", "--isolate", "--time-limit", "60")
    for case in failing(p.out / "smoke" / "suite" / "report.json")[:20]:
        name = "blocking-" + case.replace("/", "-")
        p.suite(name, "--case", case, jobs=1, report=False, env={"CUDA_LAUNCH_BLOCKING": "1"})


def sanitise(p: Prover) -> None:
    """compute-sanitizer on a smoke case of every op with a kernel, and on a prompt and a decode
    step of the embedded model, in which ops share launches. Without torch's pools, which would hide
    an overrun.
    """
    listed = p.run(
        "cases",
        [
            *DSV4,
            "conformance",
            "run",
            "--backend",
            "cuda",
            "--tier",
            "smoke",
            "--list",
            *(["--interpret"] if p.dry else []),
        ],
    )
    cases: dict[str, str] = {}
    for line in p.text(listed).splitlines():
        op = line.partition("/")[0]
        if op in RULES and "/" in line:
            cases.setdefault(op, line.strip())

    def sanitised(name: str, check: str, argv: list[str]) -> None:
        words = ["compute-sanitizer", "--tool", check, "--error-exitcode", "9", *argv]
        p.run(name, words, on_gpu=True, tool="compute-sanitizer", env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    for check, ops in (
        ("memcheck", list(cases)),
        ("initcheck", list(cases)),
        ("racecheck", [op for op in RACES if op in cases]),
    ):
        for begin in range(0, len(ops), SANITISED_AT_ONCE):
            some = ops[begin : begin + SANITISED_AT_ONCE]
            words = [w for op in some for w in ("--case", cases[op])]
            judged = [*DSV4, "conformance", "run", "--backend", "cuda", "--quiet", *words]
            sanitised(f"{check}-{begin // SANITISED_AT_ONCE}", check, judged)
        # one decode step: a second one would be recorded as a graph, whose memory is torch's pools'
        sanitised(f"{check}-step", check, [*DSV4, "generate", "--tokens", "0,3,327", "-n", "2", "--backend", "cuda"])


def standard(p: Prover) -> None:
    """The standard tier; the same tokens twice and as torch makes them; where the first op leaves
    its budget in a model.
    """
    p.suite("suite", "--tier", "standard", "--isolate", *(() if p.dry else ("--require", "3")), jobs=14)
    generate = [*DSV4, "generate", "--tokens", "0,3,327", "-n", "4" if p.dry else "200", "--backend"]
    mine = [*generate, "cuda", *(["--interpret"] if p.dry else [])]
    made = [p.run(f"generate-{i}", mine) for i in (1, 2)]
    p.run("generate-torch", [*generate, "torch", *(() if p.dry else ("--device", "cuda"))])
    same = len({p.generated(ran) for ran in made}) == 1
    p.run("twice-the-same", [sys.executable, "-c", f"raise SystemExit({0 if same else 1})"])
    p.run(
        "localise",
        [
            *DSV4,
            "conformance",
            "localise",
            "--backend",
            "cuda",
            "--against",
            "torch",
            "--cases",
            p.out / "standard" / "localised",
        ],
        on_gpu=True,
    )


def libraries(p: Prover) -> None:
    """Other libraries that are installed here: their ops' cases, and each call against the kernel
    that it stands for.
    """
    from dsv4_backend_cuda.providers import CALLS, LIBRARIES  # imports torch, which --help does without

    for name, library in LIBRARIES.items():
        ops = [w for op, call in CALLS.items() if call.library == name for w in ("--op", op)]
        argv = [
            *DSV4,
            "conformance",
            "run",
            "--backend",
            "cuda",
            "--option",
            f"prefer={name}",
            "--tier",
            "standard",
            "--quiet",
            *ops,
        ]
        p.run(name, [*argv, "--report", p.out / "libraries" / f"{name}-report"], on_gpu=True, package=library.package)


def timed(p: Prover) -> None:
    """Device time of every op of full-size layers beside floors and torch's ops; steps of a model
    that fits.
    """
    p.run("ops", [*HERE, "times", "--json", p.out / "times.json", *(["--dry-run"] if p.dry else [])])
    model = p.out / "flash3"
    p.run(
        "model",
        [*DSV4, "init", model, "--preset", "flash", "--layers", "3", "--ratios", "0,4,128", "--seed", "1"],
        on_gpu=True,
    )
    for batch in (1, 8, 64):
        for name, words in (("cuda", ()), ("torch", ("--device", "cuda"))):
            p.run(
                f"bench-{name}-{batch}",
                [*DSV4, "bench", model, "--backend", name, *words, "--batch", str(batch)],
                on_gpu=True,
            )


def tuned(p: Prover) -> None:
    """The launch table of this GPU, written beside the report, and the smoke cases of what it
    changes. The package's own table stays.
    """
    table = p.out / "launch_table.json"
    for kernel in ("experts", "linear"):
        p.run(
            f"tune-{kernel}",
            [*DSV4, "kernels", "tune", "--untested-triton", "--kernel", kernel, "--out", table],
            on_gpu=True,
        )
    words = [w for op in ("linear", "expert_linear", "moe") for w in ("--op", op)]
    argv = [*DSV4, "conformance", "run", "--backend", "cuda", "--tier", "smoke", "--quiet", *words]
    p.run("smoke", argv, on_gpu=True, env={"DSV4_LAUNCH_TABLE": str(table)})


def counters(p: Prover) -> None:
    """Nsight Compute on the kernels that a step spends most time in."""
    names = "regex:moe_matmul|input_matmul|fp4_matmul|scaled_matmul|sparse_attn|index_select|mix|reduce"
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "-k", names, "-c", "12", "-f", "-o", p.out / "ncu"]
    p.run(
        "ncu",
        [*map(str, ncu), *DSV4, "bench", p.out / "flash3", "--backend", "cuda", "--tokens", "2", "--runs", "1"],
        on_gpu=True,
        tool="ncu",
    )


STAGES: dict[str, Callable[[Prover], None]] = {
    "versions": versions, "smoke": smoke, "sanitise": sanitise, "standard": standard, "libraries": libraries, "times": timed, "tune": tuned,
    "counters": counters,
}  # fmt: skip


def report(p: Prover, where: dict[str, str] | None = None) -> str:
    """Markdown: where, how each stage ended, what failed with its last lines, predictions beside
    results.
    """
    first = (
        "**A dry run: no GPU, no time, no proof.**" if p.dry else f"Measured on {(where or {}).get('device', 'a GPU')}."
    )
    lines = ["# What this machine shows of the CUDA kernels", "", first, ""]
    lines += [*(f"- {what}: {found}" for what, found in where.items()), ""] if where else []
    lines += [
        "| stage | ended | commands | passed | failed | late | left out | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in STAGES:
        stage = p.stages.get(name)
        if stage is None:
            lines.append(f"| {name} | not started | | | | | | |")
            continue
        by = [r.state for r in stage.ran.values()]
        counts = " | ".join(str(by.count(s)) for s in ("passed", "failed", "late", "left out"))
        lines.append(
            f"| {name} | {stage.state} | {len(by)} | {counts} | {sum(r.seconds for r in stage.ran.values()):.0f} |"
        )
    for stage in p.stages.values():
        for ran in stage.ran.values():
            if ran.state in {"failed", "late"}:
                tail = p.text(ran).strip().splitlines()[-5:]
                lines += [
                    "",
                    f"## {stage.name}/{ran.name}: {ran.state} {ran.why}",
                    "",
                    "    " + " ".join(ran.argv),
                    "",
                    *(f"    {t}" for t in tail),
                ]
    left = [f"{s.name}/{r.name}: {r.why}" for s in p.stages.values() for r in s.ran.values() if r.state == "left out"]
    if left:
        lines += ["", "## Left out", "", *(f"- {line}" for line in left)]
    return "\n".join([*lines, *compared(p.out)]) + "\n"


PARTS = {  # of a layer without compression: what the model of the machine code predicts, and which call of which op measures it
    "wq_a": ("linear", 0), "wq_b": ("linear", 1), "wkv": ("linear", 2), "wo_b": ("linear", 3), "wo_a": ("grouped_linear", 0),
}  # fmt: skip


def compared(out: Path) -> list[str]:
    """Predicted beside measured, products of one token; and every op that takes more than twice its
    floor and 5 microseconds.
    """
    if not (out / "times.json").exists() or not (out / "kernels.json").exists():
        return []
    rows = json.loads((out / "times.json").read_text())
    built = json.loads((out / "kernels.json").read_text())["decode"]
    predicted = {(s["model"], s["layer"]): s["microseconds"] for s in built}
    if not predicted:  # a dry run compiles one kernel
        return []
    lines = [
        "",
        "## Predictions beside results",
        "",
        "| model | product | floor us | predicted us | measured us | torch us |",
        "|---|---|---|---|---|---|",
    ]
    for model in ("flash", "pro"):
        calls = [r for r in rows if (r["model"], r["ratio"], r["step"]) == (model, 0, "1 x 1 after 8191")]
        for layer, (op, index) in PARTS.items():
            same = [r for r in calls if r["op"] == op]
            if index < len(same) and (model, layer) in predicted:
                r = same[index]
                lines.append(
                    f"| {model} | {layer} | {r['floor_us']} | {predicted[model, layer]} | {_cell(r['us'])} | {_cell(r['torch_us'])} |"
                )
    slow = [r for r in rows if r["us"] and r["us"] > 2 * r["floor_us"] and r["us"] > 5]
    if slow:
        lines += [
            "",
            "## Furthest from their floors",
            "",
            "| model | ratio | step | op | kernels | floor us | measured us |",
            "|---|---|---|---|---|---|---|",
        ]
    for r in sorted(slow, key=lambda r: r["floor_us"] - r["us"])[:40]:
        lines.append(
            f"| {r['model']} | {r['ratio']} | {r['step']} | {r['op']} | {r['kernels']} | {r['floor_us']} | {r['us']:.1f} |"
        )
    return lines


def _cell(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def prove(
    out: Path, *, dry: bool, only: tuple[str, ...] = (), again: bool = False, tell: Callable[[str], None]
) -> tuple[Prover, str]:
    """Run the stages (those named, or all) and write ``report.md``; ``tell`` hears a line as each
    ends. Raises ``BackendError`` without a GPU.
    """
    where: dict[str, Any] = {}
    if not dry:
        from dsv4_backend_cuda import device

        arch = device.require_gpu("cuda")
        where = device.environment(0, arch)
    p = Prover(out, dry=dry)
    for name, steps in STAGES.items():
        if not only or name in only:
            tell(p.stage(name, steps, again=again).line)
            text = report(p, where)
            write(out / "report.md", text)
    return p, text
