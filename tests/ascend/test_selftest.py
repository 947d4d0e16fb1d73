"""The self-test agrees with a sane chip, and finds every planted vendor bug under its op's name."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_backend_ascend import proof, selftest
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann import moe
from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_backend_ascend.cli import command
from dsv4_backend_ascend.plan import IMPLEMENTATIONS
from dsv4_backend_ascend.selftest_cases import CASES
from dsv4_backend_torch.backend import TorchBackend
from dsv4_conformance.cli.run import run_command
from vendor_bugs import BUGS, faulty

from dsv4_core.contract import registry
from dsv4_core.contract.ops import OPS


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_sane_chip_shows_no_difference(generation):
    outcomes = list(selftest.run(AscendBackend(simulate=generation), small=True))
    assert [o for o in outcomes if o.found] == []
    asked = {o.contract for o in outcomes if not o.skipped}
    composed = ({o.contract for o in outcomes} - asked) & set(IMPLEMENTATIONS["cann"])  # others have kernels of our own
    assert composed == {"gate", "gate_hash"} | (
        {"apply_rope", "index_topk", "cached_index_topk"} if generation == "950" else set()
    )
    reached = {op for outcome in outcomes for op in outcome.ops}
    assert reached == {call.op for call in table().claimed(generation) if call.tier == "cann" and not call.departs}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_with_the_extension_a_sane_chip_shows_no_difference_either(generation):
    cases = [case for case in CASES if case.contract in {"hc_pre", "apply_rope"}]
    outcomes = list(selftest.run(AscendBackend(simulate=generation, tier="vendor"), cases))
    assert [o for o in outcomes if o.found] == []
    reached = {op for outcome in outcomes for op in outcome.ops}
    assert reached >= {"mhc_pre_sinkhorn", "inplace_partial_rotary_mul"}


@pytest.mark.parametrize(("generation", "tier"), [("910B", "vendor"), ("910C", "vendor"), ("950", "cann")])
def test_a_fused_gate_shows_no_difference_where_scores_are_not_low(generation, tier):
    cases = [case for case in CASES if case.contract in {"gate", "gate_hash"}]
    outcomes = list(selftest.run(AscendBackend(simulate=generation, tier=tier, gating="fused"), cases))
    assert [o.found for o in outcomes] == [""] * 3
    assert {op for o in outcomes for op in o.ops} == {moe.GATES[generation]}


@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_is_found_and_its_op_and_tier_named(bug):
    generation, op, contract, fault = BUGS[bug]
    backend = faulty(generation, op)
    cases = [case for case in CASES if case.contract == contract]
    with backend.chip.planted(op, fault):
        found = [o for o in selftest.run(backend, cases, small=True) if o.found]
    assert found, f"{bug} was not found"
    assert all(op in o.ops for o in found)
    assert all(o.found.startswith(f"{backend.tier} tier, result ") for o in found)
    assert not any("composed tier" in o.found for o in found)


def test_expectations_are_the_oracles():
    oracle = registry.oracle("native", {})
    for case in (case for case in CASES if not case.gigabytes):
        call = case.call()
        exact, _ = oracle.evaluate(case.contract, call.yardstick, call.scalars, samples=0, seed=0)
        made = selftest.expectation(case, exact)
        kept = selftest.recorded(case, seed=0)
        assert len(kept) == len(made) / 3
        for i, expected in enumerate(kept):
            assert np.array_equal(expected.value, made[f"{case.id}/{i}"])
            assert np.all(expected.allowed <= 1.001 * made[f"{case.id}/{i}/allowed"])


def test_every_case_has_an_expectation():
    assert [case.id for case in CASES if not selftest.recorded(case, seed=0)] == []
    assert len({case.id for case in CASES}) == len(CASES)


def test_a_fault_that_both_tiers_share_is_found_by_the_expectations(monkeypatch):
    sane = TorchBackend.sparse_attn
    monkeypatch.setattr(
        TorchBackend, "sparse_attn", lambda self, *a, softmax_scale: -sane(self, *a, softmax_scale=softmax_scale)
    )
    case = next(case for case in CASES if case.contract == "sparse_attn")
    backend = AscendBackend(simulate="910B", tier="composed")
    outcome = selftest.compare(backend, case)
    assert outcome.skipped == "tier=composed was asked for"
    assert outcome.found.startswith("composed tier, result 0[")
    assert ", recorded " in outcome.found


def test_other_operands_are_held_against_the_composed_tier_alone():
    case = next(case for case in CASES if case.contract == "rms_norm")
    backend = AscendBackend(simulate="950")
    assert selftest.recorded(case, seed=1) == []
    with backend.chip.planted("npu_rms_norm", lambda kernel: lambda a: tuple(2 * y for y in kernel(a))):
        assert ", composed " in selftest.compare(backend, case, seed=1).found
    assert selftest.compare(backend, case, seed=1).found == ""


def conformance(*arguments):
    return CliRunner().invoke(run_command, ["--backend", "ascend", "-O", "simulate=910B", *arguments])


def test_the_suite_runs_it():
    done = conformance("--op", "combine", "-q")
    assert done.exit_code == 0, done.output
    assert "L0 L1 L2, on hardware: not run" in done.output
    assert "L3" not in done.output  # a selection proves nothing
    with AscendBackend(simulate="910B").chip.planted(*BUGS["one_experts_rows_lost"][1::2]):
        done = conformance("--case", "device/expert_linear/e2m1,empty_expert,other_ranks_rows")
    assert done.exit_code == 1
    assert "npu_grouped_matmul: cann tier, result 0[" in done.output
    listed = conformance("--list").output.splitlines()
    assert "device/sparse_attn/flash,sinks,holes,no_row" in listed
    assert "device/sparse_attn/row=2^21,bytes_past_2^31" not in listed  # needs gigabytes: tier full, or a chip
    assert "device/sparse_attn/row=2^21,bytes_past_2^31" in conformance("--tier", "full", "--list").output


def test_processes_of_their_own_tell_what_ran(tmp_path):
    done = conformance("--op", "combine", "--op", "hadamard", "-q", "--jobs", "2", "--report", str(tmp_path))
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    ran = {finding["id"]: finding.get("ran", "") for finding in report["findings"]}
    assert ran["device/combine/other_ranks_rows"] == "unpermute"
    assert {kernels for check, kernels in ran.items() if check.startswith("hadamard")} == {""}
    assert ("combine: npu_moe_token_unpermute (unpermute)", "L0 L1 L2, on hardware: not run") in report["proof"].items()
    assert "<h2>Proof</h2>" in (tmp_path / "report.html").read_text()


def test_rungs_of_a_run():
    every = {call.name: True for call in table().calls}
    found = proof.of_run("910B", "simulated", every)
    assert {key.partition(":")[0] for key in found} == set(OPS)
    assert found["rms_norm: npu_rms_norm (rms_norm)"] == "L0 L1 L2 L3, on hardware: not run"
    assert found["gate: composed"].endswith("L3, on hardware: not run")
    assert "linear: composed, float8_e4m3fn@128x128, float4_e2m1fn@1x32, bfloat16, float32" in found
    assert all(said.endswith("on hardware: not run") for said in found.values())
    short = proof.of_run("910B", "simulated", every | {"rotary": False})
    assert short["apply_rope: npu_rotary_mul (rotary)"] == "L0 L1 L2, on hardware: not run"
    chip = proof.of_run("950", "found", {"rms_norm": True, "mhc_post": False})
    assert chip["rms_norm: npu_rms_norm (rms_norm)"].endswith("L6, on hardware: passed in this run")
    assert chip["hc_post: npu_mhc_post (mhc_post)"].endswith("on hardware: failed in this run")
    assert chip["swiglu: npu_clipped_swiglu (swiglu)"].endswith("on hardware: not reached in this run")


def test_on_a_chip_the_suite_runs_all_of_it(monkeypatch):
    backend = AscendBackend(simulate="910B")
    monkeypatch.setattr(backend, "standing", "found")
    assert {check.tier for check in backend.device_checks()} == {"standard"}
    assert AscendBackend(soc="910B").device_checks() == ()


def test_there_are_enough_bugs():
    assert len(BUGS) >= 10
    assert {generation for generation, *_ in BUGS.values()} == set(GENERATIONS)


def test_the_command_tells_and_reports(tmp_path):
    report = tmp_path / "selftest.json"
    arguments = ["selftest", "--simulate", "910B", "--small", "--report", str(report)]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    assert "backend ascend, simulated 910B" in done.output
    assert "on hardware, not run, 0 differ" in done.output
    found = json.loads(report.read_text())
    assert found["chip"] == "910B"
    assert {o["contract"] for o in found["outcomes"] if o["ops"]} >= {"sparse_attn", "index_topk", "expert_linear"}


def test_the_command_fails_and_names_the_op():
    _, op, _, fault = BUGS["one_experts_rows_lost"]
    with AscendBackend(simulate="910B").chip.planted(op, fault):
        done = CliRunner().invoke(command, ["selftest", "--simulate", "910B", "--small"])
    assert done.exit_code == 1
    lines = [line for line in done.output.splitlines() if "DIFFERS" in line]
    assert lines
    assert all(line.split()[0] == "expert_linear" and "npu_grouped_matmul" in line for line in lines)


def test_a_kernel_that_raises_is_a_difference():
    def raising(_kernel):
        def run(_arguments):
            raise RuntimeError("EZ9999: inner error")

        return run

    backend = AscendBackend(simulate="950")
    with backend.chip.planted("npu_rms_norm", raising):
        found = [o for o in selftest.run(backend, small=True) if o.found]
    assert {o.contract for o in found} == {"rms_norm", "rms_norm_rope", "hc_pre_norm"}  # and what is made of it
    assert "raised EZ9999: inner error" in found[0].found
