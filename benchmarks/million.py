"""A million tokens for real: a chunked prefill of 2^20 tokens, decode from 8K to 1M, and one
full-size layer of each kind at 1M.

    python benchmarks/million.py prefill --out RUN.json [--backend reference] [--tokens 1M] [--chunk
    1024] python benchmarks/million.py decode  --out RUN.json [--backend reference] python
    benchmarks/million.py alone   --out RUN.json [--backend reference] python benchmarks/million.py
    layers  --out RUN.json [--backend reference] python benchmarks/million.py draw RUN.json ... --to
    docs/

``prefill`` runs a small model with all three kinds of layers (ratios 0, 4, 128; indexer 2 x 32)
over the whole context, notes memory and time after every chunk, decodes a few tokens at 8K, 64K,
256K and 1M, and holds the cache's bytes to the formula. ``decode`` times decode steps by kind of
layer and op, on a cache filled with random rows, each the best of several. ``alone`` times sparse
attention without an indexer before it, whose scan of all keys empties the processor's caches, and
with 256 MB read before each call instead. ``layers`` times decode steps of one full-size layer of
each kind of Flash and of Pro; the same token each time, so that all runs but the first find its
experts drawn. Native mode throughout. Every figure goes to RUN.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_core.checkpoint.config import PRESETS, ModelConfig, RopeScaling
from dsv4_core.checkpoint.create import create, tensor
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import Experts, RowLayout, numpy_dtype
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Block, Model
from dsv4_core.graph.step import Step
from dsv4_core.planning.shapes import STORED, ShapeSource

MILLION = 1 << 20
MILESTONES = (8 << 10, 64 << 10, 256 << 10, MILLION)
SMALL = replace(
    PRESETS["tiny"],
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    head_dim=96,
    qk_rope_head_dim=32,
    index_n_heads=2,
    index_head_dim=32,
    index_topk=64,
    max_position_embeddings=MILLION,
    rope_scaling=RopeScaling(),
)
"""Hidden 256, four heads of 96, window 64; window-only, CSA (64 picks) and HCA layers."""


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def formula(config: ModelConfig, capacity: int, rewindable: int) -> int:
    """Bytes of a sequence's cache in native mode, written out from the stored formats and not by
    the code under test.
    """
    d, r, di = config.head_dim, config.qk_rope_head_dim, config.index_head_dim
    row = (d - r) + 8 * math.ceil(math.ceil((d - r) / 64) / 8) + 2 * r
    key = di // 2 + di // 32
    size = 0
    for m in config.compress_ratios:
        size += (config.sliding_window + rewindable) * row
        if m == 128:
            size += math.ceil(capacity / m) * row + (m + rewindable) * 2 * 4 * d
        if m == 4:
            size += math.ceil(capacity / m) * (row + key) + (2 * m + rewindable) * 2 * 4 * 2 * (d + di)
    return size


class Timed(Model):
    """Adds up seconds by (compress ratio, part of a step) while ``clock`` is set."""

    clock: dict[tuple[int, str], float] | None = None
    ratio = -1

    def watch(self, *ops: str) -> None:
        """Time these ops of the backend."""
        for name in ops:
            setattr(self.backend, name, functools.partial(self.timed, name, getattr(self.backend, name)))

    def timed(self, name: str, call: Callable[..., Any], *args: Any, **scalars: Any) -> Any:
        """Call, and add what it took."""
        began = time.perf_counter()
        result = call(*args, **scalars)
        if self.clock is not None:
            self.clock[self.ratio, name] += time.perf_counter() - began
        return result

    def block(self, block: Block, h: Any, step: Step) -> Any:
        """One layer."""
        self.ratio = block.ratio
        return self.timed("layer", super().block, block, h, step)

    def attention(self, block: Block, x: Any, step: Step) -> Any:
        """Its attention."""
        return self.timed("attention", super().attention, block, x, step)


def decode_times(model: Timed, cache: Cache, tokens: int, runs: int, token: int | None = None) -> dict[str, float]:
    """Seconds of one decode step at ``tokens - 1``, by ``ratio part``: the best of ``runs``, each
    of ``token`` or of another one. The cache's lengths stay.
    """
    best: dict[str, float] = {}
    rng = np.random.default_rng(tokens)
    lengths = cache.lengths.copy(), cache.furthest.copy()
    cache.lengths[0] = cache.furthest[0] = tokens - 1
    for _ in range(runs):
        model.clock = defaultdict(float)
        ids = rng.integers(0, model.config.vocab_size, (1, 1)) if token is None else np.array([[token]])
        began = time.perf_counter()
        model.logits(model.forward(Step(cache, ids)))
        model.clock[-1, "step"] = time.perf_counter() - began
        for (ratio, part), seconds in model.clock.items():
            name = f"{ratio} {part}" if ratio >= 0 else part
            best[name] = min(best.get(name, math.inf), seconds)
    model.clock = None
    cache.lengths[:], cache.furthest[:] = lengths
    return best


def bandwidth() -> float:
    """Bytes/s that this machine reads with one core: a sum over 256 MB, the best of five."""
    data = np.ones(1 << 25, np.float64)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best


def machine(args: argparse.Namespace) -> dict[str, object]:
    """What the figures were made with."""
    return {"machine": platform.machine(), "cores": os.cpu_count(), "backend": args.backend, "load": os.getloadavg()[0]}


def prefill(args: argparse.Namespace) -> dict[str, object]:
    """The whole context, chunk by chunk."""
    with tempfile.TemporaryDirectory() as directory:
        create(Path(directory) / "model", SMALL, seed=7)
        model = Timed(Checkpoint(Path(directory) / "model"), registry.create(args.backend))
        model.watch("cached_index_topk", "cached_sparse_attn")
        total, chunk = args.tokens, args.chunk
        cache = Cache(model.backend, SMALL, 1, total)
        want = formula(SMALL, total, cache.rewindable)
        assert cache.nbytes == want, f"the cache has {cache.nbytes} bytes, the formula says {want}"
        report = machine(args) | {
            "chunk": chunk,
            "cache_bytes": cache.nbytes,
            "formula": want,
            "chunks": [],
            "decode": {},
        }
        rng, began, streams = np.random.default_rng(0), time.perf_counter(), hashlib.sha256()
        for start in range(0, total, chunk):
            at = time.perf_counter()
            step = Step(cache, rng.integers(0, SMALL.vocab_size, (1, min(chunk, total - start))))
            h = model.forward(step)
            cache.advance(step.sequences, step.ends)
            streams.update(model.backend.to_numpy(h[-1:]).tobytes())
            del h, step
            report["chunks"].append((start + chunk, time.perf_counter() - at, resident()))
            report["seconds"], report["cpu_seconds"] = time.perf_counter() - began, time.process_time()
            if start + chunk in MILESTONES:
                report["decode"][start + chunk] = decode_times(model, cache, start + chunk, 8)
                print(
                    start + chunk,
                    f"{report['seconds']:.0f} s, {resident() / 1e6:.0f} MB",
                    report["decode"][start + chunk],
                    flush=True,
                )
            if not (start // chunk) % 16:
                args.out.write_text(json.dumps(report))
        last = model.backend.to_numpy(model.logits(model.forward(last_step(cache))))
        assert np.isfinite(last).all()
        report |= {"finite": True, "digest": streams.hexdigest()}
    return report


def last_step(cache: Cache) -> Step:
    """The step of one token at the last position, again."""
    cache.rewind(0, int(cache.lengths[0]) - 1)
    return Step(cache, np.ones((1, 1), np.int64))


class Drawn(ShapeSource):
    """Random weights in the published formats, each drawn when it is first used."""

    def array(self, name: str) -> Any:
        """Draw a tensor."""
        spec = self.specs[name]
        flat = np.concatenate(list(tensor(spec, self.specs, self.config, seed=1)))
        return flat.view(numpy_dtype(STORED[spec.dtype])).reshape(spec.shape)

    def experts(self, prefix: str, projection: str) -> Experts:
        """Draw experts when they are routed to."""
        return Experts(_Drawn(self, prefix, projection))


class _Drawn(Sequence):
    def __init__(self, source: Drawn, prefix: str, projection: str) -> None:
        self.source, self.prefix, self.projection = source, prefix, projection

    def __len__(self) -> int:
        return self.source.config.n_routed_experts

    @functools.cache  # noqa: B019  as many as a few steps route to, for the length of a run
    def __getitem__(self, expert: int) -> Any:
        return self.source.weight(f"{self.prefix}.experts.{expert}.{self.projection}")


def fill(cache: Cache) -> None:
    """Write random rows into all of sequence 0's rows, keys, ring and open windows."""
    be, rng = cache.backend, np.random.default_rng(5)
    pool = rng.standard_normal((4096, 2 * 2 * cache.config.head_dim), np.float32)
    for layer in cache.layers:
        stores = [(layer.ring, cache.kv_layout, cache.ring_rows)]
        if layer.ratio:
            stores.append((layer.rows, cache.kv_layout, cache.compressed_rows(layer.ratio)))
            stores.append(
                (layer.state, cache.state_layout(layer.ratio, cache.config.head_dim), cache.state_rows(layer.ratio))
            )
        if layer.ratio == 4:
            stores.append((layer.keys, cache.key_layout, cache.compressed_rows(4)))
            stores.append((layer.key_state, cache.state_layout(4, cache.config.index_head_dim), cache.state_rows(4)))
        for array, layout, rows in stores:
            dtype = numpy_dtype("float32" if layout.kind == "plain" else "bfloat16")
            for at in range(0, rows, len(pool)):
                n = min(len(pool), rows - at)
                index = be.from_numpy(np.arange(at, at + n, dtype=np.int32))
                be.cache_write(
                    array,
                    be.from_numpy(np.roll(pool[:n, : layout.dim], at // len(pool), 0).astype(dtype)),
                    index,
                    layout=layout,
                )


def shares(times: dict[str, float], config: ModelConfig, tokens: int, speed: float) -> dict[str, float]:
    """Cache bytes that indexer and attention read, over their time, as a share of the memory's
    bandwidth; by ratio and op.
    """
    row, key = (
        RowLayout("kv", config.head_dim, config.qk_rope_head_dim).width,
        RowLayout("key", config.index_head_dim).width,
    )
    picks = {0: 0, 4: min(config.index_topk, tokens // 4), 128: tokens // 128}
    read = {f"{m} cached_sparse_attn": (picks[m] + min(tokens, config.sliding_window)) * row for m in picks}
    read["4 cached_index_topk"] = tokens // 4 * key
    return {name: size / times[name] / speed for name, size in read.items() if name in times}


def decode(args: argparse.Namespace) -> dict[str, object]:
    """Decode steps of the small model at four contexts."""
    model = Timed(Drawn(SMALL), registry.create(args.backend))
    model.watch("cached_index_topk", "cached_sparse_attn")
    report, speed = machine(args) | {"times": {}, "share": {}}, bandwidth()
    cache = Cache(model.backend, SMALL, 1, MILLION)
    fill(cache)
    for tokens in (8 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, MILLION):
        times = decode_times(model, cache, tokens, args.runs)
        report["times"][tokens], report["share"][tokens] = times, shares(times, SMALL, tokens, speed)
        print(tokens, {k: f"{v * 1e3:.2f} ms" for k, v in times.items()}, report["share"][tokens], flush=True)
    return report | {"bandwidth": speed}


def alone(args: argparse.Namespace) -> dict[str, object]:
    """Sparse attention of the small model's CSA layer alone: its picks from few rows and from many,
    caches warm and emptied.
    """
    be, rng = registry.create(args.backend), np.random.default_rng(0)
    cache = Cache(be, SMALL, 1, MILLION)
    fill(cache)
    layer = next(layer for layer in cache.layers if layer.ratio == 4)
    window, picks, heads = SMALL.sliding_window, SMALL.index_topk, SMALL.num_attention_heads
    act = numpy_dtype(be.activation_dtype)
    q = be.from_numpy(rng.standard_normal((1, heads, SMALL.head_dim)).astype(act))
    kv = be.from_numpy(rng.standard_normal((1, SMALL.head_dim)).astype(act))
    sink, ring = be.from_numpy(np.zeros(heads, np.float32)), be.from_numpy(np.arange(window - 1, dtype=np.int32))
    every = be.from_numpy(np.arange(window + picks, dtype=np.int32)[None])
    report, flush = machine(args) | {"alone": {}}, np.ones(1 << 25)
    for rows in (2 << 10, 16 << 10, 64 << 10, MILLION // 4):
        for state in ("warm", "emptied"):
            seconds = []
            for _ in range(args.runs):
                picked = be.from_numpy(np.sort(rng.choice(rows, picks, replace=False)).astype(np.int32))
                if state == "emptied":
                    flush.sum()
                began = time.perf_counter()
                be.cached_sparse_attn(
                    q, kv, layer.ring, ring, layer.rows, picked, sink, every, layout=cache.kv_layout, softmax_scale=0.1
                )
                seconds.append(time.perf_counter() - began)
            report["alone"][f"{rows} {state}"] = float(np.median(seconds))
            print(
                f"{rows} rows, caches {state}: {1e3 * np.median(seconds):.3f} ms, best {1e3 * min(seconds):.3f}",
                flush=True,
            )
    return report


def layers(args: argparse.Namespace) -> dict[str, object]:
    """One full-size layer of each kind of Flash and of Pro at 2^20 tokens; the vocabulary alone is
    small.
    """
    report, speed = machine(args) | {"layers": {}}, bandwidth()
    for preset in args.presets:
        for ratio in (4, 128):
            config = replace(
                PRESETS[preset],
                num_hidden_layers=1,
                num_nextn_predict_layers=0,
                num_hash_layers=0,
                compress_ratios=(ratio,),
                vocab_size=1024,
            )
            model = Timed(
                Drawn(config), registry.create(args.backend, weight_cache=6 << 30)
            )  # all of Pro's, in float32
            model.watch("cached_index_topk", "cached_sparse_attn")
            cache = Cache(model.backend, config, 1, MILLION)
            fill(cache)
            times = decode_times(model, cache, MILLION, args.runs, token=1)
            found = {
                "cache_bytes": cache.nbytes,
                "times": times,
                "share": shares(times, config, MILLION, speed),
                "resident": resident(),
            }
            report["layers"][f"{preset} {ratio}"] = found
            print(
                preset,
                ratio,
                {k: f"{v * 1e3:.1f} ms" for k, v in times.items()},
                found["share"],
                f"{resident() / 1e9:.2f} GB",
                flush=True,
            )
            del model, cache
            gc.collect()
    return report | {"bandwidth": speed}


def draw(reports: list[Path], to: Path) -> None:
    """Two pictures: memory and time of the prefill; decode time of indexer and attention against
    context.
    """
    from matplotlib.figure import Figure

    for path in reports:
        report = json.loads(path.read_text())
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        if "chunks" in report:
            tokens, seconds, memory = (np.array(column) for column in zip(*report["chunks"], strict=True))
            left.plot(tokens / 1024, memory / 1e6, color="#1f6feb")
            left.axhline(
                (memory[0] + report["cache_bytes"]) / 1e6,
                color="#888888",
                linestyle=":",
                label="at the start + the whole cache",
            )
            left.set(
                title=f"Resident memory, prefill of 2^20 tokens ({report['backend']})",
                xlabel="K tokens",
                ylabel="MB",
                ylim=(0, None),
            )
            left.legend(frameon=False)
            right.plot(tokens / 1024, seconds, color="#2da44e", linewidth=0.8)
            right.set(title=f"Seconds a chunk of {report['chunk']} tokens", xlabel="K tokens", ylim=(0, None))
            name = f"million-prefill-{report['backend']}.svg"
        elif "times" in report:
            contexts = np.array([int(n) for n in report["times"]])
            for key, label, colour in (
                ("4 cached_index_topk", "indexer (ratio 4)", "#d1242f"),
                ("4 cached_sparse_attn", "sparse attention (ratio 4, top-k)", "#1f6feb"),
                ("0 cached_sparse_attn", "window attention (ratio 0)", "#888888"),
                ("128 cached_sparse_attn", "attention to all rows (ratio 128)", "#2da44e"),
            ):
                values = [1e3 * times[key] for times in report["times"].values()]
                left.plot(contexts / 1024, values, marker="o", color=colour, label=label)
                right.plot(contexts / 1024, values, marker="o", color=colour)
            left.legend(frameon=False)
            left.set(
                title=f"A decode step's parts, ms ({report['backend']})", xlabel="context, K tokens", ylim=(0, None)
            )
            right.set(title="the same, both axes logarithmic", xlabel="context, K tokens", xscale="log", yscale="log")
            name = f"million-decode-{report['backend']}.svg"
        else:
            continue
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.savefig(to / name, metadata={"Date": None})
        print(f"wrote {to / name}")


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill", "decode", "alone", "layers", "draw"))
    parser.add_argument("reports", type=Path, nargs="*", help="for draw")
    parser.add_argument("--out", type=Path, default=Path("million.json"))
    parser.add_argument("--to", type=Path, default=Path("docs"))
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--tokens", type=int, default=MILLION)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--presets", nargs="+", default=["flash", "pro"], help="for layers")
    args = parser.parse_args()
    if args.what == "draw":
        draw(args.reports, args.to)
        return
    report = {"prefill": prefill, "decode": decode, "alone": alone, "layers": layers}[args.what](args)
    args.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
