"""What is generated from reports is fresh, and claims no rung that no report has."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "backends" / "ascend" / "tools"))

import collect  # noqa: E402
from dsv4_backend_ascend.capability import GENERATIONS  # noqa: E402


def test_the_proofs_are_those_of_the_reports():
    assert collect.PROOF.read_text() == collect.proof_text()


def test_the_page_is_fresh():
    assert collect.PAGE.read_text() == collect.page()


def test_without_reports_nothing_is_proven_but_the_schema(monkeypatch):
    monkeypatch.setattr(collect, "read", lambda _name: {})
    found = collect.proofs()
    assert found["composed"] == {generation: [] for generation in GENERATIONS}
    assert {rung for calls in found["cann"].values() for rungs in calls.values() for rung in rungs} == {"L0"}
