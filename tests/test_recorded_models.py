"""Structure: the published model's own logits, in the exact modes."""

import numpy as np
import pytest
from recorded import feed, load_model, relative, vectors

from dsv4_core.graph.cache import Cache
from dsv4_core.graph.evaluate import teacher_forced

LIMIT = {"float64": 3e-6, "float32": 1e-5}  # the vectors are float32 and were made with another frequency table: 5e-7


@pytest.mark.parametrize("numerics", ["float64", "float32"])
def test_logits_and_mtp_logits(recorded, numerics):
    want = vectors(recorded, "golden")
    got = teacher_forced(load_model(recorded, numerics), want["prompt"], prefill=300, mtp=True)
    assert got["logits"].dtype == numerics
    assert relative(got["logits"], want["exact.logits"]) < LIMIT[numerics]
    assert relative(got["mtp_logits"], want["exact.mtp_logits"]) < LIMIT[numerics]
    worst = max(relative(got["logits"][:, i], want["exact.logits"][:, i]) for i in range(21))
    assert worst < 3 * LIMIT[numerics]  # a single bad decode step cannot hide in the mean


@pytest.mark.parametrize("chunk", [1, 3, 64, 127])
def test_any_chunking(recorded, chunk):
    want = vectors(recorded, "golden")
    got = teacher_forced(load_model(recorded, "float64"), want["prompt"], prefill=300, chunk=chunk, mtp=True)
    assert relative(got["logits"], want["exact.logits"]) < LIMIT["float64"]
    assert relative(got["mtp_logits"], want["exact.mtp_logits"]) < LIMIT["float64"]


def test_batched_with_a_sequence_of_another_length(recorded):
    model, want = load_model(recorded, "float64"), vectors(recorded, "golden")
    prompt = want["prompt"]
    cache = Cache(model.backend, model.config, 2, 320)
    padded = prompt[:, :300].copy()
    first = feed(model, cache, padded, counts=[300, 41])
    logits = [first[0, 299]]
    for i in range(20):  # the other sequence stands at 41 + i
        ids = np.array([[prompt[0, 300 + i]], [prompt[1, 41 + i]]])
        logits.append(feed(model, cache, ids)[0, 0])
    assert relative(np.array(logits), want["exact.logits"][0]) < LIMIT["float64"]
    alone = Cache(model.backend, model.config, 1, 320)
    other = feed(model, alone, prompt[1:, :61])[0]
    assert relative(first[1, 40], other[40]) < 1e-12


def test_native_logits_are_nearer_to_exact_than_random(recorded):
    """Two native implementations differ by 20 % on random weights; a gross error (a wrong scale) is
    far outside that.
    """
    want = vectors(recorded, "golden")
    got = teacher_forced(load_model(recorded, "native"), want["prompt"], prefill=300, mtp=True)
    theirs = relative(want["quantized.logits"], want["exact.logits"])
    assert relative(got["logits"], want["exact.logits"]) < 1.5 * theirs
