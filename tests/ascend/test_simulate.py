"""Simulated CANN: real schemas, agreement of kernels and shape functions, the documents'
refusals.
"""

import subprocess
import sys

import pytest
import torch
from dsv4_backend_ascend import simulate
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann import call as call_module
from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_backend_ascend.constraints import RULES
from dsv4_backend_ascend.formats import ND, NZ, format_of
from dsv4_backend_ascend.schema import bind, incompatible, overload, schemas, snapshots
from dsv4_backend_ascend.selftest_cases import CASES
from dsv4_backend_ascend.simulate import format_cast
from dsv4_backend_ascend.simulate.samples import VIOLATIONS, samples

from dsv4_core.contract.ops import OPS


def _op(name):
    return overload(name)


def _all_samples():
    torch.manual_seed(0)
    return [(generation, i, sample) for generation in GENERATIONS for i, sample in enumerate(samples(generation))]


def test_every_called_op_has_schema_kernel_shapes_and_rules():
    assert set(table().ops) == set(schemas()) == set(simulate.KERNELS) == set(simulate.SHAPES) == set(RULES)


def test_registered_schemas_are_the_wheels():
    simulate.install("910B")
    printed = {op: str(torch._C.parse_schema(schema)) for op, schema in schemas().items()}
    assert {op: str(_op(op)._schema) for op in schemas()} == printed


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_cell_of_the_table_has_a_sample(generation):
    named = {call.name for call in table().calls if any(generation in cell.generations for cell in call.cells)}
    assert named == {sample.call for sample in samples(generation)}


def _in_rows(sample):
    """Operands of a private format cannot be copied, which opcheck does."""
    return all(format_of(t) == ND for t in sample.arguments.get("weight", ()) if isinstance(t, torch.Tensor))


def test_a_call_on_tiles_has_the_shape_that_is_foretold():
    simulate.install("950")
    (sample,) = [s for s in samples("950") if not _in_rows(s)]
    (got,), (foretold,) = (
        f(bind(sample.op, (), sample.arguments)) for f in (simulate.KERNELS[sample.op], simulate.SHAPES[sample.op])
    )
    assert (got.shape, got.dtype) == (foretold.shape, foretold.dtype)
    assert bool(got.isfinite().all())


@pytest.mark.parametrize(
    ("generation", "sample"), [pytest.param(g, s, id=f"{g}-{i}-{s.call}") for g, i, s in _all_samples() if _in_rows(s)]
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


def test_tiles_hold_the_same_values_in_another_order():
    rows = torch.arange(2 * 64 * 96).reshape(2, 64, 96).to(torch.uint8)
    tiles = format_cast.to_tiles(rows)
    assert not torch.equal(tiles, rows)
    assert torch.equal(format_cast.from_tiles(tiles), rows)
    for r, c in ((0, 31), (17, 32), (63, 95)):  # tile columns outermost, then tile rows, rows, bytes
        place = ((c // 32) * 4 + r // 16) * 512 + (r % 16) * 32 + c % 32
        assert int(tiles[1].flatten()[place]) == int(rows[1, r, c])
    simulate.install("950")
    cast = torch.ops.npu.npu_format_cast(rows, NZ, customize_dtype=24, input_dtype=296)
    assert format_of(cast.transpose(1, 2)) == NZ
    assert format_of(rows) == ND


@pytest.mark.parametrize("wheel", snapshots(), ids=lambda s: s.wheel)
def test_every_wheel_takes_the_calls_but_those_it_lacks(wheel):
    """Older wheels spell arguments that are not passed in another way; what they truly lack is a
    hash table for the gate.
    """
    lacking = {
        call.name: problem
        for call in table().calls
        if call.tier == "cann" and (problem := incompatible(wheel.schemas[call.op], schemas()[call.op], call.passes))
    }
    old = "2.13" not in wheel.wheel
    assert lacking == ({"gating_hash": "has no argument 'input_ids', which is passed"} if old else {})
    changed = {op for op, schema in wheel.schemas.items() if schema != schemas()[op]}
    assert changed >= {"npu_mhc_pre", "npu_mhc_post", "npu_sparse_flash_attention", "npu_dynamic_mx_quant"} or not old


F = 'npu::f(Tensor x, Tensor? h=None, *, int k=1, str mode="a") -> (Tensor, Tensor)'


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (F, ""),
        ("npu::f(Tensor x, Tensor h, *, int k=1, float new=0.5) -> (Tensor, Tensor)", ""),
        ("npu::f(Tensor x, *, int k=1) -> (Tensor, Tensor)", "has no argument 'h', which is passed"),
        ("npu::f(Tensor x, Tensor[]? h=None) -> (Tensor, Tensor)", "takes 'h' as List[Tensor]; Tensor is passed"),
        ("npu::f(Tensor x, Tensor? h, Tensor y) -> (Tensor, Tensor)", "asks for an argument 'y', which is not passed"),
        ("npu::f(Tensor x, Tensor? h, *, int k) -> (Tensor, Tensor)", "asks for an argument 'k', which is not passed"),
        ("npu::f(Tensor x, Tensor? h=None) -> Tensor", "gives Tensor; Tensor, Tensor is expected"),
    ],
)
def test_compatible_is_not_equal(found, said):
    assert incompatible(found, F, ("x", "h")) == said


def test_the_table_names_every_argument_that_is_passed(monkeypatch):
    passed = {op: set() for op in table().ops}

    def noting(op, args, kwargs):
        passed[op] |= set(kwargs)
        return bind(op, args, kwargs)

    monkeypatch.setattr(call_module, "bind", noting)
    for generation in GENERATIONS:
        backends = [AscendBackend(soc=generation, tier=tier) for tier in ("cann", "vendor")]
        backends.append(AscendBackend(soc=generation, tier="vendor", gating="fused"))
        for case in (case for case in CASES if not case.gigabytes):
            call = case.call()
            operands = dict(zip(OPS[case.contract].arrays, call.arrays, strict=True)) | call.scalars
            for backend in backends:
                backend.supports(case.contract, **operands)
    assert passed == {
        op: {name for call in table().calls if call.op == op for name in call.passes} for op in table().ops
    }


@pytest.mark.parametrize("call", ["quantise_mx", "matmul_mx", "experts_mx", "mhc_pre", "mhc_sinkhorn", "gating"])
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
