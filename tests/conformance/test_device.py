"""Checks that a backend brings for its own device, and what it says of its proof."""

import pytest
from dsv4_conformance import check as checks
from dsv4_conformance.museum.hunt import right_backend
from dsv4_conformance.run import device, runner

from dsv4_core.contract.backend import DeviceCheck


def broken():
    raise RuntimeError("EZ9999: inner error")


class Vendor(right_backend()):
    """Brings three checks, and has a kernel for hadamard."""

    def device_checks(self):
        found = {"right": lambda: "", "wrong": lambda: "result 0[3]: 1, want 2", "raises": broken, "long": lambda: ""}
        return [
            DeviceCheck("hadamard", case, "full" if case == "long" else "smoke", run) for case, run in found.items()
        ]

    def hadamard(self, x):
        self.last = ("fast_hadamard",)
        return super().hadamard(x)

    def kernels_ran(self):
        ran, self.last = getattr(self, "last", ()), ()
        return ran

    def proof(self, ran):
        return {"hadamard": "measured" if ran.get("fast_hadamard") else "compiled", "rms_norm": "compiled"}


def run(tier="smoke", **selection):
    return runner.run(checks.Session(Vendor(), tier), **selection)


def test_what_a_backend_finds_wrong_fails_the_run():
    result = run(cases=["device/hadamard/right", "device/hadamard/wrong", "device/hadamard/raises"])
    assert {f.id.rpartition("/")[2]: f.status for f in result.findings} == {
        "right": "passed",
        "wrong": "failed",
        "raises": "error",
    }
    assert result.findings[1].message == "result 0[3]: 1, want 2"
    assert "EZ9999: inner error" in result.findings[2].message
    assert not result.ok


def test_they_belong_to_their_op_and_tier():
    assert {f.id for f in run(ops=["hadamard"]).findings if f.group == "device"} == {
        f"device/hadamard/{case}" for case in ("right", "wrong", "raises")
    }
    assert "device/hadamard/long" in {c.id for c in device.checks(Vendor())}
    assert {c.level for c in device.checks(Vendor())} == {1}


def test_reports_name_the_kernels_that_ran():
    findings = runner.to_json(run(ops=["hadamard", "rms_norm"]))["findings"]
    ran = {f["op"]: f.get("ran") for f in findings if f["group"] == "op"}
    assert ran == {"hadamard": "fast_hadamard", "rms_norm": None}


def test_a_selection_or_a_run_that_falls_short_proves_no_kernel():
    result = run(ops=["hadamard"])
    assert result.proof == {"hadamard": "compiled", "rms_norm": "compiled"}
    assert "proof: 2 of 2 implementations compiled" in result.summary()


@pytest.mark.parametrize(
    ("level", "status", "proven"), [(3, "passed", True), (2, "passed", False), (3, "failed", False)]
)
def test_a_whole_run_proves_what_passed(monkeypatch, level, status, proven):
    result = runner.Run("vendor", "smoke", "native")
    result.findings = [checks.Finding("a", "hadamard", "op", 0, status, ran="fast_hadamard slow")]
    monkeypatch.setattr(runner.Run, "level", level)
    monkeypatch.setattr(runner.Run, "ok", True)
    assert runner.passing(result).get("fast_hadamard", False) is proven


def test_departures_are_not_claimed_and_are_said():
    backend = Vendor()
    backend.departures = {"hadamard": "left out"}
    result = runner.run(
        checks.Session(backend, "smoke"), ops=["hadamard"]
    )  # a case that is named counts, claimed or not
    wrong = next(f for f in result.findings if f.id == "device/hadamard/wrong")
    assert result.ok
    assert wrong.status == "failed"
    assert not wrong.claimed
    assert "departs from the contract by option, and claims nothing of it: hadamard: left out" in result.summary()
