"""Device time of every op at the published models' sizes, on this machine's GPU: beside the floor
that bytes and operations set, and beside torch's op.

A layer of each ratio is made in full size of random weights and run for one step; every op call
that the graph made is kept with the operands that it had, and timed alone: captured into a CUDA
graph many times over copies of its operands, so that no weight stays in a cache. Without a GPU
(``dry.activate`` first) calls are launched dry: kernels and floors are listed, times are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dsv4_backend_torch.backend import TorchBackend
from dsv4_backend_torch.weights import StackedExperts

from dsv4_backend_cuda import launch, roofline
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_core.checkpoint.config import PRESETS, ModelConfig
from dsv4_core.contract.dtypes import Experts, ScaledArray
from dsv4_core.contract.ops import OPS
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step
from dsv4_core.planning.counting import Count, Planner
from dsv4_core.planning.shapes import LayeredModel, ShapeSource

STEPS = ((1, 1, 8191), (8, 1, 8191), (64, 1, 8191), (1, 4096, 0))  # sequences, tokens of each, tokens before
TURNED_OVER = 256 << 20  # bytes of operands that a timing walks through: several times the largest second-level cache
REPEATS = 20
PRECISION = {"fp8 x fp4": "fp8", "fp8": "fp8", "fp4": "fp8", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Timing:
    """One op call. Microseconds; ``torch_us`` is None where torch's op cannot be captured, ``us``
    where nothing was launched (a dry run).
    """

    model: str
    ratio: int
    step: str
    op: str
    kernels: str
    megabytes: float
    floor_us: float
    us: float | None = None
    torch_us: float | None = None


class RandomSource(ShapeSource):
    """Random weights in the checkpoint's formats, made where they are used."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config)
        self.device = device

    def array(self, name: str) -> Any:
        """Give a tensor: codes that are no NaN, scales near 2^-7, floats of a few hundredths."""
        return self.made(name, self.specs[name].shape)

    def made(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = self.specs[name].dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=getattr(torch, super().array(name).dtype), device=self.device)
        if dtype == "F8_E8M0":
            return torch.full(shape, 120, dtype=torch.uint8, device=self.device)
        if dtype in {"F8_E4M3", "I8"}:
            return torch.randint(0, 0x7F, shape, dtype=torch.uint8, device=self.device)
        if dtype == "I64":
            return torch.randint(0, self.config.n_routed_experts, shape, device=self.device)
        return (
            torch.randn(shape, device=self.device).mul_(0.02).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
        )

    def experts(self, prefix: str, projection: str) -> Experts:
        """Give a stack of all experts."""
        at, count = f"{prefix}.experts.0.{projection}", self.config.n_routed_experts
        parts = [self.made(f"{at}.{what}", (count, *self.specs[f"{at}.{what}"].shape)) for what in ("weight", "scale")]
        return StackedExperts(ScaledArray(parts[0], parts[1], "e2m1"))


def loads_nothing(kind: type[Any]) -> type[Any]:
    """A backend's class whose weights are on the device already."""

    class Loaded(kind):  # type: ignore[misc]
        name = kind.name

        def load(self, weight: Any) -> Any:
            return weight

        def load_experts(self, experts: Experts) -> Experts:
            return experts

    return Loaded


@dataclass
class Call:
    """One op call of the graph, with its operands."""

    op: str
    arrays: tuple[Any, ...]
    scalars: dict[str, Any]


def recorded(backend: Any, run: Callable[[], Any]) -> list[Call]:
    """Run the graph once; give the calls that it made of ops (not those that ops make of each
    other).
    """
    calls: list[Call] = []
    depth = 0

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arrays: Any, **scalars: Any) -> Any:
            nonlocal depth
            if not depth:
                calls.append(Call(name, arrays, scalars))
            depth += 1
            try:
                return method(*arrays, **scalars)
            finally:
                depth -= 1

        return noted

    for name in OPS:
        setattr(backend, name, noting(name, getattr(backend, name)))
    try:
        run()
    finally:
        for name in OPS:
            delattr(backend, name)
    return calls


def counted(config: ModelConfig, batch: int, seq: int, start: int) -> list[tuple[str, Count]]:
    """What the same calls do, by the rules that stand beside the contracts."""
    planner = Planner(like=CudaBackend, topk=config.num_experts_per_tok)
    model = LayeredModel(ShapeSource(config), planner)
    step = _step(model, batch, seq, start)
    streams = planner.array((batch * seq, config.hc_mult, config.hidden_size), "bfloat16")
    planner.reset()
    model.block(model.blocks[0], streams, step)
    return [(note.op, note.done) for note in planner.notes]


def _step(model: Model, batch: int, seq: int, start: int) -> Step:
    cache = Cache(model.backend, model.config, batch, start + seq)
    cache.lengths[:] = cache.furthest[:] = start
    return Step(cache, np.full((batch, seq), 7, np.int32))


def floor(done: Count, device: roofline.Device) -> float:
    """Microseconds that a call's bytes or its operations take at a product's full rates, whichever
    is longer.
    """
    memory = done.moved / (device.gigabytes_per_second * 1e9)
    work = sum(n / (device.teraflops[PRECISION[p]] * 1e12) for p, n in done.work.items() if p in PRECISION)
    return 1e6 * max(memory, work)


def measure(backend: Any, call: Call) -> float | None:
    """Microseconds of one call: the median of graphs of calls over copies of the operands; None
    where it cannot be captured.
    """
    size = sum(_nbytes(a) for a in call.arrays)
    copies = [call.arrays] + [_copied(call.arrays) for _ in range(min(REPEATS, TURNED_OVER // max(size, 1)) - 1)]
    method = getattr(backend, call.op)
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream), torch.inference_mode():
            method(*copies[0], **call.scalars)  # compiles
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for i in range(REPEATS):
                    method(*copies[i % len(copies)], **call.scalars)
            graph.replay()
            times = []
            for _ in range(5):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        return 1e3 * sorted(times)[2] / REPEATS
    except RuntimeError as error:  # torch's op reads a value on the host, or memory is short
        print(f"{call.op}: not captured: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None


def _nbytes(value: Any) -> int:
    if isinstance(value, Experts):
        return _nbytes(value.stack) if isinstance(value, StackedExperts) else 0
    if isinstance(value, ScaledArray):
        return _nbytes(value.data) + _nbytes(value.scale)
    return int(value.numel() * value.element_size()) if isinstance(value, torch.Tensor) else 0


def _copied(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_copied(v) for v in value)
    if isinstance(value, StackedExperts):
        return StackedExperts(_copied(value.stack))
    if isinstance(value, ScaledArray):
        return ScaledArray(value.data.clone(), value.scale.clone(), value.format)
    return value.clone() if isinstance(value, torch.Tensor) else value


def times(
    device: str = "cuda", models: tuple[str, ...] = ("flash", "pro"), *, against_torch: bool = True
) -> Iterator[Timing]:
    """Time every call of a layer of each ratio of the published models, for each of ``STEPS``."""
    dry = launch.pretended is not None
    mine = loads_nothing(CudaBackend)() if dry else loads_nothing(CudaBackend)(device=device)
    theirs = loads_nothing(TorchBackend)(device=device) if against_torch and not dry else None
    limits = roofline.DEVICES[mine.arch]
    for name in models:
        for ratio in (0, 4, 128):
            config = dataclasses.replace(
                PRESETS[name],
                num_hidden_layers=1,
                compress_ratios=(ratio,),
                num_nextn_predict_layers=0,
                num_hash_layers=0,
            )
            model = Model(RandomSource(config, mine.device), mine)
            for batch, seq, start in STEPS:
                step = _step(model, batch, seq, start)
                streams = torch.zeros(
                    (batch * seq, config.hc_mult, config.hidden_size), dtype=torch.bfloat16, device=mine.device
                )
                if not dry:
                    streams.normal_()
                with mine.computing():
                    calls = recorded(mine, lambda m=model, h=streams, s=step: m.block(m.blocks[0], h, s))
                done = counted(config, batch, seq, start)
                if [c.op for c in calls] != [op for op, _ in done]:
                    raise RuntimeError(
                        f"{name} {ratio}: the planner sees other calls than the backend; times would have no floor"
                    )
                for call, (_, count) in zip(calls, done, strict=True):
                    mine.kernels_ran()
                    with mine.computing():
                        getattr(mine, call.op)(*call.arrays, **call.scalars)
                    yield Timing(
                        name,
                        ratio,
                        f"{batch} x {seq} after {start}",
                        call.op,
                        " ".join(mine.kernels_ran()) or "torch",
                        round(count.moved / 1e6, 3),
                        round(floor(count, limits), 2),
                        None if dry else measure(mine, call),
                        None if theirs is None else measure(theirs, call),
                    )
