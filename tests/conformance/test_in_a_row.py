"""Calls in a row, arrays, other scalars and views: each sees the faults that it is for, and cases
are what their names say.
"""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_conformance import check as checks
from dsv4_conformance.cases import checks as opcases
from dsv4_conformance.cases import operands
from dsv4_conformance.cli import mutants
from dsv4_conformance.cli.mutants import load
from dsv4_conformance.laws import arrays, in_a_row
from dsv4_conformance.museum.catalogue import MUTANTS
from dsv4_conformance.museum.hunt import right_backend

from dsv4_core.contract import registry
from dsv4_core.contract.spec import OPS


def failing(mutant, found, start):
    session = checks.Session(MUTANTS[mutant].build(right_backend())(numerics="native"), "standard")
    return [c.id for c in found if c.id.startswith(start) and c.run(session).status == "failed"]


@pytest.mark.parametrize(
    ("mutant", "start"),
    [
        ("rows_by_a_sum_of_ids", "almost_the_same/embedding"),
        ("weights_by_their_first_row", "almost_the_same/linear/fp8"),
        ("every_fiftieth_call", "many_calls/gate/small"),
        ("sorted_for_another_temperature", "other_scalars/sample/warm"),
    ],
)
def test_what_is_kept_between_calls_is_found(mutant, start, monkeypatch):
    monkeypatch.setattr(in_a_row, "SECONDS", 600)
    monkeypatch.setattr(in_a_row, "MOST", 60)
    assert failing(mutant, in_a_row.checks("native"), start)


def test_the_right_backend_passes_them():
    session = checks.Session(right_backend()(numerics="native"), "standard")
    found = [*arrays.checks("native"), *(c for c in in_a_row.checks("native") if c.id.startswith(("almost", "other")))]
    assert [f"{f.id}: {f.message}" for f in (c.run(session) for c in found) if f.status != "passed"] == []


def test_zeros_that_are_none_are_found():
    assert failing("zeros_are_what_was_there", arrays.checks("native"), "arrays/") == ["arrays/uint8"]


@pytest.mark.parametrize(
    ("mutant", "killer"),
    [
        ("one_token_of_4096_channels", "linear/fp8_at_in=7168_tokens=1"),
        ("one_token_through_experts_of_4096", "moe/at_dim=7168_tokens=1"),
        ("chunk_of_4096_channels", "linear/fp4_at_in=8192_tokens=65"),
        ("one_token_of_512_picks", "sparse_attn/at_picks=1152_tokens=1"),
        ("one_token_among_256_experts", "gate/at_experts=384_tokens=1"),
        ("of_many_equal_the_last", "gate/all_equal"),
        ("many_heads_and_many_picks", "sparse_attn/at_picks=1152_heads=128"),
        ("own_iterations_in_tiles", "hc_split_sinkhorn/iters=1_tokens=65"),
    ],
)
def test_widths_and_scalars_meet_one_token_a_chunk_and_each_other(mutant, killer):
    assert failing(mutant, opcases.checks("native"), killer) == [killer]


def test_a_result_stays_whatever_is_called_after_it():
    assert failing("sixty_four_buffers", in_a_row.checks("native"), "many_calls/rms_norm/small")


def test_a_view_is_cut_in_every_axis():
    assert failing("heads_follow_each_other", opcases.checks("native"), "apply_rope/views")


def test_no_scalar_has_one_value_alone():
    """A constant built in would pass."""
    for op, spec in OPS.items():
        cases = [c.call("native").scalars for c in opcases.checks("native") if c.op == op and c.tier != "full"]
        for name in spec.scalars:
            several = {str(scalars[name]) for scalars in cases}
            assert len(several) > 1, f"{op}: {name} is {several} in every case"


def test_the_oracle_rounds_no_result():
    """A result that it rounded would be an exact value to everybody else."""
    oracle = registry.oracle("native", {})
    for case in opcases.checks("native"):
        if case.tier == "smoke" and "rounded" in case.spec.judged:
            call = case.call("native")
            exact, _ = oracle.evaluate(call.op, call.operands, call.scalars, samples=0, seed=0)
            for judged, result in zip(case.spec.judged, exact if isinstance(exact, tuple) else (exact,), strict=True):
                assert judged != "rounded" or result.dtype == np.float64, case.id


def test_experts_have_as_many_rows_as_a_tile():
    found = {c.id: c for c in opcases.checks("native")}
    for op, name in (("expert_linear", "fp8_at_rows=303_buckets"), ("expert_linear", "fp4_at_rows=303_buckets")):
        assert np.diff(found[f"{op}/{name}"].call("native").named()["offsets"]).tolist() == list(operands.BUCKETS)
    indices = found["moe/at_tokens=303_buckets"].call("native").named()["indices"]
    assert np.bincount(indices[:, 0], minlength=14).tolist() == list(operands.BUCKETS)
    assert all(len(set(row)) == len(row) for row in indices.tolist())


class Here:
    """Stands for a pool of processes: what it is given runs here."""

    def __init__(self, *_: object, **__: object) -> None:
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


def test_seeds_of_honest_variants_are_taken_up_where_they_ended(tmp_path, monkeypatch):
    asked, interruptions = [], [KeyboardInterrupt]

    def tried(seeds, names):
        if list(seeds) == [2] and interruptions:
            raise interruptions.pop()
        asked.append(list(seeds))
        return [{"name": n, "cases": 10, "alarms": [], "used": 0.5, "factor": 1.0, "at": "a/b"} for n in names]

    monkeypatch.setattr(mutants, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(mutants, "tried", tried)
    words = ["--name", "butterflies", "--seeds", "4", "--out", str(tmp_path), "--resume"]
    assert CliRunner().invoke(mutants.command, words).exit_code == 1  # interrupted
    assert load(tmp_path / "museum.json")["honest"]["butterflies"]["seeds"] == 2
    assert CliRunner().invoke(mutants.command, words).exit_code == 0
    assert asked == [[0], [1], [2], [3]]
    held = load(tmp_path / "museum.json")["honest"]["butterflies"]
    assert (held["seeds"], held["cases"]) == (4, 40)
    assert CliRunner().invoke(mutants.command, [*words[:2], "--seeds", "0", *words[4:]]).exit_code == 0
    assert load(tmp_path / "museum.json")["honest"]["butterflies"] == held  # 0 leaves them as they were


def test_what_an_earlier_suite_would_have_said_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ProcessPoolExecutor", Here)
    (tmp_path / "report.json").write_text(
        json.dumps({"date": "2026-11-01T00:00", "findings": [{"id": "hc_post/small"}, {"id": "law/sinkhorn"}]})
    )
    names = ["comb_not_transposed", "streams_past_4096_tokens"]
    monkeypatch.setattr(mutants, "hunted_one", lambda name, *_: known(name))

    def known(name):
        return {"name": name, "tier": "smoke", "id": "a/b", "factor": 0.0, "numeric": True, "seconds": 0.0}

    words = ["--name", names[0], "--name", names[1], "--seeds", "0", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(mutants.command, [*words, "--earlier", str(tmp_path)])
    assert result.exit_code == 0, result.output
    told = load(tmp_path / "out/museum.json")["mutants"]
    assert [told[n]["earlier"]["id"] for n in names] == ["hc_post/small", ""]
    page = (tmp_path / "out/mutants.md").read_text()
    assert "Of 2 mutants they catch 1 at smoke" in page
    assert "**1 pass them**" in page
    assert "| `a/b` | smoke | passes |" in page
