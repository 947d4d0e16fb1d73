"""What starting costs: importing core, listing backends; medians of seven runs each, in processes
of their own.

    python benchmarks/startup.py

Goals: ``import dsv4_core`` under 300 ms, ``dsv4 backends`` under 500 ms.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 7
COMMANDS = {
    "python alone": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import dsv4_core": ["-c", "import dsv4_core"],
    "import dsv4_core.graph.model, registry, weights": [
        "-c",
        "import dsv4_core.graph.model, dsv4_core.contract.registry, dsv4_core.checkpoint.weights",
    ],
    "dsv4 backends": ["-m", "dsv4_core", "backends"],
}


def main() -> None:
    """Alternate the commands, so that a busy moment of the machine touches all of them."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, arguments in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times[name].append(time.perf_counter() - begin)
    for name, values in times.items():
        print(f"{name:45} {1000 * statistics.median(values):6.0f} ms")


if __name__ == "__main__":
    main()
