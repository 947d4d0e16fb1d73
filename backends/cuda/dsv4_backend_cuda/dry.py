"""A dry run: Triton specialises and compiles what a program really launches, for a GPU that is not
there, and launches nothing.

The interpreter never specialises and the offline build is told its signatures; neither meets what
Triton's JIT makes of the values that a backend passes. Here a driver without a device stands in,
arrays live on torch's meta device (shapes and addresses, no memory, and whoever reads a value on
the host raises), and every launch is noted.
"""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from inspect import signature
from types import SimpleNamespace
from typing import Any, Literal

import torch
from dsv4_backend_torch import interpret
from dsv4_backend_torch.weights import StackedExperts
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.dtypes import Experts, ScaledArray
from dsv4_core.planning.shapes import ShapeSource


@dataclass
class Record:
    """What a process launched since the last ``clear``; ``specialisations`` and ``failures`` are
    kept for good.
    """

    launches: Counter[str] = field(default_factory=Counter)
    """Launches by kernel."""
    order: list[str] = field(default_factory=list)
    """Kernels as they were launched."""
    specialisations: defaultdict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    """By kernel: Triton's own cache key -> signature and constants."""
    failures: dict[str, str] = field(default_factory=dict)
    """By kernel and signature: why it does not compile."""

    def clear(self) -> None:
        """Forget the launches."""
        self.launches.clear()
        self.order.clear()


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        return SimpleNamespace()


Depth = Literal["count", "parse", "compile"]

_record: Record | None = None


def _parse(source: Any, target: Any, options: dict[str, Any]) -> Any:
    """The first stage of ``triton.compile``, which types every line of a kernel."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    first = (target, parsed) if "target" in signature(source.make_ir).parameters else (parsed,)
    source.make_ir(*first, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    return SimpleNamespace()


def activate(capability: int, depth: Depth = "compile") -> Record:
    """Make every Triton launch of this process dry, for good; give what will be recorded.

    ``capability``: of the GPU that is pretended, as 90 for 9.0. ``depth``: how far each
    specialisation is taken: to machine code, in seconds; ``parse``: to Triton's own intermediate
    code, in milliseconds, which finds what a kernel's source may not do with a value; ``count``:
    not at all. Raises ``BackendError`` where this process interprets its kernels or runs dry for
    another GPU, and ``ValueError`` for a GPU without kernels.
    """
    global _record
    architecture = launch.compatible(capability)
    if _record:
        if launch.pretended != architecture:
            raise BackendError(f"this process runs dry for sm_{launch.pretended}; sm_{capability} needs another")
        return _record
    if interpret.active():
        raise BackendError("this process interprets its kernels, so none can be compiled; start another process")
    from triton import knobs
    from triton.runtime import driver, jit

    record = Record()
    driver.set_active(_Driver(capability))

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        types = ", ".join(f"{name}: {kind}" for name, kind in compile["signature"].items() if kind != "constexpr")
        constants = ", ".join(f"{fn.jit_function.arg_names[path[0]]}={v}" for path, v in compile["constants"].items())
        aligned = sorted(fn.jit_function.arg_names[path[0]] for path in compile["configs"][0])
        record.specialisations[fn.name][str(key)] = f"{types}; {constants}; by 16: {', '.join(aligned)}"
        if depth == "parse":
            fn.jit_function.compile = _parse
        return depth == "count"  # True: go no further

    knobs.runtime.jit_cache_hook = note
    run = jit.JITFunction.run

    def dry(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        name = self.fn.__name__
        record.launches[name] += 1
        record.order.append(name)
        before = len(record.specialisations[name])
        try:
            return run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
            known = list(record.specialisations[name].values())
            which = known[-1] if len(known) > before else "again"
            record.failures.setdefault(
                f"{name}: {which}", "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
            )
            return None

    jit.JITFunction.run = dry
    launch.pretended, _record = architecture, record
    return record


class TorchKernels(TorchDispatchMode):
    """Counts what torch would launch: every op but those that only view, allocate or look."""

    FREE = ("view", "reshape", "slice", "select", "expand", "permute", "transpose", "alias", "detach", "squeeze")
    CASTS = ("to", "_to_copy", "contiguous")
    ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.allocations = 0
        self.copies = 0
        """Arrays that went from the host to the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op, and count it."""
        del types
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        result = func(*args, **kwargs)
        device = getattr(result, "device", None)
        if device is None or device.type == "cpu":
            return result
        if name in self.ALLOCATE:
            self.allocations += 1
        elif name in self.CASTS and args[0].device.type == "cpu":
            self.copies += 1
        elif args and result is args[0] and name in self.CASTS:
            pass  # it has that dtype and device already
        elif not any(word in name for word in self.FREE):
            self.kernels[name] += 1
        return result


class VirtualSource(ShapeSource):
    """A model's weights from its configuration alone, as arrays without memory."""

    def array(self, name: str) -> Any:
        """Give a tensor by its full name."""
        shape = super().array(name)
        return torch.empty(shape.shape, dtype=getattr(torch, shape.dtype), device="meta")


class DryBackend(CudaBackend):
    """The cuda backend of a dry run: what is on the device already is taken as it is. ``activate``
    comes first.
    """

    def from_numpy(self, array: Any) -> Any:
        return array if isinstance(array, torch.Tensor) else super().from_numpy(array)

    def load(self, weight: Any) -> Any:
        return weight

    def load_experts(self, experts: Experts) -> Experts:
        first, count = experts[0], experts.shape[0]

        def stack(part: torch.Tensor) -> torch.Tensor:
            return part.new_empty((count, *part.shape))

        if isinstance(first, ScaledArray):
            return StackedExperts(ScaledArray(stack(first.data), stack(first.scale), first.format))
        return StackedExperts(stack(first))
