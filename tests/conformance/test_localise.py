"""Localising: faults of the museum, planted in one layer of the embedded model, are named with their op and layer."""

import functools
import re

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import vectors
from dsv4_conformance import golden, localise, replay, runner, trace_file
from dsv4_conformance.checks import Session
from dsv4_conformance.museum import hunt
from dsv4_conformance.record import Recorder, record

from dsv4_core.weights import Checkpoint

CHECKPOINT = Checkpoint(golden.checkpoint_path("tiny-jargon"))
TOKENS, DECODE = 68, 2  # past a window of 64, so that the ring wraps


def planted(mutant, place):
    """A backend with a mutant's fault in it while one layer runs, and right elsewhere."""
    right = hunt.right_backend()
    wrong = hunt.MUTANTS[mutant].build(right)

    def either(name):
        @functools.wraps(getattr(right, name))
        def method(self, *operands, **scalars):
            return getattr(wrong if self.recorder.place == place else right, name)(self, *operands, **scalars)

        return method

    names = [n for n, value in vars(wrong).items() if callable(value)]
    return type("Planted", (right,), {n: either(n) for n in names})(numerics="native")


def run(backend, *, tokens=TOKENS, keep=lambda time, place: True):
    recorder = backend.recorder = Recorder(backend, keep)
    return record(CHECKPOINT, recorder, vectors("tiny-jargon", "golden")["prompt"][:1, :tokens], DECODE)


def first_over(calls, session):
    judged = localise.judge_all(calls, session)
    return judged, next((j for j in judged if not j.ok), None)


PLANTED = {  # mutant: layer, ops any of which names it
    "sink_missing": (1, {"sparse_attn"}),
    "half_split_rope": (3, {"apply_rope"}),
    "unweighted_q_norm_missing": (2, {"rms_norm"}),
    "overlap_halves_swapped": (4, {"compress"}),
    "indexer_relu_missing": (2, {"index_scores"}),
    "scale_rounded_down": (5, {"act_qdq", "linear", "expert_linear"}),
    "hadamard_not_normalised": (4, {"hadamard"}),
    "clamp_missing_shared": (0, {"swiglu"}),
    "routing_weight_after_w2": (3, {"moe"}),
    "weights_not_scaled": (1, {"gate"}),
    "hash_table_ignored": (0, {"gate_hash"}),
    "last_expert_dropped": (5, {"expert_linear", "combine"}),
    "comb_not_transposed": (2, {"hc_post"}),
    "sinkhorn_one_iteration_short": (4, {"hc_split_sinkhorn"}),
    "ring_wrap_wrong": (1, {"cache_write"}),
    "wo_a_quantised": (2, {"grouped_linear"}),
    "truncated_norm": (3, {"rms_norm"}),
}


@pytest.mark.parametrize("mutant", PLANTED)
def test_a_fault_in_one_layer_is_named_with_op_and_layer(mutant):
    layer, ops = PLANTED[mutant]
    backend = planted(mutant, f"layer{layer}")
    calls = run(backend, keep=lambda _, place: place in {f"layer{layer}", f"layer{(layer + 1) % 6}"})
    _, first = first_over(calls, Session(backend))
    assert first is not None, "nothing is over budget"
    assert (first.recorded.place, first.recorded.call.op in ops) == (f"layer{layer}", True), first.recorded.name
