"""The cuda backend: Triton kernels where ``rules`` allow them, PyTorch elsewhere and in the exact
modes.
"""

from __future__ import annotations

import functools
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from dsv4_backend_torch.backend import TorchBackend
from dsv4_backend_torch.graphs import Recorded

from dsv4_backend_cuda import device, launch, providers
from dsv4_backend_cuda.carried import settle
from dsv4_backend_cuda.rules import RULES, WITHOUT_KERNEL, Answer
from dsv4_core.contract.backend import BackendError, DeviceCheck, Option
from dsv4_core.contract.ops import OPS, EveryOp
from dsv4_core.contract.spec import Support

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dsv4_core.contract.backend import Diagnosis

_FP8_SUMS = ("fp8 products summed in less than float32 within 128 channels, promoted to float32 after each",)


def _bound(op: str) -> Callable[..., Any]:
    """One contract: its kernels where the rule says so, else what PyTorch composes."""
    inherited = getattr(
        EveryOp if op == "ffn" else TorchBackend, op
    )  # PyTorch's own fused ffn would pass by the kernels of linear

    @functools.wraps(inherited)
    def run(self: CudaBackend, *arrays: Any, **scalars: Any) -> Any:
        answer = self.answer(op, *arrays, **scalars)
        if isinstance(answer, str):
            return inherited(self, *arrays, **scalars)
        provider = self.provider(op, *arrays, **scalars)
        kernel = provider.run if provider else self.kernels[op]
        self.ran.update(dict.fromkeys((provider.name,) if provider else answer))
        if self.index is not None and torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):  # Triton launches on torch's current device, wherever the arrays are
                return kernel(self, *arrays, **scalars)
        return kernel(self, *arrays, **scalars)

    return run


class CudaBackend(TorchBackend):
    """NVIDIA GPUs of compute capability 8.0 to 12.x.

    ``interpret``: run the kernels in Triton's repaired interpreter, on the CPU.
    ``batch_invariant``: a token's bits do not depend on what else is in the batch nor on how a
    prompt is cut; False lets attention of many tokens take whole lists of rows at a time, and
    products of few tokens sum in pieces. ``prefer``: other libraries' kernels for the ops that they
    have (``providers``).
    """

    name = "cuda"
    claims_level = 3  # shown in the interpreter; a GPU has to show it again
    options: ClassVar[tuple[Option, ...]] = (
        *(o for o in TorchBackend.options if o.name not in {"device", "threads", "few_tokens_by"}),
        Option("device", "CUDA device", "cuda"),
        Option("interpret", "run the kernels in Triton's repaired interpreter, on the CPU", default=False),
        Option("arithmetic", "of the interpreter: exact, or hopper: as coarse as sm_90's units", "exact"),
        Option(
            "batch_invariant",
            "cut sums and attention lists the same way whatever the batch; slower, and not proven yet",
            default=False,
        ),
        Option(
            "prefer",
            f"libraries whose kernels run the ops that they have, comma-separated: {', '.join(providers.LIBRARIES)}",
            "",
        ),
        Option("threads", "threads of torch on a CPU", kind=int),
    )
    narrower: ClassVar[dict[str, tuple[str, ...]]] = {
        "sparse_attn": ("probabilities in bfloat16",),
        "cached_sparse_attn": ("probabilities in bfloat16",),
        "linear": _FP8_SUMS,
        "expert_linear": _FP8_SUMS,
    }
    few_tokens = 16  # up to here a step's tokens alone do not fill a GPU, and lists are cut in any case
    interpret: bool
    prefer: str
    arch: int

    def __init__(self, **options: Any) -> None:
        """Raise ``BackendError`` without Triton, without a GPU that it compiles for, or where the
        interpreter cannot be repaired; each says what to do.
        """
        chosen = {o.name: o.default for o in self.options} | options
        device.require_triton()
        if providers.named(str(chosen["prefer"])) and (chosen["interpret"] or launch.pretended is not None):
            raise BackendError(
                f"backend 'cuda': prefer={chosen['prefer']}: libraries run on a GPU, and here kernels are interpreted; leave it out"
            )
        if chosen["prefer"] and chosen["batch_invariant"]:
            raise BackendError(
                f"backend 'cuda': prefer={chosen['prefer']}: libraries promise no order of sums; leave out it or batch_invariant"
            )
        device.require_arithmetic(chosen["arithmetic"], interpreted=bool(chosen["interpret"]))
        if chosen["interpret"]:
            device.require_interpreter(chosen["arithmetic"])
            self.arch, where = launch.architecture("cpu"), "cpu"
        elif launch.pretended is not None:
            self.arch, where = launch.pretended, "meta"
        else:
            self.arch, where = device.require_gpu(str(chosen["device"])), chosen["device"]
        super().__init__(**{**options, "device": where})
        self.index: int | None = self.device.index if self.device.type == "cuda" else None
        if self.index is not None:
            torch.cuda.set_device(self.index)  # for torch's streams and for Triton's launches
        self.ran: dict[str, None] = {}
        if self.numerics != "native":
            self.batch_invariant = False  # torch's products promise no order of sums
        bindings = import_module(
            "dsv4_backend_cuda.bindings"
        )  # the one import of Triton, now that the interpreter is chosen or not
        self.kernels: dict[str, Callable[..., Any]] = bindings.IMPLEMENTATIONS
        specs = [spec for module in bindings.MODULES for spec in module.SPECS]
        self.providers = providers.load(self.prefer, self.arch) if self.numerics == "native" else {}
        self.absent: dict[str, str] = {
            spec.name: spec.unsupported[self.arch] for spec in specs if self.arch in spec.unsupported
        }

    @cached_property
    def on_cpu(self) -> bool:
        """In native mode never: interpreted or not, the paths are those of a GPU."""
        return self.numerics != "native" and bool(self.device.type == "cpu")

    def answer(self, op: str, *arrays: Any, **scalars: Any) -> Answer:
        """Kernels that run a call, or why PyTorch does."""
        if self.numerics != "native":
            return f"kernels compute native numerics, not {self.numerics}"
        answer = RULES[op](*arrays, **scalars)
        missing = next((name for name in answer if name in self.absent), None) if isinstance(answer, tuple) else None
        return answer if missing is None else f"{missing} does not exist on sm_{self.arch}: {self.absent[missing]}"

    def provider(self, op: str, *arrays: Any, **scalars: Any) -> providers.Provider | None:
        """The library that runs a call which our kernels could run, if one is preferred and can."""
        found = self.providers.get(op)
        return found if found and not found.call.fits(*arrays, **scalars) else None

    def device_checks(self) -> Sequence[DeviceCheck]:
        """Each library's call against the kernel that it stands for."""
        return [
            DeviceCheck(op, f"as_{found.call.library}", "smoke", functools.partial(providers.difference, self, op))
            for op, found in self.providers.items()
        ]

    def supports(self, op: str, **operands: Any) -> Support:
        """Name the kernels, or that torch runs the op and why."""
        base = super().supports(op, **operands)
        if op in WITHOUT_KERNEL:
            return Support(by=f"torch: {WITHOUT_KERNEL[op]}")
        if not base or op not in RULES:
            return base
        spec = OPS[op]
        if operands.keys() < {*spec.arrays, *spec.scalars}:
            return Support(by="triton, where dtypes and shapes allow it")
        arrays, scalars = [operands[name] for name in spec.arrays], {name: operands[name] for name in spec.scalars}
        answer = self.answer(op, *arrays, **scalars)
        if isinstance(answer, str):
            return Support(by=f"torch: {answer}")
        provider = self.provider(op, *arrays, **scalars)
        return Support(by=provider.name if provider else f"triton: {', '.join(dict.fromkeys(answer))}")

    def record(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """On a GPU a CUDA graph (``graphs.Recorded``); elsewhere as PyTorch does it."""
        if self.index is None:
            return super().record(function)

        def run(*arrays: Any) -> Any:
            with self.computing():
                result = function(*arrays)
                settle(result)  # or the first to ask would make it once, and no replay again
                return result

        return Recorded(run, self.device)

    def kernels_ran(self) -> Sequence[str]:
        """Kernels of the launch table that ran since this was last asked, as first met."""
        ran = tuple(self.ran)
        self.ran.clear()
        return ran

    def environment(self) -> Mapping[str, str]:
        """Triton, torch, driver, and the GPU with its limits; or that kernels were interpreted."""
        return device.environment(self.index, self.arch)

    def proof(self, ran: Mapping[str, bool]) -> Mapping[str, str]:
        """By kernel that ran: measured on a GPU, or interpreted, where every check passed."""
        rung = "interpreted" if self.interpret else f"measured on sm_{self.arch}"
        return {name: rung if passed else "failed here" for name, passed in sorted(ran.items())}

    @classmethod
    def diagnose(cls) -> tuple[Diagnosis, ...]:
        """Triton, driver and GPUs."""
        return device.diagnose()

    rms_norm = _bound("rms_norm")
    rms_norm_rope = _bound("rms_norm_rope")
    apply_rope = _bound("apply_rope")
    act_quant = _bound("act_quant")
    act_qdq = _bound("act_qdq")
    hadamard = _bound("hadamard")
    linear = _bound("linear")
    grouped_linear = _bound("grouped_linear")
    expert_linear = _bound("expert_linear")
    gate = _bound("gate")
    gate_hash = _bound("gate_hash")
    dispatch = _bound("dispatch")
    swiglu = _bound("swiglu")
    combine = _bound("combine")
    ffn = _bound("ffn")
    moe = _bound("moe")
    kv_score = _bound("kv_score")
    compress = _bound("compress")
    cached_compress = _bound("cached_compress")
    cache_write = _bound("cache_write")
    cache_read = _bound("cache_read")
    index_scores = _bound("index_scores")
    index_select = _bound("index_select")
    index_topk = _bound("index_topk")
    cached_index_topk = _bound("cached_index_topk")
    sparse_attn = _bound("sparse_attn")
    cached_sparse_attn = _bound("cached_sparse_attn")
    hc_pre = _bound("hc_pre")
    hc_pre_norm = _bound("hc_pre_norm")
    hc_head = _bound("hc_head")
    hc_post = _bound("hc_post")
