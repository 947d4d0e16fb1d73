"""What a kernel needs to be compiled and launched: its specification, and its row of the checked-in
launch table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dsv4_backend_torch import interpret

ARCHITECTURES = (80, 89, 90, 100, 120)
TABLE = Path(os.environ.get("DSV4_LAUNCH_TABLE") or Path(__file__).with_name("launch_table.json"))
"""The package's own, or one that `dsv4 kernels tune --out` wrote."""

pretended: int | None = None
"""The architecture that a dry run is for (``dry.activate``); None in every other process."""


@dataclass(frozen=True)
class Work:
    """What one iteration of the hot loop of one thread block must move and compute, from the
    algorithm.
    """

    bytes: float
    """Read from and written to device memory."""
    flops: float = 0.0
    rate: str = "bf16"
    """Tensor-core rate that ``flops`` run at: ``bf16`` or ``fp8``."""


@dataclass(frozen=True)
class KernelSpec:
    """How a kernel is compiled offline and what its machine code must contain.

    ``signature``: runtime arguments and their types ("*bf16", "*u8", "i32", "fp32"; "i32:16" for a
    multiple of 16). ``variants``: name -> constexprs of a published model's shape, in addition to
    the launch table's row. ``mma``: architecture -> regular expression of the tensor-core
    instruction expected. ``work``: the constexprs -> the hot loop's work. ``unsupported``:
    architecture -> why it has no such kernel. ``per_arch``: architecture -> constexprs.
    ``architectures``: those that this specification is for; others may have one of the same name
    with another kernel. ``looped``: whether the source loops over data; if not, "the hot loop" is
    the whole kernel.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    variants: Mapping[str, Mapping[str, Any]]
    work: Callable[[Mapping[str, Any]], Work]
    mma: Mapping[int, str] = field(default_factory=dict)
    per_arch: Callable[[int], Mapping[str, Any]] = lambda _: {}
    unsupported: Mapping[int, str] = field(default_factory=dict)
    looped: bool = True
    architectures: tuple[int, ...] = ARCHITECTURES

    def constexprs(self, variant: str, arch: int) -> dict[str, Any]:
        """Compile-time arguments without the launch options."""
        blocks = {k: v for k, v in config(self.name, arch).items() if not k.startswith("num_")}
        return {**blocks, **self.per_arch(arch), **self.variants[variant]}

    def options(self, arch: int) -> dict[str, Any]:
        """Warps, stages, and no contraction of a product and a sum that the source keeps apart."""
        return {k: v for k, v in config(self.name, arch).items() if k.startswith("num_")} | {"enable_fp_fusion": False}


@cache
def table() -> dict[tuple[str, int], dict[str, Any]]:
    """The launch table by (kernel, architecture)."""
    return {(row["kernel"], row["arch"]): row for row in json.loads(TABLE.read_text())}


def config(kernel: str, arch: int) -> dict[str, int]:
    """Block sizes, warps and stages of a kernel on an architecture; raise ``KeyError`` that names
    both.
    """
    try:
        return table()[kernel, arch]["config"]
    except KeyError:
        raise KeyError(
            f"no launch configuration for kernel {kernel!r} on sm_{arch}; add a row to {TABLE.name}, or run `dsv4 kernels tune`"
        ) from None


@cache
def architecture(device: str) -> int:
    """The table's architecture for a device: the newest one that is not newer. The interpreter runs
    sm_90's configurations, a dry run those of the architecture that it is for.
    """
    if interpret.active():
        return 90
    if pretended is not None:
        return pretended
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return compatible(major * 10 + minor)


def cdiv(n: int, size: int) -> int:
    """Blocks of ``size`` that hold ``n``. Triton's own costs microseconds: it serves kernels
    too.
    """
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n``; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def compatible(capability: int) -> int:
    """Architecture whose configurations a compute capability can run; raise ``ValueError`` below
    8.0.

    Tensor-core instructions of 9.0 and 10.x exist there only, so that 8.6 and 8.7 take 8.0's rows,
    10.3 takes 10.0's and 12.1 takes 12.0's.
    """
    fits = [a for a in ARCHITECTURES if a <= capability and (a // 10 == capability // 10)]
    if not fits:
        raise ValueError(
            f"compute capability {capability / 10} has no kernels here; they exist for {', '.join(f'{a / 10}' for a in ARCHITECTURES)}"
        )
    return fits[-1]


def options(kernel: str, tensor: Any) -> dict[str, Any]:
    """Keyword arguments for launching ``kernel`` where ``tensor`` lives."""
    return {**config(kernel, architecture(str(tensor.device))), "enable_fp_fusion": False}


def native_fp8(tensor: Any) -> bool:
    """Whether the device converts FP8 in hardware (8.9 and later)."""
    return architecture(str(tensor.device)) >= 89
