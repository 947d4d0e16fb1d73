"""What happens before the first op: devices of ranks, float32 products, HCCL's settings, modes that
a chip lacks.
"""

import types

import pytest
import torch
from dsv4_backend_ascend import probe
from dsv4_backend_ascend.backend import AscendBackend

from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.contract.backend import BackendError
from dsv4_core.planning.support import planned_calls


@pytest.fixture
def npu(monkeypatch):
    """torch.npu as ``prepare`` sees it; what is done to it is noted in order."""
    done = []
    matmul = types.SimpleNamespace(allow_hf32=True)
    module = types.SimpleNamespace(set_device=lambda i: done.append(f"set_device {i}"), matmul=matmul, done=done)
    monkeypatch.setattr(torch, "npu", module, raising=False)
    monkeypatch.setattr(probe, "extension", lambda: done.append("extension") or "")
    return module


@pytest.fixture
def chip(npu, monkeypatch):
    """A 910B that answers, whose tensors are on the CPU."""
    monkeypatch.setattr(probe, "import_torch_npu", lambda: None)
    monkeypatch.setattr(probe, "npus", lambda: ["Ascend910B3"])
    monkeypatch.setattr(probe, "cann_version", lambda: "9.1.0")
    monkeypatch.setattr(probe, "drift", dict)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return npu


def test_a_rank_takes_its_device_before_anything_opens_one(npu):
    probe.prepare("npu:3")
    assert npu.done == ["set_device 3", "extension"]


def test_a_device_without_a_number_is_left_to_torch(npu):
    probe.prepare("npu")
    assert npu.done == ["extension"]


def test_ranks_that_name_no_device_take_that_of_their_local_rank(chip, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(BackendError, match="'npu:5'"):  # no torch-npu here: it gets no further
        AscendBackend()
    assert chip.done[0] == "set_device 5"


def test_a_process_group_comes_after_the_device(chip, monkeypatch):
    from dsv4_backend_torch import process_group

    def joined(_, backend, where):
        del backend
        chip.done.append(f"group of {where}")

    monkeypatch.setattr(process_group.TorchProcessGroup, "__init__", joined)
    monkeypatch.setattr(AscendBackend, "_find_chip", _on_cpu(AscendBackend._find_chip))
    AscendBackend(device="npu:2").process_group("these ranks")
    assert chip.done == ["set_device 2", "extension", "group of these ranks"]


def _on_cpu(find):
    def found(self, chosen):
        standing = find(self, chosen)
        chosen["device"] = "cpu"
        return standing

    return found


def test_float32_products_are_in_float32(npu):
    probe.prepare("npu")
    assert npu.matmul.allow_hf32 is False


def test_a_device_that_cannot_be_opened_is_named(npu):
    def refuse(_):
        raise RuntimeError("aclrtSetDevice failed\nmore")

    npu.set_device = refuse
    with pytest.raises(BackendError, match=r"'npu:9' cannot be opened: aclrtSetDevice failed; npu-smi info"):
        probe.prepare("npu:9")


def test_float64_has_no_kernels_on_a_chip(chip):
    with pytest.raises(
        BackendError, match="'float64' has no kernels on an NPU; 'float32' runs there, and float64 on a CPU"
    ):
        AscendBackend(numerics="float64")


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("HCCL_BUFFSIZE", None, ""), ("HCCL_BUFFSIZE", "512", ""), ("HCCL_BUFFSIZE", "1GB", "a whole number"),
        ("HCCL_CONNECT_TIMEOUT", "long", "a whole number"), ("HCCL_OP_EXPANSION_MODE", "AIV", ""),
        ("HCCL_OP_EXPANSION_MODE", "aiv", "AIV, AI_CPU, HOST or HOST_TS"), ("HCCL_IF_IP", "10.0.0.1", ""),
    ],
)  # fmt: skip
def test_doctor_reads_what_hccl_reads(monkeypatch, name, value, wrong):
    for known in probe.HCCL:
        monkeypatch.delenv(known, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    lines = {line.found.partition("=")[0].partition(" ")[0]: line for line in probe._hccl()}
    assert set(lines) == set(probe.HCCL)
    assert (f"={value}" in lines[name].found) == (value is not None)
    assert lines[name].advice.startswith(wrong) if wrong else not lines[name].advice


@pytest.mark.parametrize(("rows", "packs"), [("bf16", False), ("packed", True)])
def test_cache_rows_are_stored_as_asked(rows, packs):
    assert AscendBackend(soc="910B", rows=rows).packs_rows == packs


def test_a_plan_without_an_npu_is_of_the_rows_that_are_stored():
    calls = planned_calls(Checkpoint(embedded()).config, AscendBackend(soc="910B"), "e2m1")
    assert {call.operands["cache"].dtype for call in calls if call.op == "cache_write"} == {"bfloat16", "float32"}


def test_cache_rows_of_another_kind_are_refused():
    with pytest.raises(BackendError, match="rows 'fp8' is not one of bf16, packed"):
        AscendBackend(soc="910B", rows="fp8")
