"""The torch backend's arrays, weights and options; its ops are in the files named like the
contracts.
"""

from __future__ import annotations

import os
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dsv4_backend_torch.compiled import build
from dsv4_backend_torch.fused import TorchFused
from dsv4_backend_torch.kept import NotCompiledError
from dsv4_backend_torch.matmul import cpu_multiplies_bf16
from dsv4_backend_torch.numeric import torch_dtype
from dsv4_backend_torch.tape import Recorded
from dsv4_backend_torch.threads import cores
from dsv4_backend_torch.weights import StackedExperts, WeightCache
from dsv4_core.contract.backend import Backend, BackendError, Diagnosis, Option
from dsv4_core.contract.dtypes import BFLOAT16, Experts, Host, ScaledArray

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from dsv4_backend_torch.process_group import TorchProcessGroup
    from dsv4_core.contract.rendezvous import Rendezvous


BUILT_IN = {"cpu", "cuda", "meta", "mps", "xpu"}  # devices that torch knows without an extension


def load_extensions(backend: str, kind: str) -> None:
    """Load the installed device extensions, as torch would by itself: for a device that it does not
    bring.

    Raises ``BackendError`` with the reason where one does not load.
    """
    try:
        for entry in metadata.entry_points(group="torch.backends"):
            entry.load()()
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"{entry.name} does not load: {str(error).strip().splitlines()[0]}"
        raise BackendError(f"backend {backend!r}: device {kind!r} needs an extension of torch, and {reason}") from error


class TorchBackend(TorchFused, Backend):
    """PyTorch. ``device``: any that this torch knows. ``weight_cache``: bytes of dequantised (on a
    CPU: or repacked) weights to keep. ``threads``: of a CPU.
    """

    name = "torch"
    options: ClassVar[tuple[Option, ...]] = (
        Option("device", "torch device: cpu, cuda, npu, xpu, mps", "cpu"),
        Option("weight_cache", "bytes of dequantised weights kept in memory", 2 << 30),
        Option("threads", "threads of torch on a CPU", kind=int, least=1, most=1024),
        Option("few_tokens_by", "a decode step on a CPU: c, torch, or auto: c where a compiler builds it", "auto"),
    )
    claims_level = 3
    # one rounding of an exact value, or none: whoever else is in the batch, and whichever path the
    # number of rows takes
    claims = tuple(
        f"batch_invariance/{op}" for op in ("embedding", "hc_expand", "hc_add", "act_quant", "act_qdq", "index_select")
    )
    weight_cache: int
    threads: int | None
    deterministic = True

    def __init__(self, **options: Any) -> None:
        """Raise ``BackendError`` where this torch does not know or cannot use the device."""
        super().__init__(**options)
        kind = str(self.device).partition(":")[0]
        if kind not in BUILT_IN:
            load_extensions(self.name, kind)
        try:
            self.device = torch.zeros(1, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"backend {self.name!r}: device {self.device!r} cannot be used by torch {torch.__version__}: {reason}"
            ) from None
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        elif self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and cores() < torch.get_num_threads():
            torch.set_num_threads(cores())  # OpenMP counts the machine's, not those of the process's control group
        if self.few_tokens_by not in {"auto", "c", "torch"}:
            raise BackendError(
                f"backend {self.name!r}: few_tokens_by {self.few_tokens_by!r} is not one of auto, c, torch"
            )
        if self.few_tokens_by == "c":
            self.require_c()
        self.weights = WeightCache(self.weight_cache)
        self._well_scaled = {}

    def require_c(self) -> None:
        """Raise ``BackendError`` where the C kernels cannot run, with the reason."""
        reason = (
            f"C kernels have no {self.numerics}" if self.on_cpu else f"C kernels run on a CPU, not on {self.device}"
        )
        try:
            if self.compiled:
                return
        except NotCompiledError as error:
            reason = str(error)
        raise BackendError(f"backend {self.name!r}: few_tokens_by 'c': {reason}; 'auto' and 'torch' run without")

    @classmethod
    def diagnose(cls) -> tuple[Diagnosis, ...]:
        """Say which torch this is, what it computes on, and how it multiplies BF16 on this CPU."""
        found = {kind: getattr(torch, kind, None) for kind in ("cuda", "npu", "xpu")} | {"mps": torch.backends.mps}
        kinds = [kind for kind, module in found.items() if module is not None and module.is_available()]
        bf16 = "BF16 products by oneDNN" if cpu_multiplies_bf16() else "no BF16 products: float32, rounded to BF16"
        try:
            few = f"C kernels, built by {build().compiler}"
        except NotCompiledError as error:
            few = f"PyTorch, several times slower than C kernels: {error}"
        small = [n for n in ("float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn_x2") if not hasattr(torch, n)]
        return (
            Diagnosis("version", f"{torch.__version__}; dtypes it lacks, done by tables: {', '.join(small) or 'none'}"),
            Diagnosis("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {bf16}"),
            Diagnosis("few tokens", few),
            Diagnosis("other devices", ", ".join(kinds) or "none that this torch can use"),
        )

    def describe(self) -> str:
        """Name the device and, on a CPU, what BF16 operands are multiplied as."""
        where = f"backend {self.name} on {self.device}"
        if not self.on_cpu:
            return where
        threads = f"{(n := torch.get_num_threads())} thread{'s' * (n != 1)}"
        products = ", products in BF16" if self.bf16_products else ", products in float32"
        few = ", few tokens by C kernels" if self.compiled else ""
        return f"{where} ({threads}{products if self.numerics == 'native' else ''}{few})"

    def computing(self) -> AbstractContextManager[Any]:
        """No gradients, no version counters: a tenth of a decode step."""
        return torch.inference_mode()

    def from_numpy(self, array: Host) -> Tensor:
        """Take over a host array; on a CPU its memory is shared."""
        bfloat16 = array.dtype == BFLOAT16
        host = array.view(np.int16) if bfloat16 else array
        if host.flags.writeable:
            tensor = torch.from_numpy(host)
        else:  # mapped weights are read-only, and no op writes to a weight
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tensor = torch.from_numpy(host)
        tensor = tensor.view(torch.bfloat16) if bfloat16 else tensor
        return tensor if self.on_cpu else tensor.to(self.device, non_blocking=True)

    def to_numpy(self, array: Tensor) -> Host:
        """Give an array back to the host."""
        if array.is_meta:
            raise BackendError(
                f"backend {self.name!r}: device {self.device} holds no numbers; it is for counting alone"
            )
        host = array.detach().cpu()
        if host.dtype == torch.bfloat16:
            return host.view(torch.int16).numpy().view(BFLOAT16)
        return host.numpy()

    def round_up(self, n: int) -> int:
        """On a CPU without C kernels ``n``: there no step is recorded."""
        return n if self.on_cpu and not self.compiled else super().round_up(n)

    def record(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """On a CPU as a tape of C kernels."""
        return Recorded(self, function) if self.compiled else super().record(function)

    def process_group(self, where: Rendezvous) -> TorchProcessGroup:
        """Reach the ranks' store: gloo, NCCL or HCCL by the device."""
        from dsv4_backend_torch.process_group import TorchProcessGroup

        return TorchProcessGroup(self, where)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Allocate zeros."""
        return torch.zeros(shape, dtype=torch_dtype(dtype), device=self.device)

    def load(self, weight: Host | ScaledArray) -> Any:
        """Copy to the device; a scaled weight's range is noted while its scales are in host
        memory.
        """
        loaded = super().load(weight)
        if isinstance(weight, ScaledArray) and weight.format != "int8" and not self.on_cpu:
            self.note_scales(loaded, int(weight.scale.min(initial=255)))
        return loaded

    def load_experts(self, experts: Experts) -> Experts:
        """On a CPU an expert is mapped and read when it is first used; on a device all are copied
        into one stack.
        """
        return super().load_experts(experts) if self.on_cpu else self.stacked_experts(experts)

    def stacked_experts(self, experts: Experts) -> StackedExperts:
        """Copy one projection of all experts into one tensor, expert by expert, so that the host
        holds one at a time.
        """
        count, first = experts.shape[0], experts[0]
        if not isinstance(first, ScaledArray):
            return StackedExperts(self._stack([experts[e] for e in range(count)]))
        stack = ScaledArray(
            self._stack([experts[e].data for e in range(count)]),
            self._stack([experts[e].scale for e in range(count)]),
            first.format,
        )
        if first.format != "int8" and not self.on_cpu:
            self.note_scales(stack, min(int(experts[e].scale.min(initial=255)) for e in range(count)))
        return StackedExperts(stack)

    def _stack(self, parts: list[Host]) -> Tensor:
        first = self.from_numpy(parts[0])
        stack = torch.empty((len(parts), *first.shape), dtype=first.dtype, device=self.device)
        for i, part in enumerate(parts):  # over experts, at loading
            stack[i].copy_(self.from_numpy(part))
        return stack
