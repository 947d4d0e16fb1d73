"""What a step's token budget costs whom: requests that decode wait for the prompts that are read
beside them, prompts for the budget.

    python benchmarks/budgets.py [--backend torch] [--budgets 32 64 128 256 512 1024 2048]
    [--report FILE]

Eight requests decode in an engine on the embedded model (a new one takes the place of each that
ends), and a prompt of 1000 tokens comes every so many tokens that they are given. Time is the
process's own (CPU seconds), which other work on the machine does not change much; one thread, so
that it is the clock's on an idle machine.
"""

import argparse
import datetime
import json
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil

from dsv4_core.checkpoint.weights import embedded
from dsv4_core.graph.engine import Engine, Request
from dsv4_core.session import load

DECODING, TOKENS, PROMPT, READ, EVERY, ROUNDS = 8, 64, 40, 1000, 256, 6


def measured(model, budget) -> dict[str, object]:
    """A row of the table: what those who decode and those who send a long prompt are given."""
    engine = Engine(model, slots=DECODING + 2, capacity=1200, budget=budget, chunk=budget, reuse=False)
    rng = np.random.default_rng(0)

    def submit(length, tokens) -> int:
        return engine.submit(Request(tuple(rng.integers(10, 2000, length).tolist()), tokens))

    decoding = {submit(PROMPT, TOKENS) for _ in range(DECODING)}
    asked: dict[int, float] = {}
    last: dict[int, float] = {}
    between, first, given = [], [], 0
    began = time.process_time()
    while len(first) < ROUNDS:
        events = engine.step()
        now = time.process_time()
        for event in events:
            if event.id in asked:
                first.append(now - asked.pop(event.id))
            elif event.id in decoding:
                given += 1
                if event.id in last:
                    between.append(now - last[event.id])
                last[event.id] = now
                if event.finish:
                    decoding.remove(event.id)
                    decoding.add(submit(PROMPT, TOKENS))
                if given % EVERY == 0:
                    asked[submit(READ, 1)] = now
    spent = time.process_time() - began
    stats = engine.stats
    return {
        "budget": budget,
        "generated/CPU s": round(given / spent, 1),
        "prompt tokens/CPU s": round((stats.rows - given) / spent, 1),
        "between CPU ms": [round(1000 * float(np.percentile(between, q)), 2) for q in (50, 99, 100)],
        "first token of a long prompt CPU ms": round(1000 * float(np.median(first)), 1),
    }


def main() -> None:
    """Measure, print, write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--budgets", type=int, nargs="*", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    model = load(embedded(), backend=given.backend).model
    measured(model, 256)
    rows = []
    for budget in given.budgets:
        rows.append(measured(model, budget))
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "backend": given.backend,
        "requests that decode": DECODING,
        "tokens of a long prompt": READ,
        "percentiles": [50, 99, 100],
        "load of the machine": [round(x, 1) for x in psutil.getloadavg()],
        "rows": rows,
    }
    if given.report:
        given.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
