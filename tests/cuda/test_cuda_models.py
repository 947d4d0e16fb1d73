"""Whole models on interpreted kernels, prefill and decode: short sequences of two models always,
the rest as a proof. No GPU is involved.
"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_conformance.model import golden
from recorded import RECORDED, feed, load_model, relative, vectors

from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.graph.cache import Cache
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.generate import generate
from dsv4_core.graph.model import Model

NATIVE = 1.5  # of the recorded or PyTorch's own distance from exact logits, as for the torch and ascend backends
LIMIT = {"float64": 3e-6, "float32": 1e-5}
PROMPT, STEPS = 10, 2  # two compressed rows of ratio 4, and a step that completes a third
KERNELS = {
    "norm_rope_kernel",
    "rms_norm_kernel",
    "act_quant_kernel",
    "scaled_matmul_kernel",
    "dense_matmul_kernel",
    "input_matmul_kernel",
    "moe_matmul_kernel",
    "sparse_attn_kernel",
    "sparse_attn_combine_kernel",
    "route_kernel",
    "sort_kernel",
    "swiglu_kernel",
    "compress_kernel",
    "index_scores_kernel",
    "index_select_kernel",
    "mix_kernel",
    "reduce_kernel",
}  # fmt: skip; act_qdq, rope, combine, hc_post and FP4 products have no launch of their own here


@functools.cache
def load(name: str, numerics: str = "native") -> Model:
    return Model(Checkpoint(golden.checkpoint_path(name)), CudaBackend(interpret=True, numerics=numerics))


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched."""
    from triton.runtime.interpreter import InterpretedFunction

    counts, run = Counter(), InterpretedFunction.run

    def counted(self, *arguments, **options):
        counts[self.fn.__name__] += 1
        return run(self, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return counts


def prefill_and_decode(model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits of a prompt and of steps of one token."""
    cache = Cache(model.backend, model.config, 1, 64)
    parts = [feed(model, cache, ids[:, :PROMPT])]
    parts += [feed(model, cache, ids[:, PROMPT + i : PROMPT + i + 1]) for i in range(STEPS)]
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("name", ["tiny-flash", "tiny-pro", pytest.param("tiny-jargon", marks=pytest.mark.proof)])
def test_a_short_sequence(name, launched):
    """As near to float64 as PyTorch's native arithmetic is, on kernels."""
    ids = vectors(name, "golden")["prompt"][:1, : PROMPT + STEPS]
    got = prefill_and_decode(load(name), ids)
    theirs, exact = (prefill_and_decode(load_model(name, n, "torch"), ids) for n in ("native", "float64"))
    assert relative(got, exact) < NATIVE * relative(theirs, exact)
    assert not (missing := sorted(KERNELS - launched.keys())), missing


@pytest.mark.proof
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_models(name):
    """300 tokens and 20 steps: as near to the exact vectors as the recorded native logits are."""
    want = vectors(name, "golden")
    got = teacher_forced(load(name), want["prompt"], prefill=300)["logits"]
    theirs = relative(want["quantized.logits"], want["exact.logits"])
    assert relative(got, want["exact.logits"]) < NATIVE * theirs


@pytest.mark.proof
@pytest.mark.parametrize("name", RECORDED)
def test_mtp_of_many_sequences(name):
    """MTP gives one row of logits a sequence, and the recorded vectors have two sequences. An
    expert that changes at a near tie moves a row three times as far as the median (reference and
    PyTorch too), so that many are compared by their medians.
    """
    model = load(name)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, (24, 20))
    exact = teacher_forced(load_model(name, "float64", "torch"), ids, prefill=18, mtp=True)["mtp_logits"]
    got, theirs = (
        np.median(
            [
                relative(a, b)
                for a, b in zip(teacher_forced(m, ids, prefill=18, mtp=True)["mtp_logits"], exact, strict=True)
            ]
        )
        for m in (model, load_model(name, "native", "torch"))
    )
    assert got < NATIVE * theirs


@pytest.mark.proof
@pytest.mark.parametrize("numerics", ["float32", "float64"])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_models_in_the_exact_modes(name, numerics, launched):
    """Served by PyTorch: kernels compute native numerics only."""
    want = vectors(name, "golden")
    got = teacher_forced(load(name, numerics), want["prompt"], prefill=300, mtp=True)
    for what in ("logits", "mtp_logits"):
        assert relative(got[what], want[f"exact.{what}"]) < LIMIT[numerics]
    assert not launched


@pytest.mark.proof
def test_the_embedded_model_generates_the_recorded_tokens():
    """From the 17th token on no recorded choice was closer than 1.5: two native implementations
    agree on all of them.
    """
    want = vectors("tiny-jargon", "golden")
    tokens, margins = want["quantized.greedy_tokens"][:41], want["quantized.greedy_margins"][:41].astype(float)
    first = 17
    assert margins[first:].min() > 1.5
    prompt = [*want["chat_prompt"].tolist(), *tokens[:first].tolist()]
    made = [step[0] for step in generate(load("tiny-jargon"), [prompt], max_tokens=len(tokens) - first)]
    assert made == tokens[first:].tolist()
