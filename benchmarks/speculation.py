"""Speculation on the embedded model: tokens a step, and time against plain decoding.

    python benchmarks/speculation.py [--drafter DIR] [--backend torch --backend reference] [--tokens
    48] [--temperature 0 --temperature 1]

Plain decoding, the embedded MTP block (K = 1) and, where one is named, a DSpark drafter (K = 1 ..
5; distil_drafter.py makes one) continue the same questions, one after the other, in one process. A
way's first answer is not counted: kernels are compiled and decode steps recorded by then. ``tokens
a step``: of the main model, the correction included. ``CPU ms``: processor time a token, which
other processes change little; ``ms``: by the clock. The tokens of every way are held against plain
decoding's, and a difference is printed.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

import dsv4_core as dsv4

WORDS = ("kludge", "foo", "hacker", "bit bucket", "glitch", "cookie")


def answered(session: dsv4.Session, count: int, temperature: float, tokens: int) -> tuple[list[list[int]], list[float]]:
    """Answer each question; give the tokens, and [steps, tokens, proposed, accepted, CPU seconds,
    seconds] of decoding.
    """
    written: list[list[int]] = []
    sums = [0.0] * 6
    for word in WORDS:
        turn = [{"role": "user", "content": f"What is {word}?"}]
        run = session.generate(turn, max_tokens=tokens, temperature=temperature, seed=7, speculative=count)
        next(run)  # prefill and the first token
        begun = time.process_time(), time.perf_counter()
        run.run()
        spent = time.process_time() - begun[0], time.perf_counter() - begun[1]
        new = run.tokens[0]
        written.append(new)
        if word == WORDS[0]:
            continue
        d = run.drafts
        found = (d.steps - 1, len(new) - 1, d.proposed, d.accepted, *spent)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    return written, sums


def main() -> None:
    """Print a table for each backend and temperature."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter")
    parser.add_argument("--backend", action="append")
    parser.add_argument("--temperature", type=float, action="append")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    for backend in args.backend or ["torch", "reference"]:
        with ExitStack() as stack:
            own = stack.enter_context(dsv4.load(backend=backend))
            ways = [("plain", own, 0), ("MTP, K = 1", own, 1)]
            if args.drafter:
                other = stack.enter_context(dsv4.load(backend=backend, drafter=args.drafter))
                ways += [(f"DSpark, K = {k}", other, k) for k in range(1, other.most_drafts + 1)]
            for temperature in args.temperature or [0.0, 1.0]:
                print(f"\n{backend}, temperature {temperature:g}\n")
                print("| way | tokens a step | drafts kept | CPU ms a token | ms a token | against plain, CPU |")
                print("| --- | ---: | ---: | ---: | ---: | ---: |")
                plain: tuple[list[list[int]], float] | None = None
                for name, session, count in ways:
                    written, (steps, tokens, proposed, kept, cpu, wall) = answered(
                        session, count, temperature, args.tokens
                    )
                    plain = plain or (written, cpu / tokens)
                    share = f"{kept / proposed:.0%}" if proposed else ""
                    print(
                        f"| {name} | {tokens / steps:.2f} | {share} | {1000 * cpu / tokens:.1f} | {1000 * wall / tokens:.1f} "
                        f"| {plain[1] / (cpu / tokens):.2f}x |",
                        flush=True,
                    )
                    if other := [w for w, a, b in zip(WORDS, plain[0], written, strict=True) if a != b]:
                        print(f"  (other tokens than plain decoding's: {', '.join(other)})")


if __name__ == "__main__":
    main()
