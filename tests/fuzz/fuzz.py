"""Fuzz every surface and print the table: python tests/fuzz/fuzz.py --inputs 5000 [--seconds 120] [--only NAME] [--seed 0].

Bad inputs are added to ``corpus/``, which the tests replay; the exit status is 1 where there are any.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["DSV4_ONE_PROCESS"] = "1"
from harness import BAD, fuzz, fuzz_lines, patch
from surfaces import prepare, surfaces

CORPUS = Path(__file__).parent / "corpus"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=500, help="for each surface")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of them together")
    parser.add_argument("--only", action="append", default=[], help="a surface; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        prepare(folder)
        all_of_them = [s for s in surfaces(folder) if not given.only or s.name in given.only]
        lines = not given.only or "arguments" in given.only
        share = given.seconds / (len(all_of_them) + lines)
        print(
            f"{'surface':20} {'inputs':>7} {'accepted':>9} {'refused':>8} " + " ".join(f"{b:>13}" for b in BAD),
            flush=True,
        )
        for surface in [*all_of_them, *([None] if lines else [])]:
            until, began = time.monotonic() + share, time.monotonic()
            tally = (
                fuzz(folder, surface, max(1, given.inputs // surface.slow), given.seed, until)
                if surface
                else fuzz_lines(folder, given.inputs, given.seed, until)
            )
            counts = tally.counts
            row = " ".join(f"{counts.get(b, 0):13}" for b in BAD)
            label = surface.name if surface else "arguments"
            seconds = time.monotonic() - began
            print(
                f"{label:20} {sum(counts.values()):7} {counts.get('accepted', 0):9} {counts.get('refused', 0):8} {row}  {seconds:.0f} s",
                flush=True,
            )
            seen = set()
            for _, data, words, outcome in tally.bad:
                key = (outcome.verdict, outcome.place or outcome.said[-60:])
                if key in seen:
                    continue
                seen.add(key)
                print(
                    f"    {outcome.verdict}: {' '.join(words)[:100]}: {outcome.place} {outcome.said[-240:]!r}",
                    flush=True,
                )
                keep(
                    surface.name if surface else "arguments",
                    (folder / surface.file).read_bytes() if surface else b"",
                    data,
                    words,
                )
            found += len(tally.bad)
    return int(bool(found))


def keep(name: str, good: bytes, data: bytes, words: tuple[str, ...]) -> None:
    """Add an input to the corpus of its surface."""
    front, length, new = patch(good, data)
    if len(new) > 1 << 16:
        return
    entry = (
        {"words": list(words), "at": front, "length": length, "new": base64.b64encode(new).decode()}
        if good
        else {"words": list(words)}
    )
    CORPUS.mkdir(exist_ok=True)
    with (CORPUS / f"{name.replace(' ', '-')}.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    sys.exit(main())
