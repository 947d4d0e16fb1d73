"""The cuda backend as a backend: what it refuses, what it says of itself, and a decode step that
reads nothing back.
"""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from dsv4_backend_cuda import device, launch, rules
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_backend_torch import interpret
from dsv4_conformance.model import golden

from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.contract.ops import OPS
from dsv4_core.contract.spec import BackendError, Operand
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step


@pytest.fixture(scope="module")
def backend():
    return CudaBackend(interpret=True)


def test_importing_it_or_another_backend_imports_no_triton():
    code = (
        "import sys, dsv4_backend_cuda, dsv4_backend_torch, dsv4_core.graph.model; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match=r"needs triton, not found here; pip install 'dsv4\[cuda\]'"):
        CudaBackend(interpret=True)


def test_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(interpret, "_active", False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match=r"built without CUDA; install a CUDA build .* --interpret"):
        CudaBackend()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"finds no GPU .* --interpret"):
        CudaBackend()


def test_with_an_architecture_that_has_no_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(interpret, "_active", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(BackendError, match=r"Tesla T4: compute capability 7.5 has no kernels here; .* --backend torch"):
        CudaBackend()


def test_with_a_triton_that_the_repair_does_not_know(monkeypatch):
    monkeypatch.setattr(interpret, "_active", False)
    monkeypatch.setattr(interpret, "version", lambda _: "9.9.9")
    with pytest.raises(
        BackendError, match=r"triton 9.9.9: the interpreter repair is proven for 3.9.0 only; install triton==3.9.0"
    ):
        CudaBackend(interpret=True)


def test_on_a_device_that_is_no_gpu():
    with pytest.raises(BackendError, match="device 'cpu' is not a CUDA device"):
        CudaBackend(device="cpu")


def test_compiling_where_kernels_are_interpreted():
    with pytest.raises(BackendError, match="this process interprets its kernels"):
        CudaBackend()


def test_doctor_says_what_is_there():
    lines = {line.what: line for line in CudaBackend.diagnose()}
    assert lines["triton"].found.startswith("3.9.0, known to the interpreter's repair")
    assert {"NVIDIA driver", "torch"} <= lines.keys()


def test_every_op_has_a_kernel_or_a_reason():
    fused = {name for name, spec in OPS.items() if spec.fused}
    assert set(OPS) - rules.RULES.keys() - rules.WITHOUT_KERNEL.keys() <= fused


def test_supports_names_kernels_and_reasons(backend):
    x, weight = Operand("bfloat16", (3, 256)), Operand("float8_e4m3fn@128x128", (192, 256))
    answer = backend.supports("linear", x=x, weight=weight, out_dtype="bfloat16")
    assert answer.by == "triton: act_quant, linear_decode, add_pieces"
    assert (
        backend.supports("linear", x=x, weight=Operand("float32", (192, 256)), out_dtype="float32").by
        == "torch: no kernel multiplies by float32 weights"
    )
    exact = CudaBackend(interpret=True, numerics="float32")
    assert (
        exact.supports("linear", x=x, weight=weight, out_dtype="float32").by
        == "torch: kernels compute native numerics, not float32"
    )


def test_kernels_run_on_the_backends_own_device(monkeypatch):
    """Triton launches on torch's current device: it is chosen at construction, and for a call where
    another one is current.
    """
    chosen, entered = [], []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "require_gpu", lambda _: 90)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: types.SimpleNamespace(device=torch.device("cuda:1")))
    second = CudaBackend(device="cuda:1")
    assert (second.index, chosen) == (1, [1])
    second.kernels = {"hadamard": lambda _, x: entered.append("runs") or x}
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    second.hadamard(x)
    assert entered == [1, "runs", None]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    second.hadamard(x)
    assert entered == [1, "runs", None, "runs"]


def test_a_report_says_what_ran_and_on_what(backend):
    backend.kernels_ran()
    backend.hadamard(torch.ones(2, 32, dtype=torch.bfloat16))
    backend.hadamard(torch.ones(2, 24, dtype=torch.bfloat16)[:, :8])  # torch's: no kernel ran
    assert backend.kernels_ran() == ("hadamard",)
    assert backend.kernels_ran() == ()
    said = backend.environment()
    assert said["triton"] == device.triton_version()
    assert said["torch"] == torch.__version__
    assert said["device"] == "none: kernels were interpreted"
    assert backend.proof({"rope": True, "mix": False}) == {"mix": "failed here", "rope": "interpreted"}


def test_a_report_names_the_gpu(monkeypatch):
    gpu = types.SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(device, "driver", lambda: "NVRM version 580")
    said = device.environment(0, 90)
    assert said["device"] == "H100, compute capability 9.0, 132 multiprocessors, 80 GiB"
    assert said["driver"] == "NVRM version 580"


def test_nan_and_infinity_through_the_codecs(backend):
    """A broken layer must look broken: NaN is NaN afterwards, infinity makes its group NaN, and
    other groups are as without them.
    """
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    bad = x.clone()
    bad[0, 5], bad[1, 200] = float("nan"), float("inf")
    codes, _ = backend.act_quant(bad, block=128)
    plain, _ = backend.act_quant(x, block=128)
    assert int(codes[0, 5]) & 0x7F == 0x7F
    assert int(codes[1, 200]) & 0x7F == 0x7F
    assert torch.equal(codes[2], plain[2])
    for fmt, block in (("e4m3", 64), ("e2m1", 32)):
        y, fine = (backend.act_qdq(t, format=fmt, block=block, channels=256) for t in (bad, x))
        assert y[0, 5].isnan()
        assert y[1, 200].isnan()
        others = torch.ones(3, 256, dtype=torch.bool)
        others[0, :block], others[1, 200 // block * block : 200 // block * block + block] = False, False
        assert torch.equal(y[others], fine[others])
    for make in (lambda t: backend.swiglu(t, x, None, limit=10.0), lambda t: backend.rms_norm(t, None, eps=1e-6)):
        assert make(bad)[0, 5].isnan()


def test_a_norms_codes_are_those_of_its_result(backend, monkeypatch):
    """Products that read a norm's result take the codes that came with it, with the same bits; a
    copy is quantised anew, and so is one for FP4 weights.
    """
    from dsv4_backend_cuda.kernels import quant

    made, act_quant = [], quant.act_quant
    monkeypatch.setattr(quant, "act_quant", lambda x, **how: made.append(how["paired"]) or act_quant(x, **how))
    draw = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(shape, generator=draw).bfloat16() for shape in ((3, 256), (256,)))
    codes = torch.randint(0, 0x78, (192, 256), dtype=torch.uint8, generator=draw)
    fp8 = ScaledArray(codes, torch.full((2, 2), 120, dtype=torch.uint8), "e4m3")
    fp4 = ScaledArray(codes[:, :128].contiguous(), torch.full((192, 8), 120, dtype=torch.uint8), "e2m1")
    y = backend.rms_norm(x, weight, eps=1e-6)
    carried = backend.linear(y, fp8, out_dtype="bfloat16")
    assert made == []
    assert torch.equal(carried, backend.linear(y.clone(), fp8, out_dtype="bfloat16"))
    assert made == [False]
    both = [backend.linear(t, fp4, out_dtype="bfloat16") for t in (y, y.clone())]
    assert made == [False, True, True]
    assert torch.equal(*both)


def test_rules_name_kernels_of_the_launch_table():
    named = {
        "add_pieces",
        "rms_norm",
        "rope",
        "act_quant",
        "act_qdq",
        "hadamard",
        "route",
        "sort",
        "gather",
        "swiglu",
        "invert",
        "combine",
        "compress",
    }
    named |= {"index_scores", "index_select", "sparse_attn", "sparse_attn_combine", "mix", "hc_reduce", "hc_expand"}
    named |= {
        f"{k}_{p}"
        for k in ("linear", "fp4_linear", "bf16_linear", "grouped_linear", "fp8_experts", "fp4_experts")
        for p in ("decode", "prefill")
    }
    assert named <= {kernel for kernel, arch in launch.table() if arch == 90}


def test_a_decode_step_reads_nothing_back(backend, monkeypatch):
    """On the meta device, kernels left out: whatever reads a value, or has a shape that depends on
    one, raises.
    """
    from triton.runtime.interpreter import InterpretedFunction

    launches = []
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *_, grid, **__: launches.append((self.fn.__name__, grid))
    )
    on_meta = CudaBackend(interpret=True)
    on_meta.device = torch.device("meta")
    model = Model(Checkpoint(golden.checkpoint_path("tiny-flash")), on_meta)
    cache = Cache(on_meta, model.config, 2, 320)
    cache.lengths[:] = 290
    traces = []
    for _ in range(2):
        launches.clear()
        step = Step(cache, np.full((2, 1), 7))
        logits = model.logits(model.forward(step))
        on_meta.sample(logits, on_meta.from_numpy(np.zeros(2, np.float32)), temperature=0.0, top_p=1.0)
        traces.append(list(launches))
    assert logits.device.type == "meta"
    assert traces[0] == traces[1]
    assert {"moe_matmul_kernel", "sparse_attn_kernel", "index_select_kernel", "reduce_kernel"} <= {
        name for name, _ in traces[0]
    }
