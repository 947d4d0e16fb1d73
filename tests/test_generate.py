"""Sampling and the generation loop."""

import numpy as np
import pytest
from recorded import load_model

from dsv4_core.contract.registry import create
from dsv4_core.graph.cache import CacheError
from dsv4_core.graph.generate import generate, speculate
from dsv4_core.graph.sampling import Sampling


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-flash", "float64")


def test_sampling_follows_the_distribution():
    """10,000 draws at temperature 2, top-p 0.8: the prefix's own probabilities, renormalised, and
    nothing outside it.
    """
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2])) * 2
    uniform = ((np.arange(10000) + 0.5) / 10000).astype(np.float32)
    got = create("reference").sample(np.tile(np.float32(logits), (10000, 1)), uniform, temperature=2.0, top_p=0.8)
    np.testing.assert_allclose(np.bincount(got, minlength=4) / 10000, [0, 4 / 9, 3 / 9, 2 / 9], atol=2e-4)


def test_greedy_takes_the_lower_id_on_a_tie():
    logits = np.float32([[1, 3, 3, 0], [2, 2, 2, 2]])
    assert create("reference").sample(logits, np.zeros(2, np.float32), temperature=0.0, top_p=1.0).tolist() == [1, 0]


def test_a_seed_repeats_and_another_does_not(model):
    def run(seed, prompts):
        steps = generate(model, prompts, max_tokens=12, sampling=Sampling(1.5, 0.95, seed))
        return [list(column) for column in zip(*steps, strict=True)]

    assert run(1, [[5, 6]]) == run(1, [[5, 6]]) != run(2, [[5, 6]])
    assert run(1, [[5, 6], [7, 8, 9, 10]])[0] == run(1, [[5, 6]])[0]  # the batch changes nobody's draws


def test_stop_tokens(model):
    greedy = [s[0] for s in generate(model, [[5, 6, 7]], max_tokens=20)]
    stop = greedy[4]
    upto = greedy[: greedy.index(stop) + 1]
    assert [s[0] for s in generate(model, [[5, 6, 7]], max_tokens=20, stop=[stop])] == upto
    assert list(speculate(model, [5, 6, 7], max_tokens=20, stop=[stop])) == upto
    both = list(generate(model, [[5, 6, 7], [9]], max_tokens=20, stop=[stop]))
    assert [s[0] for s in both[: len(upto)]] == upto
    assert all(s[0] is None for s in both[len(upto) :])


@pytest.mark.parametrize("run", [generate, speculate])
def test_too_long_and_empty(model, run):
    prompt = [1] * 1020
    if run is generate:
        with pytest.raises(CacheError, match=r"capacity of 1030 tokens; the model has positions 0 \.\. 1023"):
            list(generate(model, [prompt], max_tokens=10))
        with pytest.raises(ValueError, match="a prompt needs at least one"):
            list(generate(model, [[]], max_tokens=10))
    else:
        assert len(list(speculate(model, prompt, max_tokens=10))) == 5  # as far as the positions go


def test_sampling_parameters():
    for temperature in (-1, 1e-38, 1e-45, 1e-320, 9e-5, 1e5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"temperature = {temperature} must be 0 \(greedy\), or from 0.0001 to 1"):
            Sampling(temperature=temperature)
    with pytest.raises(ValueError, match="seed = -1 must be from 0"):
        Sampling(seed=-1)
    with pytest.raises(ValueError, match=r"top_p = 0 must be in \(0, 1\]"):
        Sampling(top_p=0)
