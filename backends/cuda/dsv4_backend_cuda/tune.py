"""Time candidate configurations on a GPU and write the fastest into the launch table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dsv4_backend_cuda import launch

STEPS = {"BLOCK_N": (64, 256), "BLOCK_T": (16, 128), "num_warps": (4, 8), "num_stages": (1, 5)}
"""Options that no result's bits depend on, and their range. Those that cut a sum into pieces (SPLIT, ROWS, PIECE) are left alone."""


@dataclass(frozen=True)
class Timed:
    """A configuration and its time."""

    config: dict[str, int]
    milliseconds: float


def candidates(kernel: str, config: dict[str, int]) -> list[dict[str, int]]:
    """The table's configuration, then each that differs in one option by a step: a factor of 2, a stage."""
    found = [config]
    for name, (low, high) in STEPS.items():
        if name not in config or (
            name == "BLOCK_T" and kernel.endswith("_decode")
        ):  # a decode tile holds a step's tokens
            continue
        value = config[name]
        near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        found += [config | {name: v} for v in near if low <= v <= high]
    return found


def best(kernel: str, config: dict[str, int], time: Callable[[dict[str, int]], float]) -> Timed:
    """Walk from ``config`` to the fastest neighbour until none is faster. A configuration that does not launch takes for ever."""
    reached = Timed(config, time(config))
    while True:
        fastest = min(
            (Timed(c, time(c)) for c in candidates(kernel, reached.config)[1:]),
            key=lambda t: t.milliseconds,
            default=reached,
        )
        if fastest.milliseconds >= reached.milliseconds:
            return reached
        reached = fastest


def write(arch: int, chosen: dict[str, Timed], product: str) -> None:
    """Put configurations into the launch table, with how they were chosen."""
    rows = json.loads(launch.TABLE.read_text())
    for row in rows:
        if row["arch"] == arch and (timed := chosen.get(row["kernel"])):
            row |= {"config": timed.config, "how": f"measured on {product}: {timed.milliseconds:.4f} ms"}
    launch.TABLE.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")


def tune(device: str, only: str) -> Iterator[tuple[str, Timed, Timed]]:
    """Tune the products of Flash; yield kernel, what the table had and what is best. Needs a GPU."""
    import torch
    from triton.testing import do_bench

    arch = launch.architecture(device)
    chosen = {}
    for kernel, call in calls(device).items():
        if only not in kernel:
            continue
        row = launch.table()[kernel, arch]
        before = dict(row["config"])

        def time(config: dict[str, int], row: dict[str, Any] = row, call: Callable[[], Any] = call) -> float:
            row["config"] = config
            try:
                return float(do_bench(call))
            except Exception:  # noqa: BLE001 - too much shared memory, too many registers: whatever the driver refuses
                return float("inf")

        first = Timed(before, time(before))
        chosen[kernel] = best(kernel, before, time)
        row["config"] = chosen[kernel].config
        yield kernel, first, chosen[kernel]
    write(arch, chosen, torch.cuda.get_device_name(device))


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """One call of each tuned kernel at Flash's shapes."""
    import torch

    from dsv4_backend_cuda.kernels import scaled_matmul

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 120, shape, dtype=torch.uint8, device=device)  # no NaN

    def dense(rows: int, *, fp4: bool) -> Callable[[], Any]:
        x, scales = codes(rows, 4096), codes(rows, 32)
        w = (codes(4096, 2048), codes(4096, 128)) if fp4 else (codes(4096, 4096), codes(32, 32))
        return lambda: scaled_matmul.linear(x, scales, *w, out_dtype=torch.bfloat16, fp4=fp4)

    def experts(rows: int, *, fp4: bool) -> Callable[[], Any]:
        x, scales = codes(6 * rows, 4096), codes(6 * rows, 32)
        w = (codes(256, 2048, 2048), codes(256, 2048, 128)) if fp4 else (codes(256, 2048, 4096), codes(256, 16, 32))
        offsets = torch.arange(257, dtype=torch.int32, device=device) * (6 * rows) // 256
        return lambda: scaled_matmul.expert_linear(x, scales, *w, offsets, fp4=fp4)

    found = {}
    for phase, rows in (("decode", 1), ("prefill", 4096)):
        found[f"linear_{phase}"], found[f"fp4_linear_{phase}"] = dense(rows, fp4=False), dense(rows, fp4=True)
        found[f"fp8_experts_{phase}"], found[f"fp4_experts_{phase}"] = experts(rows, fp4=False), experts(rows, fp4=True)
    return found
