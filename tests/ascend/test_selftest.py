"""The self-test agrees with a sane chip, and finds every planted vendor bug under its op's name."""

import pytest
from dsv4_backend_ascend import selftest
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.capability import GENERATIONS
from vendor_bugs import BUGS, ROW_LIMIT

SMALL = {"high_rows": ROW_LIMIT + 512, "high_keys": 128 * 120}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_sane_chip_shows_no_difference(generation):
    outcomes = selftest.run(AscendBackend(simulate=generation), **SMALL)
    assert [o for o in outcomes if o.found] == []
    asked = {o.contract for o in outcomes if not o.skipped}
    skipped = {o.contract for o in outcomes if o.skipped} - asked
    assert skipped == ({"apply_rope", "index_topk"} if generation == "950" else {"linear", "hc_pre", "hc_post"})


@pytest.mark.parametrize("bug", BUGS)
def test_every_planted_bug_is_found_and_its_op_named(bug, monkeypatch):
    generation, op, contract, fault = BUGS[bug]
    every = selftest.cases
    monkeypatch.setattr(selftest, "cases", lambda *a, **k: (c for c in every(*a, **k) if c.contract == contract))
    backend = AscendBackend(simulate=generation)
    with backend.chip.planted(op, fault):
        found = [o for o in selftest.run(backend, **SMALL) if o.found]
    assert found, f"{bug} was not found"
    assert all(o.contract == contract and op in o.ops for o in found)


def test_there_are_enough_bugs():
    assert len(BUGS) >= 10
    assert {generation for generation, *_ in BUGS.values()} == set(GENERATIONS)
