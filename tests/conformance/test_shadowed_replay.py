"""The shadowed run of recorded steps: it judges what a replay made, not what was recorded."""

import numpy as np
from dsv4_conformance.check import Session
from dsv4_conformance.model.replayed import Replayed
from dsv4_conformance.museum.hunt import right_backend

Reference = right_backend()


class Captured(Reference):
    """Repeats a function as a device does: into buffers of its own, and arrays that it gave before.

    NumPy cannot repeat what it did, so the function runs again; its results are copied into those
    of the first run, whose places the caller has noted.
    """

    replays = 0

    def record(self, function):
        buffers, given = [], []

        def run(*hosts):
            if given:
                type(self).replays += 1
                self.replaying = True
            buffers[:] = [host.copy() for host in hosts]
            made = function(*buffers)
            self.replaying = False
            given[:] = made
            return tuple(given)

        return run


class OtherNorm(Captured):
    """Its replayed norms round twice."""

    replaying = False

    def rms_norm(self, x, weight, *, eps):
        y = super().rms_norm(x, weight, eps=eps)
        return (y.astype(np.float32) * np.float32(1.01)).astype(y.dtype) if self.replaying else y


def test_right_backends_pass():
    for backend in (Reference, Captured):
        finding = Replayed().run(Session(backend(), "standard"))
        assert finding.status == "passed", finding.message
        assert finding.metrics["calls"] > 500
    assert Captured.replays == 3


def test_a_fault_of_replays_alone_is_found():
    finding = Replayed().run(Session(OtherNorm(), "standard"))
    assert finding.status == "failed"
    assert "step3.layer0.rms_norm" in finding.message
    assert "step1" not in finding.message
    assert "step2" not in finding.message
