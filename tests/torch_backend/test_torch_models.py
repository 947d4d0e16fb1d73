"""The torch backend on the recorded models, and against the reference on batches, chunkings and weight caches."""

import numpy as np
import pytest

pytest.importorskip("torch")

from dsv4_conformance import golden
from recorded import feed, load_model, relative, vectors

from dsv4_core import registry
from dsv4_core.backend import BackendError
from dsv4_core.cache import Cache
from dsv4_core.evaluate import teacher_forced
from dsv4_core.model import Model
from dsv4_core.weights import Checkpoint

LIMIT = {"float64": 3e-6, "float32": 1e-5}


@pytest.mark.parametrize("numerics", ["float64", "float32"])
@pytest.mark.parametrize("chunk", [300, 64])
def test_recorded_logits(recorded, numerics, chunk):
    want = vectors(recorded, "golden")
    got = teacher_forced(load_model(recorded, numerics, "torch"), want["prompt"], prefill=300, chunk=chunk, mtp=True)
    assert relative(got["logits"], want["exact.logits"]) < LIMIT[numerics]
    assert relative(got["mtp_logits"], want["exact.mtp_logits"]) < LIMIT[numerics]
    assert max(relative(got["logits"][:, i], want["exact.logits"][:, i]) for i in range(21)) < 3 * LIMIT[numerics]


def test_native_is_as_near_to_exact_as_the_published_model(recorded):
    want = vectors(recorded, "golden")
    got = teacher_forced(load_model(recorded, "native", "torch"), want["prompt"], prefill=300, mtp=True)
    assert relative(got["logits"], want["exact.logits"]) < 1.5 * relative(
        want["quantized.logits"], want["exact.logits"]
    )


def test_sequences_of_different_lengths_chunked_and_decoded_together():
    logits = {}
    ids = np.random.default_rng(5).integers(0, 500, (3, 170))
    for name in ("reference", "torch"):
        model = load_model("tiny-pro", "float64", name)
        cache = Cache(model.backend, model.config, 3, 256)
        first = feed(model, cache, ids[:, :150], counts=[150, 1, 131])
        rest = [feed(model, cache, ids[:, 150 + i : 151 + i]) for i in range(3)]
        several = feed(model, cache, ids[1:, 160:170], sequences=[1, 2], counts=[10, 4])
        logits[name] = [first[0], first[1, :1], first[2, :131], *rest, several[0], several[1, :4]]
    for got, want in zip(logits["torch"], logits["reference"], strict=True):
        assert relative(got, want) < 1e-11


def test_no_weight_cache_gives_the_same_logits():
    ids = np.arange(40)[None]
    logits = []
    for capacity in (0, 1 << 20, 2 << 30):  # nothing kept, some of it, all
        backend = registry.create("torch", numerics="float32", weight_cache=capacity)
        model = Model(Checkpoint(golden.checkpoint_path("tiny-flash")), backend)
        logits.append(feed(model, Cache(backend, model.config, 1, 64), ids))
        assert backend.weights.nbytes <= capacity
    assert relative(logits[0], logits[2]) < 1e-5
    assert relative(logits[1], logits[2]) < 1e-5


def test_a_device_that_is_not_there():
    with pytest.raises(BackendError, match=r"device 'nosuch' cannot be used by torch"):
        registry.create("torch", device="nosuch")
