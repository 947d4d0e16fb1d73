"""Time dsv4's torch backend on a CPU with layers of Flash's full size, and say what it keeps in
memory.

    dsv4 init DIR --preset flash --layers 4 --seed 0
    python benchmarks/flash.py DIR

The first four layers are two of sliding-window attention, one that compresses by 4 and one by 128;
256 experts in FP4, of which a token takes 6, the rest in FP8, all random. (DIR holds the MTP block
too, which is mapped and never read.) Prompts and decoded ids are random, so that tokens take
different experts. The first run, which touches pages for the first time and records the decode
step, is printed apart and not measured; the runs after it repeat its ids, and so read the same
pages. How many pages were still fetched meanwhile is printed: from a file's copy in memory (minor)
and from the disk (major). A run with major ones says how fast the disk is.

The bound: bytes of weights that the planner counts for a step at the middle of the decoded ones,
against the sum of 256 MB in this process, measured before and after.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import statistics
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("dir", type=Path, help="a checkpoint in the published layout")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--prompt", type=int, default=512, help="tokens before the decode steps")
parser.add_argument("--tokens", type=int, default=32, help="decode steps of a run")
parser.add_argument("--runs", type=int, default=3, help="after the first")
args = parser.parse_args()
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read once, when the libraries load
    os.environ[variable] = str(args.threads)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dsv4_core.checkpoint.weights import Checkpoint  # noqa: E402
from dsv4_core.contract.registry import create  # noqa: E402
from dsv4_core.graph.cache import Cache  # noqa: E402
from dsv4_core.graph.generate import prefill  # noqa: E402
from dsv4_core.graph.model import Model  # noqa: E402
from dsv4_core.graph.replay import Replay  # noqa: E402
from dsv4_core.graph.step import Step  # noqa: E402
from dsv4_core.planning.counting import total  # noqa: E402
from dsv4_core.planning.plan import Graph  # noqa: E402
from dsv4_core.planning.rehearse import peak_resident, resident  # noqa: E402


def bandwidth() -> float:
    """Bytes a second that all threads together read: the fastest of seven sums of 256 MB."""
    block, times = torch.ones(64 << 20), []
    for _ in range(7):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return block.numel() * 4 / min(times)


def faults() -> np.ndarray:
    """Pages that this process has fetched so far, [minor, major]."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([usage.ru_minflt, usage.ru_majflt])


def run(model: Model, ids: np.ndarray) -> tuple[float, list[float], np.ndarray]:
    """Seconds of a prefill and of each decode step after it, up to the logits on the host, and the
    pages fetched in [prefill, decode] x [minor, major].
    """
    cache = Cache(model.backend, model.config, 1, ids.shape[1], rewindable=0)
    marks, clock = [faults()], [time.perf_counter()]
    model.backend.to_numpy(model.logits(prefill(model, cache, ids[:, : args.prompt]).streams))
    clock.append(time.perf_counter())
    marks.append(faults())
    replay = Replay(model, cache)
    for i in range(args.prompt, ids.shape[1]):
        step = Step(cache, ids[:, i : i + 1])
        model.backend.to_numpy(replay.logits(step))
        cache.advance(step.sequences, step.ends)
        clock.append(time.perf_counter())
    marks.append(faults())
    seconds = np.diff(clock).tolist()
    return seconds[0], seconds[1:], np.diff(marks, axis=0)


def main() -> None:
    """Run once, then ``--runs`` times, and print."""
    torch.set_num_threads(args.threads)
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in cpuinfo if "model name" in line), "unknown CPU")
    backend, checkpoint = create("torch", numerics="native", threads=args.threads), Checkpoint(args.dir)
    model = Model(checkpoint, backend)
    c = model.config
    print(
        f"dsv4 --backend torch (native), {args.threads} threads, {datetime.datetime.now(datetime.UTC).date()}; {cpu}\n"
        f"  {c.num_hidden_layers} layers, ratios {c.compress_ratios[: c.num_hidden_layers]}, hidden {c.hidden_size}, "
        f"{c.n_routed_experts} experts of which {c.num_experts_per_tok}; {checkpoint.nbytes / 1e9:.2f} GB of tensors, "
        f"{resident() / 1e9:.2f} GB resident once opened; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    ids = np.random.default_rng(0).integers(0, c.vocab_size, (1, args.prompt + args.tokens))
    first, found = run(model, ids), [bandwidth()]
    runs = [run(model, ids) for _ in range(args.runs)]
    found.append(bandwidth())
    weights = total(Graph(c, like=backend).step(1, 1, args.prompt + args.tokens // 2)).weights
    steps = [t for _, each, _ in runs for t in each]
    pages = [sum(r[2] for r in runs)[i].tolist() for i in (0, 1)]
    prompt, step = statistics.median(r[0] for r in runs), statistics.median(steps)
    low, high = np.quantile(steps, (0.1, 0.9))
    print(
        f"  first run: prefill {first[0]:.2f} s, decode {sum(first[1]) / args.tokens * 1e3:.1f} ms a token; "
        f"pages fetched (minor, major) {first[2].tolist()}\n"
        f"  prefill of {args.prompt}: {args.prompt / prompt:.1f} tokens/s, {prompt:.2f} s (median of {args.runs}: "
        f"{min(r[0] for r in runs):.2f} to {max(r[0] for r in runs):.2f}); pages fetched {pages[0]}\n"
        f"  decode after {args.prompt}: {1 / step:.1f} tokens/s, {step * 1e3:.2f} ms (median of {len(steps)} steps; fastest "
        f"{min(steps) * 1e3:.2f}, middle 80 % {low * 1e3:.2f} to {high * 1e3:.2f}); pages fetched {pages[1]}\n"
        f"  a step reads {weights / 1e9:.3f} GB of weights: {weights / step / 1e9:.1f} GB/s of "
        f"{found[0] / 1e9:.1f} and {found[1] / 1e9:.1f}: {weights / step / max(found):.0%} of the bound\n"
        f"  resident: {resident() / 1e9:.2f} GB at the end (of it pages of files {resident('RssFile') / 1e9:.2f}), "
        f"most {peak_resident() / 1e9:.2f}"
    )


if __name__ == "__main__":
    main()
