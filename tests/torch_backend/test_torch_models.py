"""The torch backend on the recorded models, and against the reference on batches, chunkings and
weight caches.
"""

import re

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from click.testing import CliRunner
from dsv4_backend_torch import TorchBackend
from dsv4_conformance import check as checks
from dsv4_conformance.laws import invariance
from dsv4_conformance.model import golden
from dsv4_conformance.run import runner
from recorded import feed, load_model, relative, vectors

from dsv4_core import cli
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract import registry
from dsv4_core.contract.backend import BackendError
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.generate import generate
from dsv4_core.graph.model import Model
from dsv4_core.text.tokenizer import load_tokenizer

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


PROMPTS = ("the quick brown fox", "A backend is", "In the beginning", "hacker")


@pytest.mark.parametrize(("numerics", "decisive"), [("float32", 1.0), ("native", 0.4)])
def test_the_embedded_model_writes_the_references_text(numerics, decisive):
    """Greedy: the same token wherever the reference's best is ahead of its second by more than the
    noise, and the same text up to the first place where it is not. Noise: how far the mode moves
    the reference's own logits from float64, at this step and three quarters of the others. Most
    steps must be decided, so that this says something. In native mode a step where an expert is at
    a near tie moves by far more than the others, on whichever backend takes the other one: one in
    fifty may.
    """
    reference, judged, exact = (
        load_model("tiny-jargon", *which) for which in ((numerics,), (numerics, "torch"), ("float64",))
    )
    tokenizer = load_tokenizer(golden.checkpoint_path("tiny-jargon"))
    decided, same = [], []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        texts = [[step[0] for step in generate(m, [ids], max_tokens=60)] for m in (reference, judged)]
        sequence = np.array([ids + texts[0][:-1]])
        logits, got, best = (
            teacher_forced(m, sequence, prefill=len(ids))["logits"][0] for m in (reference, judged, exact)
        )
        assert (logits.argmax(-1) == texts[0]).all()
        first, second = np.partition(logits, -2, axis=-1)[:, [-1, -2]].T
        noise = np.abs(logits - best).max(-1)
        clear = first - second > np.maximum(noise, np.quantile(noise, 0.75)) * (4 if numerics == "float32" else 1)
        same.append((got.argmax(-1) == logits.argmax(-1))[clear])
        sure = len(clear) if clear.all() else int(np.argmin(clear))
        assert texts[1][:sure] == texts[0][:sure]
        decided.append(clear)
    assert np.concatenate(decided).mean() >= decisive
    assert np.concatenate(same).mean() >= (0.98 if numerics == "native" else 1)


@pytest.mark.parametrize("numerics", ["native", "float32", "float64"])
def test_bitwise_claims_hold(numerics):
    backend = registry.create("torch", numerics=numerics)
    session = checks.Session(backend)
    found = [c for c in invariance.checks(numerics) if c.id.rpartition("/")[0] in backend.claims]
    assert {c.id.rpartition("/")[0] for c in found} == set(backend.claims)  # each claim is tested by something
    for check in found:
        assert runner.claimed(check, backend)
        finding = runner.run_check(check, session)
        assert finding.status == "passed", finding.message


def test_a_bitwise_claim_that_fails_is_a_failure():
    class Boastful(TorchBackend):
        claims = ("batch_invariance/hc_expand",)

        def hc_expand(self, x, *, hc):
            return super().hc_expand(x, hc=hc) + (x.shape[0] > 1)

    session = checks.Session(Boastful(numerics="float32"))
    every = [
        c for c in invariance.checks("float32") if c.id.startswith(("batch_invariance/hc_", "batch_invariance/gate/"))
    ]
    finding = {c.id: runner.run_check(c, session) for c in every}["batch_invariance/hc_expand/small"]
    assert finding.status == "failed"
    claimed = [c.id for c in every if runner.claimed(c, session.backend)]
    assert claimed
    assert all(i.startswith("batch_invariance/hc_expand/") for i in claimed)


@pytest.mark.parametrize("threads", ["zero", "0", -1, 1025])
def test_a_number_of_threads_that_is_none(threads):
    with pytest.raises(BackendError, match=r"threads = '?(zero|0|-1|1025)'? must be a whole number from 1"):
        registry.create("torch", threads=threads)


def test_a_forward_records_no_gradients_and_a_cache_outlives_it():
    """Forwards run in inference mode; what they leave in a cache may be read, and written again,
    outside of it.
    """
    model = load_model("tiny-flash", "float32", "torch")
    cache = Cache(model.backend, model.config, 1, 64)
    ids = np.arange(40)[None]
    first = feed(model, cache, ids)
    cache.layers[0].ring.add_(0)
    cache.rewind(0, 0)
    assert (feed(model, cache, ids) == first).all()


@pytest.mark.parametrize("numerics", ["native", "float32"])
def test_bench_says_what_it_measured(numerics):
    flags = ["--backend", "torch", "--numerics", numerics]
    done = CliRunner().invoke(cli.root, ["bench", *flags, "--prompt", "20", "--tokens", "3", "--runs", "2"])
    assert done.exit_code == 0, done.output
    head, prefill, decode = [line for line in done.output.splitlines() if not line.startswith("backend: ")]
    assert head.startswith(f"backend torch on cpu ({torch.get_num_threads()} thread")
    assert f"numerics {numerics}; model embedded, 20 tokens and 3 after them, batch 1; median of 2" in head
    for line, phase in ((prefill, "prefill"), (decode, "decode")):
        rate, low, high = re.fullmatch(rf"{phase} +([\d.]+) tokens/s \(([\d.]+) to ([\d.]+)\)", line).groups()
        assert 0 < float(low) <= float(rate) <= float(high)
    done = CliRunner().invoke(cli.root, ["bench", *flags, "--prompt", "4090", "--tokens", "7"])
    assert done.exit_code == 2
    assert "--prompt 4090 and --tokens 7 together exceed the model's 4096 positions; choose fewer" in done.output
