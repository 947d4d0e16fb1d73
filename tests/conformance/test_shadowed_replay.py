"""The shadowed run of recorded steps: it judges what a replay made, not what was recorded."""

import numpy as np
from dsv4_conformance.check import Session
from dsv4_conformance.exchange.replay import judge_recorded
from dsv4_conformance.model.replayed import Replayed
from dsv4_conformance.museum.hunt import right_backend
from dsv4_conformance.verdict.budget import expect
from dsv4_conformance.verdict.calls import Call

from dsv4_core.contract.registry import create

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


def test_no_deviation_in_few_samples_is_chance_in_float64():
    """A result that is nearer to the exact one than the oracle's, 403 times over a budget of four
    samples: the deviations of float64 are whole units, and now and then all of them are 0.
    """
    y, post = np.array([[-1.4258910516865497]]), np.array([[1.4071087201380634]])
    h = np.array([2.691827040265935, 2.081891813337309, 2.193902699529094, 1.1354741976600922]).reshape(1, 4, 1)
    comb = np.array([0.30199440659430427, 0.30601982220136037, 0.10469952910392978, 0.2872852421004056])
    operands = [y, h, post, comb.reshape(1, 4, 1)]
    session = Session(create("reference", numerics="float64"), "smoke")
    exact = np.array([[[-0.0004613012413338477]]])
    with np.errstate(all="ignore"):
        first = [
            expect(Call("hc_post", operands, {}, seed=seed), session.oracle, session.backend, 4) for seed in range(200)
        ]
    assert any(each[0].spread == 0 for each in first)
    assert all(judge_recorded(Call("hc_post", operands, {}, seed=seed), [exact], session, 4).ok for seed in range(200))
