"""What Triton's JIT makes of every launch, in a process of its own: python tests/cuda/jit_path.py
WHAT [--depth count|parse|compile] [--arch 90]

WHAT: ``cases`` (every op case of the standard tier), ``conversation`` (the embedded model's steps
while a context grows) or ``layers`` (Flash's and Pro's layers in full size). Prints one line of
JSON. PYTHONPATH chooses Triton's version.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.metadata import version

import torch
from dsv4_backend_cuda import dry, launch, rules

STEPS = [(1, 1, 8191), (1, 1, 8192), (8, 1, 8191), (64, 1, 8191), (1, 4096, 0)]  # batch, tokens, length before
MILLION = [(1, 1, (1 << 20) - 2)]


def cases(backend: dry.DryBackend) -> int:
    """Launch every op case of the standard tier; give how many ran on kernels."""
    from dsv4_conformance.cases.checks import OpCase
    from dsv4_conformance.run.catalogue import collect

    ran = 0
    for check in collect("standard", "native", backend):
        if not isinstance(check, OpCase) or check.op not in rules.RULES:
            continue
        call = check.call("native")
        named = {name: loaded(backend, value) for name, value in call.named().items()}
        if isinstance(backend.answer(call.op, *named.values(), **call.scalars), str):
            continue  # torch runs it
        getattr(backend, call.op)(*named.values(), **call.scalars)
        ran += 1
    return ran


def loaded(backend, value):
    """An operand as the backend holds it."""
    from dsv4_backend_torch.weights import StackedExperts

    from dsv4_core.contract.dtypes import Experts, ScaledArray

    def scaled(weight):
        return ScaledArray(backend.from_numpy(weight.data), backend.from_numpy(weight.scale), weight.format)

    if value is None:
        return None
    if isinstance(value, Experts):
        first, count = value[0], value.shape[0]
        if not isinstance(first, ScaledArray):
            return StackedExperts(backend.from_numpy(first).new_empty((count, *first.shape)))
        one = scaled(first)
        parts = (part.new_empty((count, *part.shape)) for part in (one.data, one.scale))
        return StackedExperts(ScaledArray(*parts, one.format))
    if isinstance(value, list | tuple):
        return [backend.from_numpy(v) for v in value]
    return scaled(value) if isinstance(value, ScaledArray) else backend.from_numpy(value)


def conversation(backend: dry.DryBackend) -> int:
    """Short prompts of every length, then steps of one token while the context grows to 2400; one
    sequence, and two.
    """
    from dsv4_core.graph.model import Model
    from dsv4_core.planning.shapes import run_step

    config = backend_config("tiny-jargon")
    model = Model(dry.VirtualSource(config), backend)
    lengths = [*range(1, 36), *range(36, 600, 29), *range(600, 2400, 211)]
    room = min(2400, config.max_position_embeddings - 1)
    for n in range(1, 34, 2):
        run_step(model, batch=1, seq=n, start=0)
    for length in lengths:
        if length < room:
            run_step(model, batch=1 + length % 2, seq=1, start=length)
    return len(lengths) + 17


def backend_config(name):
    from dsv4_conformance.model import golden

    from dsv4_core.checkpoint.weights import Checkpoint

    return Checkpoint(golden.checkpoint_path(name)).config


def layers(backend: dry.DryBackend) -> dict[str, dict]:
    """A layer of each ratio of Flash and Pro in full size: launches, torch's kernels, and host
    microseconds of processor time, the least of 20, once all is compiled.
    """
    import time

    import numpy as np

    from dsv4_core.checkpoint.config import PRESETS
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.model import Model
    from dsv4_core.graph.step import Step

    record, found = dry.activate(launch.pretended), {}
    for name in ("flash", "pro"):
        for ratio in (0, 4, 128):
            config = dataclasses.replace(
                PRESETS[name],
                num_hidden_layers=1,
                compress_ratios=(ratio,),
                num_nextn_predict_layers=0,
                num_hash_layers=0,
            )
            model = Model(dry.VirtualSource(config), backend)
            for batch, seq, start in STEPS + MILLION * (ratio > 0):
                cache = Cache(backend, config, batch, start + seq)
                cache.lengths[:] = cache.furthest[:] = start
                step, best = Step(cache, np.zeros((batch, seq), np.int32)), float("inf")
                streams = torch.empty(
                    (batch * seq, config.hc_mult, config.hidden_size), dtype=torch.bfloat16, device="meta"
                )
                with backend.computing():
                    model.block(model.blocks[0], streams, step)  # addresses are copied, kernels compiled
                    for _ in range(20):
                        record.clear()
                        began = time.thread_time()
                        model.block(model.blocks[0], streams, step)
                        best = min(best, time.thread_time() - began)
                    with dry.TorchKernels() as torch_kernels:
                        model.block(model.blocks[0], streams, step)
                found[f"{name} {ratio} {batch}x{seq}@{start}"] = {
                    "triton": sum(record.launches.values()) // 2,
                    "kernels": {k: n // 2 for k, n in record.launches.items()},
                    "torch": dict(torch_kernels.kernels),
                    "allocations": torch_kernels.allocations,
                    "copies": torch_kernels.copies,
                    "host_us": round(best * 1e6),
                }
    return found


def capture(backend: dry.DryBackend) -> dict[str, dict[str, int]]:
    """Flash cut to a layer of each ratio, steps of two sequences: what the host does in an eager
    step, while one is captured, and in a replay.
    """
    import numpy as np
    from dsv4_backend_torch.graphs import Recorded
    from test_graphs import Cuda

    from dsv4_core.checkpoint.config import PRESETS
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.model import Model
    from dsv4_core.graph.replay import Replay
    from dsv4_core.graph.step import Step

    class Counting(Cuda):
        """A replay is the device's business: here it does nothing."""

        def CUDAGraph(self):  # noqa: N802
            return type("Graph", (), {"replay": lambda _: self.runs.append("replay")})()

    cuda = Counting()
    cuda.CUDAGraph = lambda: Counting.CUDAGraph(cuda)
    backend.record = lambda function: Recorded(function, torch.device("meta"), cuda)
    record, found = dry.activate(launch.pretended), {}
    config = dataclasses.replace(
        PRESETS["flash"],
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128),
        num_nextn_predict_layers=0,
    )
    model = Model(dry.VirtualSource(config), backend)
    cache = Cache(backend, config, 2, 1024)
    cache.lengths[:] = cache.furthest[:] = 300
    replay = Replay(model, cache)
    for name in ("eager", "captured", "replayed", "replayed where a window closes"):
        if name.endswith("closes"):
            cache.lengths[:] = cache.furthest[:] = 303
        record.clear()
        with dry.TorchKernels() as kernels, backend.computing():
            replay.logits(Step(cache, np.full((2, 1), 7)))
        found[name] = {
            "triton": sum(record.launches.values()),
            "torch": dict(kernels.kernels),
            "copies": kernels.copies,
            "allocations": kernels.allocations,
        }
        cache.lengths += 1
        cache.furthest += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["cases", "conversation", "layers", "capture"])
    parser.add_argument("--depth", default="parse")
    parser.add_argument("--arch", type=int, default=90)
    options = parser.parse_args()
    record = dry.activate(options.arch, options.depth)
    result = {"cases": cases, "conversation": conversation, "layers": layers, "capture": capture}[options.what](
        dry.DryBackend()
    )
    print(
        json.dumps(
            {
                "triton": version("triton"),
                "ran": result,
                "launches": sum(record.launches.values()),
                "specialisations": {k: len(v) for k, v in record.specialisations.items()},
                "failures": record.failures,
            }
        )
    )


if __name__ == "__main__":
    main()
