"""A million tokens for real: a chunked prefill of 2^20 tokens, decode from 8K to 1M, and one full-size layer of each kind at 1M.

    python benchmarks/million.py prefill --out RUN.json [--backend reference] [--tokens 1M] [--chunk 1024]
    python benchmarks/million.py decode  --out RUN.json [--backend reference]
    python benchmarks/million.py layers  --out RUN.json [--backend reference]
    python benchmarks/million.py draw RUN.json ... --to docs/

``prefill`` runs a small model with all three kinds of layers (ratios 0, 4, 128; indexer 2 x 32) over the whole context, notes memory and time
after every chunk, decodes a few tokens at 8K, 64K, 256K and 1M, and holds the cache's bytes to the formula. ``decode`` times the same
decode steps by kind of layer and op, on caches filled with random rows, each the best of several. ``layers`` does so with one
full-size layer of Flash and of Pro. Native mode throughout. Every figure goes to RUN.json.
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
from dataclasses import replace
from pathlib import Path

import numpy as np

from dsv4_core import registry
from dsv4_core.cache import Cache
from dsv4_core.config import PRESETS, ModelConfig, RopeScaling
from dsv4_core.create import create
from dsv4_core.dtypes import E8M0_VALUES, Experts, ScaledArray, numpy_dtype
from dsv4_core.model import Model
from dsv4_core.shapes import STORED, ShapeSource
from dsv4_core.step import Step
from dsv4_core.weights import Checkpoint

MILLION = 1 << 20
MILESTONES = (8 << 10, 64 << 10, 256 << 10, MILLION)
SMALL = replace(
    PRESETS["tiny"],
    **dict(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), head_dim=96, qk_rope_head_dim=32, index_n_heads=2, index_head_dim=32),
    **dict(index_topk=64, max_position_embeddings=MILLION, rope_scaling=RopeScaling()),
)
"""Hidden 256, four heads of 96, window 64; window-only, CSA (64 picks) and HCA layers."""


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def formula(config: ModelConfig, capacity: int, rewindable: int) -> int:
    """Bytes of a sequence's cache in native mode, written out from the stored formats and not by the code under test."""
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

    def timed(self, name, call, *args, **scalars):
        began = time.perf_counter()
        result = call(*args, **scalars)
        if self.clock is not None:
            self.clock[self.ratio, name] += time.perf_counter() - began
        return result

    def block(self, block, h, step):
        self.ratio = block.ratio
        return self.timed("layer", super().block, block, h, step)

    def attention(self, block, x, step):
        return self.timed("attention", super().attention, block, x, step)


def decode_times(model: Timed, cache: Cache, tokens: int, runs: int, sequence: int = 0) -> dict[str, float]:
    """Seconds of one decode step at ``tokens - 1``, by ``ratio part``: the best of ``runs``. The cache's lengths stay."""
    best: dict[str, float] = {}
    rng = np.random.default_rng(tokens)
    lengths = cache.lengths.copy(), cache.furthest.copy()
    cache.lengths[sequence] = cache.furthest[sequence] = tokens - 1
    for _ in range(runs):
        model.clock = defaultdict(float)
        began = time.perf_counter()
        model.logits(model.forward(Step(cache, rng.integers(0, model.config.vocab_size, (1, 1)), sequences=[sequence])))
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
        report = machine(args) | {"chunk": chunk, "cache_bytes": cache.nbytes, "formula": want, "chunks": [], "decode": {}}
        rng, began, streams = np.random.default_rng(0), time.perf_counter(), hashlib.sha256()
        for start in range(0, total, chunk):
            at = time.perf_counter()
            step = Step(cache, rng.integers(0, SMALL.vocab_size, (1, min(chunk, total - start))))
            h = model.forward(step)
            cache.advance(step.sequences, step.ends)
            streams.update(model.backend.to_numpy(h[-1:]).tobytes())
            del h, step
            report["chunks"].append((start + chunk, time.perf_counter() - at, resident()))
            report["seconds"] = time.perf_counter() - began
            if start + chunk in MILESTONES:
                report["decode"][start + chunk] = decode_times(model, cache, start + chunk, 8)
                print(start + chunk, f"{report['seconds']:.0f} s, {resident() / 1e6:.0f} MB", report["decode"][start + chunk], flush=True)
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


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill",))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--tokens", type=int, default=MILLION)
    parser.add_argument("--chunk", type=int, default=1024)
    args = parser.parse_args()
    report = {"prefill": prefill}[args.what](args)
    args.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
