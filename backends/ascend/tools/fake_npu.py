"""Rung L2: whole models on fake ``npu`` tensors with the real torch-npu wheel; write a report.

Run in the environment of ``npu_venv.py``. Prefill and decode of small models pass through the
backend as on an NPU, without data: the wheel's own schemas and shape functions see every call.
Noted are operations with an operand in host memory (device-clean: there must be none beside
transfers) and operators for which the wheel has no NPU kernel, so that they would fall back to the
CPU. ``npu_format_cast`` has no shape function in the wheels, and 2.9.0.post2's of
``npu_mhc_sinkhorn`` wants arguments that the dispatcher leaves out where they are the schema's own
defaults; ours stand in, and the report names them.

    python backends/ascend/tools/npu_venv.py --venv DIR run backends/ascend/tools/fake_npu.py
    --report reports/ascend/l2/2.13.0.json
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_npu  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch_npu import version

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "backends" / "ascend"), str(ROOT / "backends" / "torch")]

from dsv4_backend_ascend.backend import AscendBackend  # noqa: E402
from dsv4_backend_ascend.capability import GENERATIONS, Generation  # noqa: E402
from dsv4_backend_torch import numeric  # noqa: E402
from dsv4_backend_torch.numeric import torch_dtype  # noqa: E402

from dsv4_core.checkpoint.config import PRESETS, ModelConfig  # noqa: E402
from dsv4_core.checkpoint.convert import Options, convert  # noqa: E402
from dsv4_core.checkpoint.create import create  # noqa: E402
from dsv4_core.checkpoint.weights import Checkpoint, embedded  # noqa: E402
from dsv4_core.contract import dtypes  # noqa: E402
from dsv4_core.contract.dtypes import dtype_name  # noqa: E402
from dsv4_core.graph.cache import Cache  # noqa: E402
from dsv4_core.graph.model import Model  # noqa: E402
from dsv4_core.graph.step import Step  # noqa: E402


def _tiled(weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stand in for the shape function that the wheel lacks: tiles are the same bytes in another
    order.
    """
    return torch.empty_like(weight)


def _sinkhorn(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stand in for a shape function without the schema's defaults."""
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def stand_in(library: torch.library.Library) -> list[str]:
    """Register shape functions that the wheel lacks, and name them."""
    library.impl("npu_format_cast", _tiled, "Meta")
    try:
        torch.ops.npu.npu_mhc_sinkhorn(torch.empty(1, 4, 4, device="meta"))
    except TypeError:
        library.impl("npu_mhc_sinkhorn", _sinkhorn, "Meta", allow_override=True)
        return ["npu_format_cast", "npu_mhc_sinkhorn"]
    return ["npu_format_cast"]


TRANSFERS = {
    "aten::_to_copy",
    "aten::copy_",
    "aten::lift_fresh",
    "aten::detach",
    "aten::view",
    "aten::view.dtype",
    "aten::to",
}


class FakeNpu(AscendBackend):
    """The backend as on a chip of some generation, whose tensors have no data."""

    def __init__(self, generation: Generation, **options: Any) -> None:
        self.generation = generation
        super().__init__(**options)

    def _find_chip(self, chosen: dict[str, Any]) -> str:  # noqa: ARG002
        return "found"

    def from_numpy(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Take over a host array's shape; copying data would ask the device for memory."""
        return torch.empty(array.shape, dtype=torch_dtype(dtype_name(array)), device=self.device)


def table_without_data(name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Stand in for the torch backend's format tables; pairs of values are one element of twice the
    width.
    """
    shape = getattr(dtypes, name).shape
    table = torch.empty(shape, dtype=dtype, device=device)
    return table if len(shape) == 1 else table.view({2: torch.int32, 4: torch.int64}[dtype.itemsize])[:, 0]


class Watch(TorchDispatchMode):
    """Counts npu ops, operations with an operand in host memory, and operators without an NPU
    kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.npu: Counter[str] = Counter()
        self.on_host: Counter[str] = Counter()
        self.no_kernel: Counter[str] = Counter()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator, then run it."""
        result = func(*args, **(kwargs or {}))
        name = func.name()
        tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim()}  # a number in host memory is a kernel argument
        if name.startswith("npu::"):
            self.npu[name] += 1
        if "npu" in devices and not name.startswith("prim::"):
            self.operators.add(name)
            if not has_kernel(name):
                self.no_kernel[name] += 1
            if "cpu" in devices and name not in TRANSFERS:
                self.on_host[name] += 1
        return result


def has_kernel(name: str) -> bool:
    """Whether the wheel has a kernel for NPU tensors, for the operator or its out= variant, or
    PyTorch composes it of others.
    """
    keys = ("PrivateUse1", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    out = f"{name}_out" if "." in name else f"{name}.out"
    variants = [v for v in (name, out) if torch._C._dispatch_has_kernel(v)]  # noqa: SLF001
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(v, key) for v in variants for key in keys)  # noqa: SLF001


def run(path: Path, generation: Generation, tier: str) -> dict[str, Any]:
    """Prefill and two decode steps."""
    with Watch() as watch:
        model = Model(Checkpoint(path), FakeNpu(generation, tier=tier))
        cache = Cache(model.backend, model.config, 2, 160)
        shapes = []
        for seq in (150, 1, 1):
            step = Step(cache, np.ones((2, seq), np.int32))
            h = model.forward(step)
            cache.advance(step.sequences, step.ends)
            logits = model.logits(h)
            shapes.append(f"{logits.device.type} {str(logits.dtype).removeprefix('torch.')}{list(logits.shape)}")
    return {
        "tier": tier,
        "logits": shapes,
        "npu ops": dict(sorted(watch.npu.items())),
        "calls of the table that ran": sorted(
            {call.name for plan in model.backend.plans.values() for call in plan.calls}
        ),
        "operators": sorted(watch.operators),
        "with an operand in host memory": dict(watch.on_host),
        "without an NPU kernel": dict(watch.no_kernel),
    }


def wide_heads() -> ModelConfig:
    """Published head sizes, everything else small."""
    small: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 3, "q_lora_rank": 128, "o_lora_rank": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 128, "num_hash_layers": 1, "index_topk": 16, "num_nextn_predict_layers": 0,
        "compress_ratios": (0, 4, 128),
    }  # fmt: skip
    return dataclasses.replace(PRESETS["flash"], **small)


def main() -> int:
    """Command line; fails where a model is not device-clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    runs: dict[str, Any] = {}
    numeric.table = table_without_data
    library = torch.library.Library("npu", "IMPL")
    ours = stand_in(library)
    with tempfile.TemporaryDirectory() as folder, FakeTensorMode(allow_non_fake_inputs=False):
        create(Path(folder) / "wide", wide_heads(), seed=1)
        convert(embedded(), Path(folder) / "w8a8", Options(int8=True))
        convert(Path(folder) / "wide", Path(folder) / "bf16", Options(bf16=True))
        models = {
            "embedded": embedded(),
            "published head sizes": Path(folder) / "wide",
            "BF16": Path(folder) / "bf16",
            "W8A8": Path(folder) / "w8a8",
        }
        for name, path in models.items():
            for generation in GENERATIONS if name != "W8A8" else ("910B", "910C"):
                runs[f"{name}, {generation}"] = [run(path, generation, tier) for tier in ("cann", "composed")]
    entries = [entry for pair in runs.values() for entry in pair]
    report = {
        "rung": "L2",
        "says": "the whole model runs on fake npu tensors with the real torch-npu; nothing was computed and no NPU was present",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "versions": {
            "torch": torch.__version__,
            "torch-npu": version.__version__,
            "torch-npu commit": version.git_version,
        },
        "our shape functions": ours,
        "runs": runs,
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unclean = sum(bool(entry["with an operand in host memory"] or entry["without an NPU kernel"]) for entry in entries)
    fallback = sorted({name for entry in entries for name in entry["without an NPU kernel"]})
    print(f"{len(entries)} runs, {unclean} not device-clean; without an NPU kernel: {fallback or 'none'}")
    return 1 if unclean else 0


if __name__ == "__main__":
    sys.exit(main())
