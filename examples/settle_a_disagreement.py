"""Two backends disagree: find the first op, layer and position that is wrong, and which of the two
is.

The second backend here is the reference with one fault: its SwiGLU forgets the clamp of the gate.

    python examples/settle_a_disagreement.py
"""

import numpy as np
from dsv4_conformance.check import Session
from dsv4_conformance.model.localise import judge_all, report
from dsv4_conformance.model.record import Recorder, record

from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.contract.registry import backend_class


class Faulty(backend_class("reference")):
    """The reference, but for one op."""

    name = "faulty"

    def swiglu(self, gate, up, weights, *, limit):
        return super().swiglu(gate, up, weights, limit=limit / 4)


def main():
    checkpoint = Checkpoint(embedded())
    tokens = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (1, 8))
    right = Session(backend_class("reference")())
    recorder = Recorder(right.backend, lambda *_: True)
    calls = record(checkpoint, recorder, tokens, decode=1)
    judged = judge_all(calls, right, Session(Faulty()))
    print("\n".join(report(judged, ("reference", "faulty"))))


if __name__ == "__main__":
    main()
