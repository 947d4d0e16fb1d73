"""The ascend backend: how near to exact it computes, what it plans, and each way of not finding a
chip.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from dsv4_backend_ascend import probe
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.capability import GENERATIONS, cann_version
from dsv4_backend_torch.backend import TorchBackend
from dsv4_conformance.cli.run import run_command

from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.contract.backend import BackendError
from dsv4_core.contract.spec import Operand
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.model import Model
from dsv4_core.graph.step import Step


def run(model, ids, steps):
    cache = Cache(model.backend, model.config, ids.shape[0], ids.shape[1])
    first = ids.shape[1] - steps
    parts = []
    for part in (ids[:, :first], *(ids[:, i : i + 1] for i in range(first, ids.shape[1]))):
        step = Step(cache, part)
        h = model.forward(step)
        cache.advance(step.sequences, step.ends)
        parts.append(model.backend.to_numpy(model.logits(h)).reshape(*part.shape, -1))
    return np.concatenate(parts, 1).astype(np.float64)


def distance(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def embedded_logits():
    ids = np.random.default_rng(0).integers(2, 200, (2, 40)).astype(np.int32)
    numerics = ("native", "float32")
    return ids, {n: run(Model(Checkpoint(embedded()), TorchBackend(numerics=n)), ids, 3) for n in numerics}


@pytest.mark.parametrize("tier", ["cann", "composed"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_embedded_model_is_as_near_to_exact_as_torch(embedded_logits, generation, tier):
    ids, logits = embedded_logits
    backend = AscendBackend(simulate=generation, tier=tier)
    backend.chip.calls.clear()
    got = run(Model(Checkpoint(embedded()), backend), ids, 3)
    assert distance(got, logits["float32"]) < 1.1 * distance(logits["native"], logits["float32"])
    assert bool(backend.chip.calls) == (tier == "cann")


def test_exact_modes_are_composed(embedded_logits):
    ids, logits = embedded_logits
    backend = AscendBackend(simulate="950", numerics="float32")
    backend.chip.calls.clear()
    assert distance(run(Model(Checkpoint(embedded()), backend), ids, 3), logits["float32"]) < 1e-5
    assert not backend.chip.calls


def _linear(weight):
    return {"x": Operand("bfloat16", (4, 256)), "weight": Operand(weight, (64, 256)), "out_dtype": "bfloat16"}


def test_a_plan_needs_no_npu_and_computes_nothing():
    backend = AscendBackend(soc="950")
    assert backend.standing == "planned"
    assert backend.device.type == "meta"
    served = backend.supports("linear", **_linear("float8_e4m3fn@128x128"))
    assert served.by == "cann: npu_dynamic_mx_quant, npu_quant_matmul"
    assert "documented: aclnn QuantMatmulV5" in served.proof
    assert "composed: a plain matrix product" in backend.supports("linear", **_linear("bfloat16")).by
    assert "no FP8 or FP4 units" in AscendBackend(soc="910B").supports("linear", **_linear("float8_e4m3fn@128x128")).by


def test_an_old_cann_is_named_with_what_is_needed():
    operands = {
        "h": Operand("bfloat16", (4, 4, 32)),
        "fn": Operand("float32", (24, 128)),
        "scale": Operand("float32", (3,)),
        "base": Operand("float32", (24,)),
    }
    answer = AscendBackend(soc="950", cann="8.5.0").supports("hc_pre", **operands, norm_eps=1e-6, eps=1e-6, iters=20)
    assert answer.by == "composed: npu_mhc_pre needs CANN 9.0.0 on 950, found 8.5.0"


def test_what_is_composed_of_contracts_says_so():
    answer = AscendBackend(soc="910B").supports("hadamard", x=Operand("bfloat16", (4, 128)))
    assert "by themselves" not in answer.by
    operands = {"x": Operand("bfloat16", (4, 2, 64)), "positions": Operand("int32", (4,))}
    answer = AscendBackend(soc="910B").supports("rms_norm_rope", **operands, eps=1e-6)
    assert answer.by == "composed: no npu op serves rms_norm_rope; its parts are planned by themselves"


def test_cann_versions_have_an_order():
    versions = ["8.2.RC1", "8.3.RC1", "8.3.RC2", "8.5.0", "9.0.0", "9.1.0_beta.1", "9.1.0", "9.1.1", "9.2.0"]
    assert sorted(versions, key=cann_version) == versions
    with pytest.raises(BackendError, match=r"CANN version 'newest' does not begin like 8.2.RC1"):
        AscendBackend(soc="910B", cann="newest")


@pytest.mark.parametrize(
    ("text", "like"),
    [
        ("8.2.RC1.1", "8.2.RC1"), ("8.3.RC1.2", "8.3.RC1"), ("9.0.0.SPC001", "9.0.0"), ("9.1.0.B080", "9.1.0"), ("9.1.0.1", "9.1.0"),
        ("V9.1.0", "9.1.0"), ("9.1.0-post1+g1234", "9.1.0"), ("9.1", "9.1.0"), ("9.1.0.alpha003", "9.1.0_beta.1"),
    ],
)  # fmt: skip
def test_patch_and_build_numbers_of_cann_do_not_matter(text, like):
    assert cann_version(text) == cann_version(like)
    assert AscendBackend(soc="910B", cann=text).cann_version == text


def test_a_cann_of_unreadable_version_is_warned_of_and_used(monkeypatch):
    monkeypatch.setattr(AscendBackend, "_find_chip", lambda self, _: setattr(self, "generation", "910B") or "found")
    monkeypatch.setattr(probe, "cann_version", lambda: "nightly")
    monkeypatch.setattr(probe, "drift", dict)
    with pytest.warns(
        UserWarning, match="CANN version 'nightly' does not begin like 8.2.RC1.*as if it were new enough"
    ):
        backend = AscendBackend(device="cpu")
    assert backend.cann_version is None
    assert (
        backend.supports("rms_norm", x=Operand("bfloat16", (4, 32)), weight=None, eps=1e-6).by == "cann: npu_rms_norm"
    )


def test_torch_npu_itself_says_which_cann_it_is(monkeypatch):
    told = types.SimpleNamespace(
        npu=types.SimpleNamespace(utils=types.SimpleNamespace(get_cann_version=lambda _: "9.1.0"))
    )
    monkeypatch.setitem(sys.modules, "torch_npu", told)
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert probe.cann_version() == "9.1.0"


def test_without_torch_npu():
    with pytest.raises(BackendError, match=r"needs torch-npu, not found here: pip install .*--simulate CHIP"):
        AscendBackend()


def test_with_torch_npu_but_no_cann(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    code = """
from dsv4_backend_ascend.backend import AscendBackend
for options in ({}, {"simulate": "910B"}):
    try:
        AscendBackend(**options)
    except Exception as error:
        print(type(error).__name__, error)
print(AscendBackend(soc="910B").standing)
"""
    roots = ":".join([str(tmp_path), *(path for path in sys.path if path)])
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": roots, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = found.stdout.splitlines()
    assert lines[0].startswith("BackendError backend 'ascend': torch-npu is installed and does not import: libhccl.so")
    assert "set_env.sh" in lines[0]
    assert "simulated CANN does not load beside it" in lines[1]
    assert lines[2] == "planned"


@pytest.mark.parametrize(
    ("soc", "generation"),
    [("Ascend910B3", "910B"), ("Ascend910_9362", "910C"), ("Ascend950PR", "950"), ("Ascend910_95", "950")],
)
def test_soc_names(soc, generation):
    assert probe.generation_of(soc) == generation


def test_unknown_soc_is_named():
    with pytest.raises(BackendError, match=r"SoC 'Ascend310P3' is none that the capability table covers"):
        probe.generation_of("Ascend310P3")
    with pytest.raises(BackendError, match=r"soc '910' is not one of 910B, 910C, 950"):
        AscendBackend(soc="910")


def test_a_missing_op_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(probe, "drift", lambda: {"rms_norm": "npu::npu_rms_norm is missing in the installed torch-npu"})
    with pytest.warns(UserWarning, match="npu::npu_rms_norm is missing in the installed torch-npu"):
        backend = AscendBackend(simulate="910B")
    answer = backend.supports("rms_norm", x=Operand("bfloat16", (4, 32)), weight=None, eps=1e-6)
    assert answer.by == "composed: npu::npu_rms_norm is missing in the installed torch-npu"
    backend.rms_norm(torch.ones(2, 32).bfloat16(), None, eps=1e-6)


def test_no_drift_in_the_simulator():
    AscendBackend(simulate="910B")
    assert probe.drift() == {}


def test_cann_version_is_read_from_the_installation(tmp_path, monkeypatch):
    folder = tmp_path / "arm64-linux"
    folder.mkdir()
    (folder / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert probe.cann_version() == "8.5.0"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(Path(tmp_path) / "nowhere"))
    assert probe.cann_version() is None


def test_leaving_activations_unquantised_is_declared_and_nothing_is_claimed_of_it(embedded_logits):
    ids, logits = embedded_logits
    backend = AscendBackend(simulate="910B", activations="bf16")
    assert backend.claims_level is None
    assert "activations of linear layers with FP8 or FP4 weights are not quantised" in backend.describe()
    got = run(Model(Checkpoint(embedded()), backend), ids, 3)
    assert distance(got, logits["float32"]) < 0.8 * distance(logits["native"], logits["float32"])
    arguments = ["-b", "ascend", "-O", "simulate=910B", "-O", "activations=bf16", "-q"]
    done = CliRunner().invoke(run_command, [*arguments, "--op", "linear", "--op", "rms_norm"])
    assert done.exit_code == 0, done.output
    assert "not claimed and failing" in done.output
    assert (
        "departs from the contract by option, and claims nothing of it: linear, expert_linear, ffn, moe:" in done.output
    )
    assert AscendBackend(simulate="910B").claims_level == 3


def test_activations_of_another_form_are_refused():
    with pytest.raises(BackendError, match="activations 'int4' is not one of fp8, bf16"):
        AscendBackend(soc="910B", activations="int4")
    with pytest.raises(BackendError, match="activations 'bf16' is for 910B and 910C; 950 multiplies FP8"):
        AscendBackend(soc="950", activations="bf16")


def test_a_chip_that_is_planned_for_computes_nothing():
    with pytest.raises(BackendError, match=r"soc=910B plans for a chip that is not here.*simulate=910B"):
        AscendBackend(soc="910B", prefer="triton").load(np.zeros((2, 2), np.float32))
