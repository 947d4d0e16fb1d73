"""Peak resident memory of generating from a checkpoint of Flash's own layer sizes, against the
weights that it touches.

    python benchmarks/memory.py [--backend reference] [--tokens 8] [--dir DIR]

Writes ``dsv4 init --preset flash --layers 4 --experts 64`` (all three kinds of attention, both
kinds of routing) unless DIR holds one, generates in a process of its own in native mode with no
dequantised weight kept, and prints the peak, the touched weights' bytes and the time per token. The
goal: peak under touched + 1 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

GB = 1e9


def touched(checkpoint, model) -> int:
    """Bytes of weights that a forward reads: all but the embedding's rows, and of the experts those
    that were routed to.
    """
    total = 0
    for name in checkpoint.names:
        if ".experts." not in name and name != "embed.weight":
            total += checkpoint.array(name).nbytes
    blocks = [*model.blocks, *([model.mtp_block.block] if model.mtp_block else [])]
    for block in blocks:
        for projection in block.ffn.experts:
            total += sum(weight.nbytes for weight in projection.experts.loaded.values())
    return total


def child(directory: Path, backend: str, tokens: int) -> None:
    """Generate and print one line of figures."""
    from dsv4_core.checkpoint.weights import Checkpoint
    from dsv4_core.contract.registry import create
    from dsv4_core.graph.generate import generate
    from dsv4_core.graph.model import Model

    checkpoint = Checkpoint(directory)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = Model(checkpoint, create(backend, numerics="native", weight_cache=0))
    times = [time.perf_counter()]
    times.extend(time.perf_counter() for _ in generate(model, [list(range(100, 116))], max_tokens=tokens))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    decode = np.diff(times[1:])
    figures = {"peak": peak, "before": before, "touched": touched(checkpoint, model), "checkpoint": checkpoint.nbytes}
    print(json.dumps(figures | {"first": times[1] - times[0], "decode": float(np.median(decode))}))


def main() -> None:
    """Write the checkpoint, run the child, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.backend, args.tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.dir or Path(scratch) / "flash-4"
        if not (directory / "config.json").exists():
            init = [
                sys.executable,
                "-m",
                "dsv4_core",
                "init",
                str(directory),
                "--preset",
                "flash",
                "--layers",
                "4",
                "--experts",
                "64",
                "--seed",
                "0",
            ]
            subprocess.run(init, check=True)
        command = [
            sys.executable,
            __file__,
            "--child",
            str(directory),
            "--backend",
            args.backend,
            "--tokens",
            str(args.tokens),
        ]
        f = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"checkpoint {f['checkpoint'] / GB:.2f} GB, 16 prompt tokens, {args.tokens} generated, backend {args.backend}, native, weight cache 0"
    )
    print(
        f"peak resident {f['peak'] / GB:.2f} GB (of it before the model {f['before'] / GB:.2f}); weights touched {f['touched'] / GB:.2f} GB"
    )
    over = (f["peak"] - f["touched"]) / GB
    print(f"peak - touched = {over:.2f} GB: {'within' if over < 1 else 'OVER'} the 1 GB allowed")
    print(f"first token {f['first']:.2f} s, then {f['decode']:.2f} s a token (median)")


if __name__ == "__main__":
    main()
