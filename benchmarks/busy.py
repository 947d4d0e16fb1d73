"""Speed of `dsv4 bench` and `dsv4 generate` on an idle machine, and beside as many busy processes
as there are cores.

    python benchmarks/busy.py [MODEL] [--backend torch] [--runs 3]

Threads that wait for each other lose far more than their share where others want the cores too: one
that waits must soon sleep. The goal: at least a third of the idle speed. A fair share beside n
processes on n cores is a half.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

GOAL = 1 / 3
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(1 << 20))"

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("model", nargs="?", help="the embedded one if left out")
parser.add_argument("--backend", default="torch")
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--runs", type=int, default=3, help="alternated: idle, busy")
args = parser.parse_args()
DSV4 = [sys.executable, "-m", "dsv4_core"]
FLAGS = ["--backend", args.backend]


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute without end; they end with this one."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        time.sleep(1)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def bench() -> tuple[float, float]:
    """Tokens a second of a prefill and of decode steps."""
    command = [
        *DSV4,
        "bench",
        *([args.model] if args.model else []),
        *FLAGS,
        "--json",
        "--prompt",
        "256",
        "--runs",
        "3",
    ]
    done = subprocess.run([*command, "--tokens", str(args.tokens)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)["result"]
    return found["prefill"]["tokens_per_second"], found["decode"]["tokens_per_second"]


def generate() -> float:
    """Tokens a second of a whole command, its start and its loading left out: of two lengths the
    difference, which is long enough that what a start takes more or less does not show.
    """
    seconds, more = [], 32 * args.tokens
    for tokens in (1, 1 + more):
        command = [
            *DSV4,
            "generate",
            *([args.model] if args.model else []),
            *FLAGS,
            "--prompt",
            "The",
            "--max-tokens",
            str(tokens),
        ]
        began = time.perf_counter()
        done = subprocess.run([*command, "--ignore-eos"], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        seconds.append(time.perf_counter() - began)
    return more / (seconds[1] - seconds[0])


def main() -> None:
    """Measure in turns, and print."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.runs):
        for state, processes in (("idle", 0), ("busy", cores)):
            with busy(processes):
                prefill, decode = bench()
                rates = {"bench, prefill": prefill, "bench, decode": decode, "generate": generate()}
            for name, rate in rates.items():
                found.setdefault(name, {}).setdefault(state, []).append(rate)
    print(f"--backend {args.backend}, {cores} cores, {cores} busy processes; medians of {args.runs}")
    for name, states in found.items():
        idle, beside = (statistics.median(states[state]) for state in ("idle", "busy"))
        share = beside / idle
        print(
            f"{name:>15}: idle {idle:8.1f} tokens/s, busy {beside:8.1f}: {share:.0%}{'' if share >= GOAL else ' (goal: 33 %)'}"
        )


if __name__ == "__main__":
    main()
