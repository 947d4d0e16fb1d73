"""The suite itself: stable ids and seeds, budgets, guards, claims, xfails, isolation, reports; and
that its documents are fresh.
"""

import datetime
import io
import json
import os
import time
import types
from pathlib import Path

import numpy as np
import pytest
from dsv4_conformance import check as checks
from dsv4_conformance.cases import checks as opcases
from dsv4_conformance.cli.mutants import load
from dsv4_conformance.museum import pages
from dsv4_conformance.museum.catalogue import MUTANTS, VARIANTS
from dsv4_conformance.museum.hunt import hunt, right_backend
from dsv4_conformance.report.html import page
from dsv4_conformance.report.junit import junit
from dsv4_conformance.report.matrix import between, matrix, summary
from dsv4_conformance.report.matrix import load as load_report
from dsv4_conformance.report.op_pages import op_reference
from dsv4_conformance.report.write import finite
from dsv4_conformance.run import isolate, runner
from dsv4_conformance.run.catalogue import collect
from dsv4_conformance.run.isolate import Workers
from dsv4_conformance.run.xfails import Xfail, stale
from dsv4_conformance.run.xfails import load as load_xfails
from dsv4_conformance.verdict.budget import Expected, allowance, expect, roundoff, unit
from dsv4_conformance.verdict.calls import Call, execute
from dsv4_conformance.verdict.discrete import Scores, judge_picks, judge_sample
from dsv4_conformance.verdict.guard import Guarded
from dsv4_conformance.verdict.judge import judge_exact, judge_rounded

from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import BFLOAT16
from dsv4_core.contract.spec import OPS, Support, UnsupportedOpError

DOCS = Path(__file__).parents[2] / "docs"


def session(tier="smoke", **options):
    return checks.Session(right_backend()(**options), tier)


def case(case_id):
    return next(c for c in opcases.checks("native") if c.id == case_id)


def test_ids_are_unique_and_seeds_do_not_move():
    ids = [c.id for c in opcases.checks("native")]
    assert len(ids) == len(set(ids))
    assert not any(set(i) & set(" '\"$*?;&|<>()") for i in ids)  # pasted into a shell as they are


def test_a_case_of_padding_has_some():
    padded = [c for c in opcases.checks("native") if c.tier != "full" and c.case.data == "padding"]
    none = []
    for check in padded:
        call = check.call("native")
        indices = [o for o in call.operands if isinstance(o, np.ndarray) and o.dtype == np.int32 and o.size > 1]
        if indices and not any((i < 0).any() for i in indices):
            none.append(check.id)
    assert len(padded) > 20
    assert not none


def test_every_op_has_cases_at_smoke():
    assert {c.op for c in opcases.checks("native") if c.tier == "smoke"} == set(OPS)


def test_a_budget_is_half_a_unit_where_nothing_is_sensitive():
    value = np.array([1.0, 3.0, 100.0])
    budget, _ = allowance(value, np.zeros(3), "bfloat16", "float32")
    np.testing.assert_allclose(budget, unit(value, "bfloat16") / 2, rtol=2e-3)
    assert roundoff("float32") == 2.0**-24


def test_guards_see_writes_outside_and_into_operands():
    backend = right_backend()()
    guarded = Guarded(backend, "x", np.zeros((3, 4), np.float32), view=True)
    assert guarded.problems(mutable=False) == []
    guarded.array[1, 2] = 5
    assert "modified operand 'x' at [1, 2]" in guarded.problems(mutable=False)[0]
    assert guarded.problems(mutable=True) == []
    guarded.buffer[0, 0] = 1
    assert "wrote outside operand 'x'" in guarded.problems(mutable=True)[0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: None, "returned None"),
        (lambda x: x.astype(np.float32), "dtype float32; the contract says bfloat16"),
        (lambda x: x[:2].copy(), "shape [2, 256]; the contract says [5, 256]"),
        (lambda x: x, "shares memory with operand 'x'"),
        (lambda x: (x.copy(), x.copy()), "is a tuple"),
    ],
)
def test_mistakes_of_form_are_named(returned, message):
    backend = right_backend()()
    backend.rms_norm = lambda x, weight, *, eps: returned(x)
    call = case("rms_norm/small").call("native")
    assert message in "; ".join(execute(call, backend, [(5, 256)]).problems)


def test_weights_are_guarded():
    backend = right_backend()()

    def spoiling(x, weight, *, eps):
        weight[0] = 0
        return x.copy()

    backend.rms_norm = spoiling
    backend.embedding = lambda ids, weight: weight[: len(ids)]
    found = []
    for name in ("rms_norm/small", "embedding/small"):
        call = case(name).call("native")
        shape = (*call.operands[0].shape[:1], call.operands[1].shape[-1])
        found += execute(call, backend, [shape]).problems
    assert any("modified weight 'weight' in place" in p for p in found)
    assert any("shares memory with operand 'weight'" in p for p in found)


def test_a_backend_that_leaves_the_interpreter_is_a_finding():
    backend = right_backend()()

    def leave(*_, **__):
        raise SystemExit(0)

    backend.rms_norm = leave
    ran = runner.run(checks.Session(backend, "smoke"), cases=["rms_norm/small"])
    assert [f.status for f in ran.findings] == ["error"]
    assert "raised SystemExit" in ran.findings[0].message


def test_an_op_that_is_claimed_and_always_refused_fails():
    refused = type("Refused", (right_backend(),), {"claims": ("hc_post",), "claims_level": None})()
    refused.supports = lambda op, **_: Support(reason="no")
    ran = runner.run(checks.Session(refused, "smoke"), ops=["hc_post"])
    assert {f.status for f in ran.findings if f.id.startswith("hc_post")} == {"unsupported"}
    assert not ran.ok
    ran.claims = ()
    assert ran.ok


def test_checks_of_every_kind_ask_for_support_first():
    backend = right_backend()()
    backend.supports = lambda op, **operands: Support(reason="no such width") if operands else Support("numpy")
    one_of_a_kind = {c.id.split("/")[0]: c.id for c in collect("standard", "native") if c.op == "gate"}
    assert {"gate", "trace", "every_size", "many_calls", "almost_the_same"} <= one_of_a_kind.keys()
    found = runner.run(checks.Session(backend, "standard"), cases=list(one_of_a_kind.values())).findings
    assert {f.id: f.status for f in found} == dict.fromkeys(one_of_a_kind.values(), "unsupported")


def test_what_supports_promises_is_held_against_the_backend():
    def refusing(*_, **__):
        raise UnsupportedOpError("no kernel for this")

    backend = right_backend()()
    backend.hc_post = refusing
    found = runner.run(checks.Session(backend, "smoke"), cases=["hc_post/small"]).findings[0]
    assert found.status == "error"
    assert "supports() said yes" in found.message


def test_level_4_claims_batch_invariance():
    claiming = type("Claiming", (right_backend(),), {"claims_level": 4})()
    check = next(c for c in collect("standard", "native") if c.op == "batch_invariance")
    assert runner.claimed(check, claiming)
    assert not runner.claimed(check, right_backend()())


def test_a_named_case_that_fails_fails_the_run():
    backend = right_backend()()
    backend.hc_post = lambda y, h, post, comb: h.copy()
    backend.departures = {"hc_post": "by option"}
    ran = runner.run(checks.Session(backend, "smoke"), cases=["hc_post/small"])
    assert not ran.ok
    assert ran.summary()[-1].startswith("FAILED")


def test_a_wrong_scale_is_called_one_and_no_rounding():
    value = np.random.default_rng(0).standard_normal(4096)
    want = Expected(value, "float32", np.full(value.shape, 1e-9), np.zeros(value.shape), np.zeros(value.shape))
    said = "; ".join(judge_rounded((1.5 * value).astype(np.float32), want).problems)
    assert "1.5 times what is wanted" in said
    assert "truncating" not in said


def test_a_narrower_declaration_is_its_own_ops_and_is_reported():
    narrower = {"cached_sparse_attn": OPS["cached_sparse_attn"].narrower}
    call = case("sparse_attn/small").call("native")
    noise = [
        expect(call, registry.oracle("native", declared), right_backend()())[0].noise.mean()
        for declared in ({}, narrower)
    ]
    assert noise[1] == noise[0]
    declaring = type("Declaring", (right_backend(),), {"narrower": narrower})()
    assert any(
        "as declared: cached_sparse_attn" in line
        for line in runner.run(checks.Session(declaring, "smoke"), cases=["hc_add/small"]).summary()
    )


@pytest.mark.parametrize(("temperature", "either"), [(10000.0, True), (0.01, False)])
def test_of_probabilities_that_rounding_makes_equal_any_may_come_first(temperature, either):
    operands = [np.array([[0, 1e-4]], np.float32), np.array([0.25], np.float32)]
    call = Call("sample", operands, {"temperature": temperature, "top_p": 1.0}, seed=0)
    for token, may in ((1, True), (0, either)):
        assert judge_sample(call, [np.full(1, token, np.int32)], right_backend()()).ok == may


def test_probabilities_on_the_grid_are_allowed_what_others_are():
    """Two rows alike: each has half, a number of BF16. Weights that are rounded before their sum
    divides them are off even so.
    """
    oracle = registry.oracle("native", {"sparse_attn": OPS["sparse_attn"].narrower})
    q, kv = np.zeros((1, 1, 16), BFLOAT16), np.ones((2, 16), BFLOAT16)
    kv[1] = -1
    operands = [q, kv, np.full(1, -1e30, np.float32), np.array([[0, 1]], np.int32)]
    exact, others = oracle.evaluate("sparse_attn", operands, {"softmax_scale": 1.0}, samples=16, seed=0)
    spread = max(float(np.abs(o - exact).max()) for o in others)
    assert 2.0**-10 < spread < 2.0**-7


def test_full_tier_has_more_seeds_whose_ids_replay():
    ran = runner.run(session("smoke"), cases=["hc_add/small#3", "hc_add/small"])
    assert ran.ok
    assert len({f.seed for f in ran.findings}) == 2
    assert {f.id for f in ran.findings} == {"hc_add/small#3", "hc_add/small"}


def test_picks_are_judged_by_margin():
    value = np.array([[3.0, 2.0, 1.999, 1.0]])
    scores = Scores(value, np.full((1, 4), 0.001), np.zeros((1, 4), bool))
    seen = np.array([4])
    assert judge_picks(np.array([[0, 2]]), scores, seen).ok  # the budget explains it
    assert not judge_picks(np.array([[0, 3]]), scores, seen).ok
    assert not judge_picks(np.array([[0, 0]]), scores, seen).ok
    assert not judge_picks(np.array([[0, 4]]), scores, seen).ok
    tied = Scores(np.array([[1.0, 2.0, 1.0]]), np.zeros((1, 3)), np.ones((1, 3), bool))
    assert judge_picks(np.array([[1, 0]]), tied, np.array([3])).ok
    assert judge_picks(np.array([[0, 1]]), tied, np.array([3])).ok  # nothing consumes an order
    assert "lower index" in judge_picks(np.array([[1, 2]]), tied, np.array([3])).problems[0]
    assert judge_picks(np.array([[1, 2]]), tied, np.array([3]), lower=False).ok


def test_truncation_is_called_bias():
    value = np.random.default_rng(0).standard_normal(4096) + 4
    down = (value.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(BFLOAT16)
    wide_open = Expected(value, "bfloat16", np.full(value.shape, 1.0), np.zeros(value.shape))
    assert "biased" in judge_rounded(down, wide_open).problems[0]
    assert judge_rounded(value.astype(BFLOAT16), wide_open).ok


@pytest.mark.parametrize("size", [4, 400])
def test_a_wrong_scale_is_not_called_a_bias_of_rounding(size):
    value = np.random.default_rng(0).standard_normal(size)
    want = Expected(value, "float32", np.full(value.shape, 1e-6), np.zeros(value.shape))
    said = "; ".join(judge_rounded((16 * value).astype(np.float32), want).problems)
    assert "all of it is 16 times what is wanted: a scale, not a rounding" in said
    assert "biased" not in said


def test_exact_takes_signed_zeros_as_equal_and_nothing_else():
    want = Expected(np.array([0.0, 1.0, np.nan], np.float32), "float32")
    assert judge_exact(np.array([-0.0, 1.0, np.nan], np.float32), want).ok
    assert (
        "want 1, budget 0"
        in judge_exact(np.array([0.0, np.nextafter(np.float32(1), 2), np.nan], np.float32), want).problems[0]
    )


def test_smoke_passes_and_names_what_was_not_tested():
    result = runner.run(session(), require=0)
    assert result.ok
    assert not result.untested()
    assert result.summary()[-1].startswith("PASSED. Not tested: ")


def test_an_unclaimed_failure_does_not_fail_the_run_but_a_required_one_does():
    cls = MUTANTS["comb_not_transposed"].build(right_backend())
    cls.claims_level = None
    ran = runner.run(checks.Session(cls(), "smoke"), ops=["hc_post"])
    assert not ran.ok  # it brings the op, which is to be right
    assert not any(f.claimed for f in ran.findings)
    for finding in ran.findings:
        finding.counts = False
    assert ran.ok
    ran.require = 1
    assert not ran.ok


def test_an_op_that_failed_is_not_told_to_be_claimed():
    cls = MUTANTS["comb_not_transposed"].build(right_backend())
    cls.claims_level = None
    ran = runner.run(checks.Session(cls(), "smoke"), ops=["hc_post", "hc_add"])
    said = next(line for line in ran.summary() if line.startswith("passed but not claimed"))
    assert said == "passed but not claimed: hc_add; name them in claims"


def test_xfails(tmp_path):
    today = datetime.date(2030, 1, 1)
    failing = MUTANTS["comb_not_transposed"].build(right_backend())
    later, past = datetime.date(2031, 1, 1), datetime.date(2029, 1, 1)

    def run(xfails):
        return runner.run(checks.Session(failing(), "smoke"), ops=["hc_post", "hc_add"], xfails=xfails, today=today)

    assert (
        run([Xfail("hc_post/*", "being fixed", later), Xfail("buffer_reuse/hc_post/*", "x", later)]).counts()["xpassed"]
        >= 1
    )
    expected = run(
        [
            Xfail(i, "being fixed", later)
            for i in ("hc_post/small", "hc_post/tokens=1", "hc_post/cancel", "nonfinite/hc_post/small")
        ]
    )
    assert expected.counts()["xfailed"] == 4
    assert expected.ok, [f.id for f in expected.failures()]
    expected.partial = False
    assert expected.level is None  # an expected failure is no pass
    assert "expired" in stale([Xfail("hc_post/small", "r", past)], {"hc_post/small"}, today)[0]
    assert "matches no case" in stale([Xfail("nothing", "r", later)], {"hc_post/small"}, today)[0]
    (tmp_path / "x.toml").write_text('[[xfail]]\ncase = "a"\nexpires = 2030-01-01\n')
    with pytest.raises(ValueError, match="needs reason"):
        load_xfails(tmp_path / "x.toml")
    for text, message in (
        ('[[xfial]]\ncase = "a"\n', "holds xfial"),
        ('[xfail]\ncase = "a"\n', "an xfail that is no list"),
        ('[[xfail]]\ncase = "a"\nreason = "b"\nexpires = 2030-01-01\nissue = 3\n', "has 'issue'"),
        ('[[xfail]]\ncase = "a"\nreason = "b"\nexpires = 2030-01-01T10:00:00\n', "needs expires"),
    ):
        (tmp_path / "x.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_xfails(tmp_path / "x.toml")


@pytest.mark.parametrize(("sticky", "started"), [(True, 2), (False, 1)])
def test_after_an_error_on_a_device_its_process_is_replaced(sticky, started, monkeypatch):
    """A device's context may stay broken; a wrong result says nothing of it."""
    starts, ends = [], iter(["passed", "failed", "error", "passed", "failed"])

    def start(self):
        starts.append(1)
        self.child = types.SimpleNamespace(stdin=io.BytesIO())
        return self.child

    monkeypatch.setattr(isolate.Process, "start", start)
    monkeypatch.setattr(isolate.Process, "close", lambda self: setattr(self, "child", None))
    monkeypatch.setattr(
        isolate.Process, "listen", lambda _self, _child, check, _until: isolate.lost(check, next(ends), "")
    )
    chosen = [case("hc_add/small")] * 5
    found = list(Workers("right", "native", {}, "smoke", sticky=sticky).execute(chosen))
    assert [f.status for f in found] == ["passed", "failed", "error", "passed", "failed"]
    assert len(starts) == started


def test_isolation_reports_what_died_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nimport dsv4_conformance.cases.checks as o\nright = o.OpCase.run\n"
        "def run(self, session):\n"
        "    if self.id == 'hc_add/small': os.abort()\n"
        "    if self.id == 'hc_add/tokens=1':\n        import time; time.sleep(60)\n"
        "    return right(self, session)\no.OpCase.run = run\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    chosen = [case(i) for i in ("hc_expand/small", "hc_add/small", "hc_add/tokens=1", "hc_post/small")]
    monkeypatch.setattr("dsv4_conformance.run.isolate.START_UP", 20.0)
    begin = time.monotonic()
    found = list(Workers(right_backend().name, "native", {}, "smoke", 2.0, 4096).execute(chosen))
    assert [f.status for f in found] == ["passed", "crashed", "timeout", "passed"]
    assert "SIGABRT" in found[1].message
    assert time.monotonic() - begin < 55


def test_processes_side_by_side_find_the_same():
    chosen = [case(i) for i in ("hc_expand/small", "hc_add/small", "hc_post/small", "hc_add/tokens=1")]
    found = list(Workers(right_backend().name, "native", {}, "smoke", jobs=2).execute(chosen))
    assert {f.id: f.status for f in found} == {c.id: "passed" for c in chosen}
    assert [f.id for f in found if f.op == "hc_add"] == ["hc_add/small", "hc_add/tokens=1"]  # a group stays together


def test_reports_hold_every_finding():
    result = runner.run(session(), ops=["swiglu"])
    data = {**finite(runner.to_json(result)), "rerun": "dsv4 conformance run --backend x"}
    json.dumps(data, default=str)
    own = {"distribution": "dsv4", "version": "1", "module": "the_reference", "files": "ab12"}
    html = page(data, own)
    assert "oracle the_reference of distribution dsv4 1, files ab12." in html
    assert "not dsv4" not in html
    assert "not dsv4&#39;s own" in page(data, own | {"distribution": "somebody<b>"})
    assert "<b>" not in page(data, own | {"distribution": "somebody<b>"}).partition("somebody")[2][:20]
    assert "<script" not in html
    assert all(f.id in html for f in result.findings)
    assert 'testcase classname="swiglu" name="swiglu/nan"' in junit(result, "x")
    assert "| `swiglu` |" in matrix([data])
    assert "| `linear` | not tested [1] |" in matrix([data])


def test_mutants_are_many_and_each_says_where_it_was_seen():
    assert len(MUTANTS) >= 40
    assert len(VARIANTS) >= 8
    assert all(m.seen for m in MUTANTS.values())


@pytest.mark.parametrize(
    "name", ["comb_not_transposed", "truncated_norm", "unstable_ties", "result_aliases_its_input", "buffer_reused"]
)
def test_a_mutant_is_killed_at_smoke(name):
    assert hunt(MUTANTS[name], tier="smoke").finding is not None


@pytest.mark.skipif(not (DOCS / "museum.json").exists(), reason="the museum has not been run yet")
def test_the_museums_documents_are_fresh():
    record = load(DOCS / "museum.json")
    assert set(record["mutants"]) == set(MUTANTS)
    assert set(record["honest"]) == set(VARIANTS)
    assert all(k["id"] for k in record["mutants"].values())
    assert not any(h["alarms"] for h in record["honest"].values())
    for name, text in pages.pages(record).items():
        assert (DOCS / name).read_text() == text, f"docs/{name} is stale: dsv4 conformance mutants --out docs"


def test_the_op_reference_is_fresh():
    text = op_reference()
    assert (DOCS / "ops.md").read_text() == text, "python -m dsv4_conformance.report.op_pages > docs/ops.md"
    assert all(f"### `{name}`" in text for name in OPS)


def test_the_support_matrix_is_made_from_the_reports():
    reports = [load_report(path) for path in sorted((DOCS.parent / "reports" / "conformance").iterdir())]
    again = "dsv4 conformance matrix reports/conformance/*"
    assert (DOCS / "matrix.md").read_text() == matrix(reports), f"{again} --out docs/matrix.md"
    readme = (DOCS.parent / "README.md").read_text()
    assert readme == between(readme, summary(reports), "README.md"), f"{again} --brief --into README.md"
    with pytest.raises(ValueError, match="no lines <!-- matrix -->"):
        between("a document", "a table\n", "a.md")


@pytest.mark.parametrize(
    ("name", "killer"),
    [
        ("untransposed_for_96_rows", "every_size/hc_post/small"),
        ("rows_of_the_padding_for_12", "every_size/rms_norm/small"),
        ("hole_ends_the_window", "compress/holes"),
        ("scratch_of_other_threads", "another_thread/linear/bf16"),
        ("inverse_of_one_head", "apply_rope/inverse_of_one_head"),
        ("sequences_modulo_16", "every_size/index_scores/small"),
    ],
)
def test_faults_that_once_passed_are_noticed(name, killer):
    check = next(c for c in collect("standard", "native") if c.id == killer)
    assert runner.run_check(check, session()).status == "passed"
    finding = runner.run_check(check, checks.Session(MUTANTS[name].build(right_backend())(), "standard"))
    assert finding.status == "failed", finding.message
