"""What is generated from reports is fresh, and claims no rung that no report has."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "backends" / "ascend" / "tools"))

import collect  # noqa: E402
import pytest  # noqa: E402
from dsv4_backend_ascend.capability import GENERATIONS, table  # noqa: E402
from dsv4_backend_ascend.schema import snapshots  # noqa: E402
from vendor_bugs import BUGS  # noqa: E402


def test_the_proofs_are_those_of_the_reports():
    assert collect.PROOF.read_text() == collect.proof_text()


def test_the_page_is_fresh():
    assert collect.PAGE.read_text() == collect.page()


def test_without_reports_nothing_is_proven_but_the_schema(monkeypatch):
    monkeypatch.setattr(collect, "read", lambda _name: {})
    found = collect.proofs()
    assert found["composed"] == {generation: [] for generation in GENERATIONS}
    assert {rung for calls in found["cann"].values() for rungs in calls.values() for rung in rungs} == {"L0"}


def report(**changes):
    findings = [
        {"ran": "rms_norm rotary", "status": "passed", "claimed": True},
        {"ran": "rotary", "status": "failed", "claimed": True},
        {"ran": "swiglu", "status": "failed", "claimed": False},
        {"status": "passed", "claimed": True},
    ]
    return {"ok": True, "partial": False, "level": 3, "findings": findings} | changes


def test_a_call_is_proven_by_the_checks_that_ran_it():
    assert collect.passed(report()) == {"rms_norm": True, "rotary": False, "swiglu": True}
    for short in ({"ok": False}, {"partial": True}, {"level": 2}, {"level": None}):
        assert collect.passed(report(**short)) == {}
    assert collect.passed({}) == {}


def test_every_planted_bug_is_reported_as_found():
    bugs = collect.read(collect.REPORTS / "planted.json")["bugs"]
    assert list(bugs) == list(BUGS)
    assert all(bug["named"] for bug in bugs.values())


@pytest.mark.parametrize("wheel", [s.wheel.rpartition(" ")[2] for s in snapshots()])
def test_every_wheel_was_compared_by_todays_calls(wheel):
    l1 = collect.read(collect.REPORTS / "l1" / f"{wheel}.json")
    assert l1["versions"]["torch-npu"] == wheel
    assert l1["ops"] == sorted(table().ops)


@pytest.mark.parametrize("wheel", [s.wheel.rpartition(" ")[2] for s in snapshots()])
def test_whole_models_ran_on_every_wheels_fake_tensors(wheel):
    l2 = collect.read(collect.REPORTS / "l2" / f"{wheel}.json")
    assert l2["versions"]["torch-npu"] == wheel
    runs = [run for pair in l2["runs"].values() for run in pair]
    assert len(runs) > 20
    assert not any(run["with an operand in host memory"] or run["without an NPU kernel"] for run in runs)


def test_the_self_test_was_run_at_full_sizes_without_an_npu():
    for chip in GENERATIONS:
        done = collect.read(collect.REPORTS / f"selftest-{chip}.json")
        assert done["standing"] == "simulated"
        assert [o for o in done["outcomes"] if o["found"]] == []
        high = {o["contract"] for o in done["outcomes"] if "past_2^31" in o["case"] and not o["skipped"]}
        assert high == ({"sparse_attn"} if chip == "950" else {"sparse_attn", "index_topk"})
        ran = {op for o in done["outcomes"] for op in o["ops"]}
        assert ran == {call.op for call in table().claimed(chip) if call.tier == "cann" and not call.departs}
