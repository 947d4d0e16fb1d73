"""The self-test agrees with a sane chip, and finds every planted vendor bug under its op's name."""

import json

import pytest
from click.testing import CliRunner
from dsv4_backend_ascend import selftest
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.capability import GENERATIONS
from dsv4_backend_ascend.cli import command
from vendor_bugs import BUGS, ROW_LIMIT

SMALL = {"high_rows": ROW_LIMIT + 512, "high_keys": 128 * 120}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_sane_chip_shows_no_difference(generation):
    outcomes = list(selftest.run(AscendBackend(simulate=generation), **SMALL))
    assert [o for o in outcomes if o.found] == []
    asked = {o.contract for o in outcomes if not o.skipped}
    skipped = {o.contract for o in outcomes if o.skipped} - asked
    assert skipped == ({"apply_rope", "index_topk"} if generation == "950" else {"linear", "hc_pre", "hc_post"})


@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_is_found_and_its_op_named(bug, monkeypatch):
    generation, op, contract, fault = BUGS[bug]
    every = selftest.cases
    monkeypatch.setattr(selftest, "cases", lambda *a, **k: (c for c in every(*a, **k) if c.contract == contract))
    backend = AscendBackend(simulate=generation)
    with backend.chip.planted(op, fault):
        found = [o for o in selftest.run(backend, **SMALL) if o.found]
    assert found, f"{bug} was not found"
    assert all(o.contract == contract and op in o.ops for o in found)


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
    (line,) = [line for line in done.output.splitlines() if "DIFFERS" in line]
    assert line.split()[0] == "expert_linear"
    assert "npu_grouped_matmul" in line


def test_a_kernel_that_raises_is_a_difference():
    def raising(_kernel):
        def run(_arguments):
            raise RuntimeError("EZ9999: inner error")

        return run

    backend = AscendBackend(simulate="950")
    with backend.chip.planted("npu_rms_norm", raising):
        found = [o for o in selftest.run(backend, **SMALL) if o.found]
    assert {o.contract for o in found} == {"rms_norm"}
    assert "raised EZ9999: inner error" in found[0].found
