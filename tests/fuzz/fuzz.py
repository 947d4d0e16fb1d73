"""Fuzz every surface: python tests/fuzz/fuzz.py --inputs 5000 [--seconds 120] [--only NAME] [--seed
0].

A campaign of hours keeps what it did in a ledger, goes on where it ended, and is reported from
there:

    python tests/fuzz/fuzz.py --inputs 5000 --ledger campaign.jsonl
    python tests/fuzz/fuzz.py --ledger campaign.jsonl --report reports/fuzz/2026-11-28.md

Bad inputs are added to ``corpus/``, which the tests replay; the exit status is 1 where there are
any. A report tries them once more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["DSV4_ONE_PROCESS"] = "1"
from harness import BAD, Tally, again, entry_of, fuzz, fuzz_lines
from surfaces import Surface, prepare, surfaces

CORPUS = Path(__file__).parent / "corpus"
BATCH = 240
LINES = "arguments"
Range = dict[str, Any]
"""Of a ledger: surface, seed, first, inputs, counts, seconds, commit, bad."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500, help="for each surface; fewer for slow ones")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of them together")
    parser.add_argument("--only", action="append", default=[], help="a surface; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, help="a line for each range of inputs; ranges in it are not run again")
    parser.add_argument("--report", type=Path, help="write the ledger's table, and run nothing but its bad inputs")
    given = parser.parse_args()
    ledger = _read(given.ledger)
    with tempfile.TemporaryDirectory() as name:
        folder, report = Path(name), given.report and given.report.absolute()
        os.chdir(folder)
        prepare(folder)
        chosen = {s.name: s for s in surfaces(folder)} | {LINES: None}
        if report:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(_report(folder, ledger, chosen))
            return 0
        chosen = {name: s for name, s in chosen.items() if not given.only or name in given.only}
        ran = _campaign(folder, chosen, given, ledger)
    print(_table(ran))
    return int(any(r["bad"] for r in ran))


def _read(path: Path | None) -> list[Range]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def _campaign(
    folder: Path, chosen: dict[str, Surface | None], given: argparse.Namespace, ledger: list[Range]
) -> list[Range]:
    """Run what is not in the ledger: a batch of every surface in turn, so that all are as far
    whenever it is ended.
    """
    until, commit = time.monotonic() + given.seconds, _commit()
    done = {(r["surface"], r["seed"], r["first"]) for r in ledger}
    ran: list[Range] = []
    for first in range(0, given.inputs, BATCH):
        for name, surface in chosen.items():
            slow = surface.slow if surface else 1
            start, inputs = first // slow, min(BATCH, given.inputs - first) // slow
            if (name, given.seed, start) in done or not inputs or time.monotonic() > until:
                continue
            began = _cpu()
            tally = (
                fuzz(folder, surface, inputs, given.seed, until, start)
                if surface
                else fuzz_lines(folder, inputs, given.seed, until, start)
            )
            good = (folder / surface.file).read_bytes() if surface else b""
            line: Range = {
                "surface": name,
                "seed": given.seed,
                "first": start,
                "inputs": inputs,
                "counts": tally.counts,
            }
            line |= {"seconds": round(_cpu() - began, 2), "commit": commit, "bad": _bad(folder, name, good, tally)}
            ran.append(line)
            if given.ledger:
                with given.ledger.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return ran


def _cpu() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _bad(folder: Path, name: str, good: bytes, tally: Tally) -> list[dict[str, Any]]:
    """Print bad inputs, and add one of each kind to the corpus of the surface."""
    found, seen = [], set()
    for data, words, outcome in tally.bad:
        entry = entry_of(folder, good, data, words)
        found.append(entry | {"verdict": outcome.verdict, "place": outcome.place, "said": outcome.said[-300:]})
        key = (outcome.verdict, outcome.place or outcome.said[-60:])
        if key in seen:
            continue
        seen.add(key)
        told = f"{name}: {outcome.verdict}: {' '.join(words)[:100]!r}: {outcome.place} {outcome.said[-240:]!r}"
        print(told, flush=True)
        if len(entry["new"]) < 1 << 16:
            CORPUS.mkdir(exist_ok=True)
            with (CORPUS / f"{name.replace(' ', '-')}.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
    return found


def _rows(ran: list[Range]) -> dict[str, Counter[str]]:
    rows: dict[str, Counter[str]] = {}
    for line in ran:
        row = rows.setdefault(line["surface"], Counter())
        row.update(line["counts"])
        row["inputs"] += sum(line["counts"].values())
        row["seconds"] += line["seconds"]
    return rows


def _table(ran: list[Range]) -> str:
    """The counts of every surface, as Markdown."""
    columns = ["inputs", "accepted", "refused", *BAD]
    rows = _rows(ran)
    total: Counter[str] = sum(rows.values(), Counter())
    lines = [f"| surface | {' | '.join(columns)} | CPU seconds |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for name, row in [*rows.items(), ("sum", total)]:
        lines.append(f"| {name} | {' | '.join(str(row[c]) for c in columns)} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def _report(folder: Path, ledger: list[Range], chosen: dict[str, Surface | None]) -> str:
    """The ledger's table, and what its bad inputs come to now."""
    commits = sorted({line["commit"] for line in ledger})
    bad = {name: [e for line in ledger if line["surface"] == name for e in line["bad"]] for name in chosen}
    kinds: list[str] = []
    left = 0
    for name, entries in bad.items():
        if not entries:
            continue
        outcomes = again(folder, chosen[name], entries)
        left += sum(o.verdict in BAD for o in outcomes)
        first: dict[tuple[str, str], list[bool]] = {}
        for entry, outcome in zip(entries, outcomes, strict=True):
            key = entry["verdict"], entry["place"] or entry["said"][-80:].strip().replace("|", "\\|")
            first.setdefault(key, []).append(outcome.verdict in BAD)
        kinds += [f"| {name} | {v} | `{place}` | {len(w)} | {sum(w)} |" for (v, place), w in first.items()]
    text = [
        "# Fuzzing", "", "Generated by `python tests/fuzz/fuzz.py --ledger FILE --report FILE`; do not edit.", "",
        f"{sum(r['inputs'] for r in _rows(ledger).values())} inputs, {len(bad)} surfaces, {time.strftime('%Y-%m-%d')}. Found bad:",
        f"{sum(map(len, bad.values()))}; still bad in commit {_commit()}: **{left}**. Inputs ran in {', '.join(commits)}.", "",
        "An input is bad where it ends in a traceback, a message that names no file, a signal, 60 seconds without an end,",
        "a lack of memory (4 GiB), a control character on the terminal, or exit status 0 with a result other than the sound one's.", "",
        _table(ledger), "",
    ]  # fmt: skip
    if kinds:
        text += ["| surface | was | where | inputs | still |", "|---|---|---|---:|---:|", *kinds, ""]
    return "\n".join(text)


def _commit() -> str:
    here = Path(__file__).parent
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "?"


if __name__ == "__main__":
    sys.exit(main())
