"""Simulated CANN: real schemas, agreement of kernels and shape functions, the documents' refusals."""

import subprocess
import sys

import pytest
import torch
from dsv4_backend_ascend import simulate
from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_backend_ascend.constraints import RULES
from dsv4_backend_ascend.schema import schemas
from dsv4_backend_ascend.simulate.samples import VIOLATIONS, samples


def _op(name):
    return getattr(torch.ops.npu, name).default


def _all_samples():
    torch.manual_seed(0)
    return [(generation, i, sample) for generation in GENERATIONS for i, sample in enumerate(samples(generation))]


def test_every_called_op_has_schema_kernel_shapes_and_rules():
    assert set(table().ops) == set(schemas()) == set(simulate.KERNELS) == set(simulate.SHAPES) == set(RULES)


def test_registered_schemas_are_the_wheels():
    simulate.install("910B")
    assert {op: str(_op(op)._schema) for op in schemas()} == schemas()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_cell_of_the_table_has_a_sample(generation):
    named = {call.name for call in table().calls if any(generation in cell.generations for cell in call.cells)}
    assert named == {sample.call for sample in samples(generation)}


@pytest.mark.parametrize(
    ("generation", "sample"), [pytest.param(g, s, id=f"{g}-{i}-{s.call}") for g, i, s in _all_samples()]
)
def test_opcheck(generation, sample, monkeypatch):
    allclose = torch.allclose  # has no kernel for E4M3, and opcheck compares operands before and after with it
    monkeypatch.setattr(
        torch,
        "allclose",
        lambda a, b, **kw: (
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            if a.dtype == torch.float8_e4m3fn
            else allclose(a, b, **kw)
        ),
    )
    chip = simulate.install(generation)
    before = chip.calls[sample.op]
    torch.library.opcheck(_op(sample.op), (), sample.arguments, test_utils=("test_schema", "test_faketensor"))
    assert chip.calls[sample.op] > before


@pytest.mark.parametrize("violation", VIOLATIONS, ids=[f"{i}-{v.call}" for i, v in enumerate(VIOLATIONS)])
def test_undocumented_calls_are_refused(violation):
    generation = next(g for g in GENERATIONS if violation.call in {s.call for s in samples(g)})
    simulate.install(generation)
    for sample in (s for s in samples(generation) if s.call == violation.call):
        _op(sample.op)(**sample.arguments)
        with pytest.raises(simulate.CannError, match=violation.word):
            _op(sample.op)(**violation.change(sample.arguments))


@pytest.mark.parametrize("call", ["quantise_mx", "matmul_mx", "experts_mx", "mhc_pre", "mhc_sinkhorn", "mhc_post"])
def test_what_950_alone_computes_is_refused_elsewhere(call):
    sample = next(s for s in samples("950") if s.call == call)
    simulate.install("910C")
    with pytest.raises(simulate.CannError, match="950 only"):
        _op(sample.op)(**sample.arguments)


def test_the_dispatcher_refuses_unknown_arguments():
    simulate.install("910B")
    with pytest.raises(RuntimeError, match=r"unknown|Unknown|unexpected"):
        torch.ops.npu.npu_rms_norm(torch.ones(2, 4), torch.ones(4), eps=1e-6)


def test_a_planted_fault_runs_instead_and_is_gone_afterwards():
    chip = simulate.install("910B")
    arguments = {"input": torch.ones(2, 4), "gamma": torch.ones(4)}
    sane = torch.ops.npu.npu_rms_norm(**arguments)[0]
    with chip.planted("npu_rms_norm", lambda kernel: lambda a: tuple(2 * y for y in kernel(a))):
        assert torch.equal(torch.ops.npu.npu_rms_norm(**arguments)[0], 2 * sane)
    assert torch.equal(torch.ops.npu.npu_rms_norm(**arguments)[0], sane)


def test_unknown_generation_is_named():
    with pytest.raises(ValueError, match="'910A' is not one of 910B, 910C, 950"):
        simulate.install("910A")


def test_it_does_not_load_beside_torch_npu(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    code = "from dsv4_backend_ascend import simulate\nsimulate.install('910B')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{_source_roots()}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "RuntimeError: torch-npu is installed: simulated CANN does not load beside it" in run.stderr


def _source_roots():
    return ":".join(path for path in sys.path if path)
