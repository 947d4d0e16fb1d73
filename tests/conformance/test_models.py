"""Model level: recorded vectors in the exact modes, and the native distance."""

import numpy as np
import pytest
from dsv4_conformance.check import Session
from dsv4_conformance.model import checks as models
from dsv4_conformance.model import golden, stored_logits
from dsv4_conformance.museum import hunt
from dsv4_conformance.museum.fault import MUTANTS
from dsv4_conformance.run import runner
from recorded import load_model


def backend(mutant=None, numerics="native"):
    right = hunt.right_backend()
    return (MUTANTS[mutant].build(right) if mutant else right)(numerics=numerics)


def exact(name, what="logits", modes=models.EXACT):
    return models.ExactModel(name, what, modes)


def test_what_is_checked_follows_the_mode():
    ids = {n: [c.id for c in models.checks(n)] for n in ("native", "float64")}
    assert ids["native"] == [*ids["float64"], "model/tiny-jargon/native_distance"]
    assert len(ids["float64"]) == 6
    assert {c.modes for c in models.checks("float32")} == {("float32",)}


@pytest.mark.parametrize("name", golden.MODELS)
def test_the_reference_has_the_recorded_logits(name):
    session = Session(backend())
    for what in ("logits", "mtp_logits"):
        finding = runner.run_check(exact(name, what), session)
        assert finding.status == "passed", finding.message
        assert set(finding.metrics) == {"float64 relative error", "float32 relative error"}


def test_one_bad_decode_step_does_not_hide_in_the_mean():
    session = Session(backend(numerics="float64"))
    check = exact("tiny-flash", modes=("float64",))
    results = check.results(session, "float64")
    results["logits"][:, 7] *= 1 + 1e-5
    finding = runner.run_check(check, session)
    assert finding.status == "failed"
    assert "worst at position 306" in finding.message
    assert finding.worst["position"] == 306


def test_of_a_backend_without_exact_modes_none_is_asked():
    native = type("Native", (hunt.right_backend(),), {"numerics_modes": ("native",)})()
    assert any(isinstance(c, models.ExactModel) for c in models.checks("native", hunt.right_backend()()))
    assert not any(isinstance(c, models.ExactModel) for c in models.checks("native", native))


@pytest.mark.parametrize("mutant", ["sink_missing", "unweighted_q_norm_missing", "comb_not_transposed"])
def test_wrong_structure_is_far_from_the_recorded_logits(mutant):
    finding = runner.run_check(exact("tiny-flash", modes=("float32",)), Session(backend(mutant)))
    assert finding.status == "failed"
    assert finding.used > 10


def test_native_distance_of_the_reference():
    finding = runner.run_check(models.NativeDistance(), Session(backend()))
    assert finding.status == "passed", finding.message
    assert (
        0.7 < finding.metrics["KL ratio"] < 1.3
    )  # one run's KL scatters: 0.035 to 0.044 over chunkings and numbers of threads
    assert finding.metrics["top-1 agreement"] > 0.95


def test_another_native_implementation_is_no_false_alarm():
    """The published model's own native logits, where its positions are stored ones."""
    theirs = golden.load("tiny-jargon", "golden")["quantized.logits"]  # positions 299 .. 319
    stored = stored_logits.load()
    begin = 299 - stored_logits.FIRST
    kl, l2 = stored_logits.distances(theirs, stored["exact"][:, begin:])
    assert 0.8 < l2.mean() / stored["l2"][:, begin:].mean() < 1.2
    assert kl.mean() < 2 * stored["kl"][:, begin:].mean()


def test_a_native_fault_shows_in_the_distance():
    finding = runner.run_check(models.NativeDistance(), Session(backend("hadamard_missing_on_keys")))
    assert finding.status == "failed"
    assert "times as far, at least" in finding.message


def test_more_noise_than_the_reference_has_is_found_and_less_is_not():
    stored = stored_logits.load()
    rng = np.random.default_rng(0)
    exact_logits = stored["exact"].astype(np.float64)
    length = np.linalg.norm(exact_logits, axis=-1, keepdims=True) * exact_logits.shape[-1] ** -0.5
    for factor, fails in ((0.9, False), (1.3, True)):
        noise = rng.standard_normal(exact_logits.shape) * length * stored["l2"][..., None] * factor
        problems, used, figures = models.judge_distance(exact_logits + noise)
        assert any("relative L2" in p for p in problems) == fails, figures
        assert (used > 1) >= fails


def test_bootstrap_bound():
    reference = np.random.default_rng(0).lognormal(size=(2, 160))
    ratio, least = models.ratio_bound(reference * 1.5, reference)
    assert (ratio, least) == (pytest.approx(1.5), pytest.approx(1.5))  # paired: what both share cancels
    ratio, least = models.ratio_bound(np.random.default_rng(1).lognormal(size=(2, 160)), reference)
    assert 0.6 < least < ratio


def test_stored_logits_are_what_the_reference_computes():
    """A sample: the last 60 positions of a prefill in two chunks."""
    logits = stored_logits.teacher_forced(load_model("tiny-jargon", "float64"), (260, 60))
    stored = stored_logits.load()["exact"]
    assert stored.shape == (2, 320 - stored_logits.FIRST, 2048)
    assert (
        np.abs(logits[:, 260:] - stored[:, 260 - stored_logits.FIRST :].astype(np.float64)).max()
        < 0.51 * stored_logits.UNIT
    )
    kl, l2 = stored_logits.distances(
        stored_logits.teacher_forced(load_model("tiny-jargon", "native"), (320,))[:, stored_logits.FIRST :], stored
    )
    assert 0.7 < kl.mean() / stored_logits.load()["kl"].mean() < 1.4
    assert 0.9 < l2.mean() / stored_logits.load()["l2"].mean() < 1.1
