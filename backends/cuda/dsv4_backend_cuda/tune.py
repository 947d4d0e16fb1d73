"""Time candidate configurations on a GPU and write the fastest into the launch table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsv4_backend_cuda import launch
from dsv4_core.files import writing as files

STEPS = {"BLOCK_N": (64, 128), "BLOCK_T": (16, 128), "num_warps": (4, 8), "num_stages": (1, 5)}
"""Options that the bits of no whole sum depend on, and their range (BLOCK_N decides how many pieces
a sum that may be split has). Those that cut a sum into pieces (SPLIT, ROWS, PIECE) are left alone.
A program of the scaled products reads one scale of 128 outputs: BLOCK_N ends there.
"""


@dataclass(frozen=True)
class Timed:
    """A configuration and its time."""

    config: dict[str, int]
    milliseconds: float


def candidates(kernel: str, config: dict[str, int]) -> list[dict[str, int]]:
    """The table's configuration, then each that differs in one option by a step: a factor of 2, a
    stage.
    """
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
    """Walk from ``config`` to the fastest neighbour until none is faster. A configuration that does
    not launch takes for ever.
    """
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


def write(arch: int, chosen: dict[str, Timed], product: str, out: Path | None = None) -> None:
    """Put configurations into the launch table (or a copy, ``out``), with how they were chosen and
    by which Triton.
    """
    target = out or launch.TABLE
    rows = json.loads((target if target.exists() else launch.TABLE).read_text())
    for row in rows:
        if row["arch"] == arch and (timed := chosen.get(row["kernel"])):
            row |= {
                "config": timed.config,
                "how": f"measured on {product}, triton {version('triton')}: {timed.milliseconds:.4f} ms",
            }
    files.write(target, "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")


def measured(
    call: Callable[[], Any], row: dict[str, Any], time: Callable[[Callable[[], Any]], float]
) -> Callable[[dict[str, int]], float]:
    """Give the milliseconds of a configuration, infinite where it does not launch or gives another
    result than ``row``'s own.

    The order of every sum is the same in all candidates, so results are compared bit for bit.
    """
    want = call()

    def of(config: dict[str, int]) -> float:
        before, row["config"] = row["config"], config
        try:
            if bool((call() == want).all()):
                return time(call)
            print(f"another result: {row['kernel']} with {config}; left out")
            return float("inf")
        except Exception:  # noqa: BLE001 - too much shared memory, too many registers: whatever the driver refuses
            return float("inf")
        finally:
            row["config"] = before

    return of


def tune(device: str, only: str, out: Path | None = None) -> Iterator[tuple[str, Timed, Timed]]:
    """Tune the products of Flash; yield kernel, what the table had and what is best. Needs a
    GPU.
    """
    import torch
    from triton.testing import do_bench

    arch = launch.architecture(device)
    chosen = {}
    for kernel, call in calls(device).items():
        if only not in kernel:
            continue
        row = launch.table()[kernel, arch]
        before = dict(row["config"])

        time = measured(call, row, lambda call: float(do_bench(call)))
        first = Timed(before, time(before))
        chosen[kernel] = best(kernel, before, time)
        row["config"] = chosen[kernel].config  # what later kernels of this process run with
        yield kernel, first, chosen[kernel]
    write(arch, chosen, torch.cuda.get_device_name(device), out)


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """One call of each tuned kernel at Flash's shapes."""
    import torch

    from dsv4_backend_cuda.kernels import scaled_matmul

    def codes(*shape: int) -> torch.Tensor:  # of either sign; 0x7F and 0xFF are NaN
        return torch.randint(0, 127, shape, dtype=torch.uint8, device=device) | torch.randint(
            0, 2, shape, dtype=torch.uint8, device=device
        ).mul(128)

    def scales(*shape: int) -> torch.Tensor:  # that differ, and whose products stay far from zero and infinity
        return torch.randint(120, 135, shape, dtype=torch.uint8, device=device)

    def dense(rows: int, *, fp4: bool) -> Callable[[], Any]:
        x, s = codes(rows, 4096), scales(rows, 32)
        w = (codes(4096, 2048), scales(4096, 128)) if fp4 else (codes(4096, 4096), scales(32, 32))
        return lambda: scaled_matmul.linear(x, s, *w, out_dtype=torch.bfloat16, fp4=fp4)

    def experts(rows: int, *, fp4: bool) -> Callable[[], Any]:
        x, s = codes(6 * rows, 4096), scales(6 * rows, 32)
        w = (codes(256, 2048, 2048), scales(256, 2048, 128)) if fp4 else (codes(256, 2048, 4096), scales(256, 16, 32))
        offsets = torch.arange(257, dtype=torch.int32, device=device) * (6 * rows) // 256
        return lambda: scaled_matmul.expert_products(x, s, [w], offsets, fp4=fp4)

    found = {}
    for phase, rows in (("decode", 1), ("prefill", 4096)):
        found[f"linear_{phase}"], found[f"fp4_linear_{phase}"] = dense(rows, fp4=False), dense(rows, fp4=True)
        found[f"fp8_experts_{phase}"], found[f"fp4_experts_{phase}"] = experts(rows, fp4=False), experts(rows, fp4=True)
    return found
