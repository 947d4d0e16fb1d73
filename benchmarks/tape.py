"""Where the time of a recorded decode step goes, on a CPU: each C kernel of the torch backend's
tape called alone.

    python benchmarks/tape.py [MODEL] [--rows 16] [--context 100] [--threads 1]

A kernel's time is the fastest of 20 calls, Python's call of it included (about 0.7 us). Beside
their sum: the median of whole steps, from the step's addresses to logits on the host.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np

from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.contract.registry import create
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.generate import prefill
from dsv4_core.graph.model import Model
from dsv4_core.graph.replay import Replay
from dsv4_core.graph.step import Addresses, Step

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("model", nargs="?", help="the embedded one if left out")
parser.add_argument("--rows", type=int, default=16, help="sequences side by side")
parser.add_argument("--context", type=int, default=100, help="tokens before the step")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--steps", type=int, default=64, help="whole steps")
args = parser.parse_args()


def main() -> None:
    """Feed a context, decode, record one more step, and print."""
    backend = create("torch", numerics="native", threads=args.threads)
    model = Model(Checkpoint(args.model or embedded()), backend)
    cache = Cache(backend, model.config, args.rows, args.context + args.steps + 1, rewindable=0)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (args.rows, args.context + args.steps + 1))
    prefill(model, cache, ids[:, : args.context], chunk=512)
    replay, seconds = Replay(model, cache), []
    for i in range(args.steps):
        begin = time.perf_counter()
        step = Step(cache, ids[:, args.context + i : args.context + i + 1])
        backend.to_numpy(replay.logits(step))
        cache.advance(step.sequences, step.ends)
        seconds.append(time.perf_counter() - begin)
    step = Step(cache, ids[:, -1:])
    recorded = backend.record(lambda buffer: model.logits(model.forward(Addresses(cache, step.shape, buffer))))
    recorded(step.host)
    kernels: dict[str, list[float]] = {}
    for name, t in recorded.timed():
        kernels.setdefault(name, []).append(t)
    if not kernels:
        sys.exit(f"no tape: {recorded.why or 'no C kernels'}")
    total = sum(map(sum, kernels.values()))
    print(
        f"{args.rows} rows after {args.context} tokens, {args.threads} threads: step {statistics.median(seconds) * 1e3:.2f} ms, kernels {total * 1e3:.2f} ms"
    )
    for name, each in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        print(
            f"{name:>14} {sum(each) * 1e3:8.3f} ms {sum(each) / total:6.1%} {len(each):4d} calls {sum(each) / len(each) * 1e6:7.1f} us each"
        )


if __name__ == "__main__":
    main()
