"""The laws hold for the reference, and faults that one call of one op cannot show break them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from dsv4_conformance.check import Session
from dsv4_conformance.laws import checks as laws
from dsv4_conformance.laws import of_models as law_list
from dsv4_conformance.laws import of_ops as op_laws
from dsv4_conformance.laws import small_model as lawmodel
from dsv4_conformance.laws import strategies
from dsv4_conformance.museum import hunt
from dsv4_conformance.museum.fault import MUTANTS
from dsv4_conformance.run import catalogue, runner
from hypothesis import strategies as st

from dsv4_core.graph.step import Step

CHECKS = {c.law.name: c for c in laws.checks("native")}
CLAIMED_BY_MODE = {name for name, c in CHECKS.items() if c.law.bits == "batch_invariance"}


def session(mutant=None, tier="smoke", **options):
    right = hunt.right_backend()
    return Session((MUTANTS[mutant].build(right) if mutant else right)(**options), tier)


@pytest.mark.parametrize("name", CHECKS)
def test_holds(name):
    claimed = {"batch_invariant": True} if name in CLAIMED_BY_MODE else {}
    finding = runner.run_check(CHECKS[name], session(tier="standard", **claimed))
    assert finding.status == "passed", finding.message


def test_holds_in_float32():
    at = session(numerics="float32")
    assert [
        f.message
        for c in CHECKS.values()
        if c.op != "batch_invariance" and (f := runner.run_check(c, at)).status != "passed"
    ] == []


KILLS = {
    "stale_row_after_rewind": "rewind",
    "result_depends_on_the_batch": "batch_and_padding",
    "previous_window_forgotten_across_a_chunk": "chunked_is_full",
    "ring_wrap_wrong": "prefill_is_decode",
    "window_off_by_one": "reach",
    "visible_one_row_early": "reach",
    "visible_one_row_late": "reach",
    "compressed_branch_masked_in_prefill": "reach",
    "int32_overflow_at_a_high_position": "anywhere_as_the_oracle",
    "comb_softmax_over_columns": "sinkhorn",
    "last_expert_dropped": "experts_over_ranks",
}


@pytest.mark.parametrize("mutant", KILLS)
def test_kills_what_no_single_call_shows(mutant):
    finding = runner.run_check(CHECKS[KILLS[mutant]], session(mutant))
    assert finding.status == "failed"
    assert finding.used == float("inf")


PAST = {
    "ring": ("_put", lambda name, values: np.maximum(values, 0) if name == "window_idxs" else values),
    "rows": ("_put", lambda name, values: np.maximum(values, 0) if name == "128.row_idxs" else values),
    "written": ("_put", lambda name, values: np.maximum(values, 0) if name == "4.row_write" else values),
    "seen": ("_put", lambda name, values: np.maximum(values, 4) if name == "4.visible" else values),
}


@pytest.mark.parametrize("fault", PAST)
def test_what_is_too_much_must_be_masked(fault, monkeypatch):
    method, wrong = PAST[fault]
    right = getattr(Step, method)
    monkeypatch.setattr(Step, method, lambda self, name, values: right(self, name, wrong(name, values)))
    finding = runner.run_check(CHECKS["extents_do_not_show"], session())
    assert finding.status == "failed", fault


@pytest.mark.parametrize("mutant", ["ring_wrap_wrong", "result_depends_on_the_batch", "visible_one_row_early"])
def test_a_broken_law_shrinks_to_a_case_that_can_be_run_again(mutant):
    at = session(mutant, "standard")
    finding = runner.run_check(CHECKS["chunked_is_full"], at)
    case_id = re.search(r"--case (\S+)$", finding.message)[1]
    example = strategies.read(case_id.partition(":")[2], laws.LAWS[0].always[0])
    assert sum(example["chunks"]) < sum(
        laws.LAWS[0].always[0]["chunks"]
    )  # smaller than the example that is always tried
    again = runner.run(at, cases=[case_id])
    assert [f.status for f in again.findings] == ["failed"]
    assert again.findings[0].id == case_id
    assert runner.run(session(tier="standard"), cases=[case_id]).findings[0].status == "passed"


def test_the_hunt_is_the_same_each_time():
    law, found = laws.LAWS[0], []
    for _ in range(2):
        at = lawmodel.Stage.of(session("ring_wrap_wrong").backend)
        found.append(laws.hunt(law, at, 6, seed=1))
    assert found[0] == found[1]
    assert found[0] is not None


@pytest.mark.parametrize("claims", [True, False])
def test_what_nobody_claims_is_not_made_smaller(claims, monkeypatch):
    """One example says that a law does not hold, whoever finds it; minutes of shrinking tell a
    backend that claims it where to look.
    """
    tried = []

    def breaks(stage, *, tokens, seed):
        tried.append(tokens)
        return "broken" if tokens > 3 else None

    law = replace(
        CHECKS["packing_rounds"].law, holds=breaks, strategy={"tokens": st.integers(0, 40), "seed": st.just(0)}
    )
    own = session(tier="standard")
    own.backend.claims_level = 3 if claims else None
    for always in ({"tokens": 9, "seed": 0}, {"tokens": 1, "seed": 0}):
        tried.clear()
        finding = laws.LawCheck(replace(law, always=(always,))).run(own)
        assert finding.status == "failed"
        at = int(re.search("tokens=([0-9]+)", finding.message)[1])
        assert (at == 4) if claims else (at == 9 or tried.index(at) == len(tried) - 1)


def test_examples_are_written_and_read():
    for law in laws.LAWS:
        for example in law.always:
            assert strategies.read(strategies.written(example), law.always[0]) == example
            assert set(example) == set(law.strategy)
    with pytest.raises(ValueError, match="an example has ratios, chunks, seed"):
        strategies.read("nonsense=1", laws.LAWS[0].always[0])
    with pytest.raises(ValueError, match="lacks chunks, seed"):
        strategies.read("ratios=0", laws.LAWS[0].always[0])
    with pytest.raises(ValueError, match="no law 'nope'; laws: chunked_is_full"):
        catalogue.find("law/nope:a=1")


def test_tolerances_follow_the_precision():
    """Rounding alone moves logits in proportion to the unit roundoff, and correct runs stay
    inside.
    """
    double, single = (lawmodel.tolerance(n, (0,)) for n in ("float64", "float32"))
    assert 2.0**27 < single / double < 2.0**31  # 2^29 between the units
    at = lawmodel.Stage.of(session().backend)
    source, ids = lawmodel.weights((0,)), lawmodel.some_ids((1, 50), 1)
    noise = lawmodel.apart(lawmodel.full(at.model(source), ids), lawmodel.full(at.model(source, at.oracle), ids))
    assert 0 < noise.max() < double


def test_a_backend_without_exact_modes_is_held_to_one_layer_within_its_noise():
    right = hunt.right_backend()
    for mutant, status in ((None, "passed"), ("previous_window_forgotten_across_a_chunk", "failed")):
        cls = MUTANTS[mutant].build(right) if mutant else right
        native = type("Native", (cls,), {"numerics_modes": ("native",)})()
        stage = lawmodel.Stage.of(native)
        assert (stage.exact, stage.noisy, stage.layers((0, 128, 4))) == (native, True, (4,))
        problem = law_list.chunked_is_full(stage, ratios=(4,), chunks=[30, 1, 70], seed=0)
        assert ("failed" if problem else "passed") == status, problem


def test_bits_are_compared_as_bits():
    x = np.array([[1.0, 2.0]], np.float32)
    assert law_list.differing_bits(x, x.copy(), "x") is None
    assert law_list.differing_bits(x, np.nextafter(x, 3), "x") == "x: 2 of 2 elements have other bits, first [0, 0]"
    assert law_list.differ(x * np.nan, x, 1.0, "x").startswith("x: position 0 is the first of 1 that differ")


def test_sinkhorn_bound_is_not_vacuous():
    """Mixes that converge slowly leave row sums visibly off one, and the bound with them; mild
    mixes do not.
    """
    at = lawmodel.Stage.of(session().backend)
    assert op_laws.sinkhorn(at, tokens=50, spread=4, seed=0) is None

    class Short:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def hc_split_sinkhorn(self, *operands, **scalars):
            return self.backend.hc_split_sinkhorn(*operands, **{**scalars, "iters": 2})

    problem = op_laws.sinkhorn(lawmodel.Stage(Short(at.own), at.exact), tokens=50, spread=6, seed=0)
    assert "rows of comb sum to" in problem
