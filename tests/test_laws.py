"""What must hold whatever the numbers are: chunking, batching, causality, rewinding, speculation.

In float64, where rounding cannot hide an error.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import feed, load_model, relative, vectors

from dsv4_core.graph.cache import Cache, CacheError
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.generate import Drafts, generate, speculate
from dsv4_core.graph.step import Step

TIGHT = 1e-11  # float64 noise: 2^-53 grown over six layers


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-flash", "float64")


def ids_of(model, batch, total, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, total))


def full(model, ids):
    return feed(model, Cache(model.backend, model.config, len(ids), ids.shape[1]), ids)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(st.integers(1, 70), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_chunked_is_full_prefill(model, chunks, seed):
    ids = ids_of(model, 1, sum(chunks), seed)
    cache = Cache(model.backend, model.config, 1, ids.shape[1])
    ends = np.cumsum(chunks)
    parts = [feed(model, cache, ids[:, end - n : end]) for n, end in zip(chunks, ends, strict=True)]
    assert relative(np.concatenate(parts, axis=1), full(model, ids)) < TIGHT


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_several_tokens_a_decode_step(model, tokens):
    ids = ids_of(model, 2, 141)  # past a window of 128 and of 32
    cache = Cache(model.backend, model.config, 2, 141, rewindable=0)
    parts = [feed(model, cache, ids[:, :121])]
    parts += [feed(model, cache, ids[:, i : i + tokens]) for i in range(121, 141, tokens)]
    assert relative(np.concatenate(parts, axis=1), full(model, ids)) < TIGHT


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 150), min_size=2, max_size=4), more=st.integers(1, 3))
def test_a_sequence_does_not_see_its_batch(model, lengths, more):
    ids = ids_of(model, len(lengths), max(lengths) + more)
    cache = Cache(model.backend, model.config, len(lengths), max(lengths) + more)
    together = [feed(model, cache, ids[:, : max(lengths)], counts=lengths)]
    together += [feed(model, cache, np.array([[ids[b, n + i]] for b, n in enumerate(lengths)])) for i in range(more)]
    for b, n in enumerate(lengths):
        alone = full(model, ids[b : b + 1, : n + more])[0]
        mine = np.concatenate([together[0][b, :n], *(part[b] for part in together[1:])])
        assert relative(mine, alone) < TIGHT


def test_sequences_of_a_cache_in_any_order(model):
    ids = ids_of(model, 3, 40)
    cache = Cache(model.backend, model.config, 3, 60)
    feed(model, cache, ids[:2], sequences=[2, 0])
    got = feed(model, cache, ids[[1, 2]], sequences=[0, 1], counts=[1, 40])
    want = full(model, np.concatenate([ids[1], ids[1, :1]])[None])
    assert relative(got[0, 0], want[0, 40]) < TIGHT
    assert relative(got[1], full(model, ids[2:])[0]) < TIGHT


@pytest.mark.parametrize("changed", [0, 31, 32, 127, 128, 140])
def test_causality(model, changed):
    ids = ids_of(model, 1, 150)
    other = ids.copy()
    other[0, changed] = (other[0, changed] + 1) % model.config.vocab_size
    a, b = full(model, ids), full(model, other)
    assert changed == 0 or relative(b[0, :changed], a[0, :changed]) < TIGHT
    assert relative(b[0, changed:], a[0, changed:]) > 1e-6


@pytest.mark.parametrize("at", [33, 127, 129, 140])  # around windows of 4, 32 and 128
def test_rewind_is_never_having_gone_there(model, at):
    ids, wrong = ids_of(model, 1, at + 12), ids_of(model, 1, 8, seed=1)
    cache = Cache(model.backend, model.config, 1, at + 12, rewindable=8)
    feed(model, cache, ids[:, :at])
    for _ in range(2):  # twice: the second time over rows that the first left
        feed(model, cache, wrong[:, :5])
        feed(model, cache, wrong[:, 5:8])
        cache.rewind(0, at)
    got = feed(model, cache, ids[:, at:])
    assert relative(got, full(model, ids)[:, at:]) < TIGHT


def test_rewind_names_its_limits(model):
    cache = Cache(model.backend, model.config, 1, 40, rewindable=3)
    feed(model, cache, ids_of(model, 1, 20))
    with pytest.raises(
        CacheError, match=r"to 16 tokens; it has reached 20 and the cache keeps 3 to rewind: the least is 17"
    ):
        cache.rewind(0, 16)
    with pytest.raises(CacheError, match="holds 20 tokens, not 21"):
        cache.rewind(0, 21)
    cache.rewind(0, 17)
    feed(model, cache, ids_of(model, 1, 1))
    with pytest.raises(CacheError, match="the least is 17"):
        cache.rewind(0, 16)
    cache.rewind(0, 0)  # from the beginning nothing needs to be kept
    assert relative(feed(model, cache, ids_of(model, 1, 30)), full(model, ids_of(model, 1, 30))) < TIGHT


@pytest.mark.parametrize("name", ["tiny-flash", "tiny-jargon"])
def test_speculative_is_greedy(name):
    model = load_model(name, "float64")
    prompt = ids_of(model, 1, 30)[0].tolist()
    greedy = [step[0] for step in generate(model, [prompt], max_tokens=60)]
    drafts = Drafts()
    assert list(speculate(model, prompt, max_tokens=60, drafts=drafts)) == greedy
    assert drafts.proposed > drafts.accepted  # rejections, and so rewinds, were exercised


def test_a_trained_models_drafts_are_accepted():
    model = load_model("tiny-jargon", "float64")
    prompt = vectors("tiny-jargon", "golden")["chat_prompt"].tolist()
    drafts = Drafts()
    speculative = list(speculate(model, prompt, max_tokens=48, drafts=drafts))
    assert speculative == [step[0] for step in generate(model, [prompt], max_tokens=48)]
    assert drafts.accepted > 0


def test_greedy_answer_is_the_recorded_one_where_its_margin_is_above_the_noise():
    """Teacher-forced along the recorded answer.

    Noise: how far the gap between two tokens moves between two native implementations, on other
    text.
    """
    want, model = vectors("tiny-jargon", "golden"), load_model("tiny-jargon", "native")
    other = teacher_forced(model, want["prompt"], prefill=300)["logits"] - want["quantized.logits"]
    noise = 3 * np.sqrt(2) * other.std()  # three deviations of a difference of two logits
    answer = np.concatenate([want["chat_prompt"], want["quantized.greedy_tokens"]])[None]
    top = teacher_forced(model, answer[:, :-1], prefill=len(want["chat_prompt"]))["logits"][0].argmax(-1)
    sure = want["quantized.greedy_margins"].astype(float) > noise
    assert sure.sum() > 24, noise
    np.testing.assert_array_equal(top[sure], want["quantized.greedy_tokens"][sure])


def test_padding_writes_nothing(model):
    """A padded row leaves the cache's bytes alone."""
    be = load_model("tiny-flash", "native").backend
    cache = Cache(be, model.config, 2, 64)
    step = Step(cache, ids_of(model, 2, 16), counts=[16, 0])
    load_model("tiny-flash", "native").forward(step)
    for layer in cache.layers[:-1]:  # the last is the MTP block's, which did not run
        for array, rows in ((layer.ring, cache.ring_rows), (layer.state, None)):
            if array is not None:
                count = rows or len(array) // 2
                assert not array[count:].any()
                assert array[:count].any()
