"""What a vendor meets in the first hour: a package to begin with, the next op, dumps, neighbours,
pairs, watching.
"""

import importlib.util
from dataclasses import dataclass

import numpy as np
import pytest
from dsv4_conformance.check import Finding, Session
from dsv4_conformance.cli import plugin
from dsv4_conformance.cli.run import beside
from dsv4_conformance.museum.catalogue import MUTANTS
from dsv4_conformance.museum.hunt import right_backend
from dsv4_conformance.run import earlier, progress, runner, watching
from dsv4_conformance.run.catalogue import collect

from dsv4_core.contract.spec import OPS


def made(folder, name="acme"):
    plugin.write(name, folder)
    spec = importlib.util.spec_from_file_location(f"dsv4_backend_{name}", folder / f"dsv4_backend_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.dsv4_backend()


def test_a_new_plugin_passes_level_0_and_is_told_what_comes_next(tmp_path):
    backend = made(tmp_path / "p")()
    found = progress.states(backend)
    assert {s.op for s in found if s.own} == {s.op for s in found if s.level == 0}
    assert all(s.of and s.passed == s.of for s in found if s.own)
    assert any(
        line.startswith("next: write rms_norm(self, x, weight, *, eps)") for line in progress.lines(found, backend)
    )
    assert 'acme = "dsv4_backend_acme"' in (tmp_path / "p" / "pyproject.toml").read_text()


def test_what_a_new_plugin_has_passes_standard(tmp_path):
    backend = made(tmp_path / "p")()
    own = [op for op in OPS if type(backend).implements(op)]
    ran = runner.run(Session(backend, "standard"), ops=own)
    assert [f.id for f in ran.findings if f.status not in ("passed", "unsupported")] == []
    assert sum(f.status == "passed" for f in ran.findings) > 500


def test_what_is_wrong_comes_before_what_is_missing(tmp_path):
    cls = made(tmp_path / "p")
    cls.hc_expand = lambda self, x, *, hc: np.zeros((len(x), hc, x.shape[1]), x.dtype)
    backend = cls()
    assert "next: mend hc_expand: hc_expand/small" in progress.lines(progress.states(backend), backend)


def test_no_operands_are_made_for_an_op_that_is_not_there(tmp_path, monkeypatch):
    backend = made(tmp_path / "p")()
    check = next(c for c in collect("smoke", "native") if c.id == "rms_norm/small")
    monkeypatch.setattr(type(check), "call", None)
    finding = runner.run_check(check, Session(backend, "smoke"))
    assert (finding.status, finding.message) == ("unsupported", "backend 'acme' does not implement it")


@pytest.mark.parametrize("name", ["9x", "Acme", "a-b", "class", "reference"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        plugin.write(name, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="holds files already"):
        plugin.write("acme", tmp_path)


def test_a_failing_case_is_dumped_and_shown_with_its_neighbours(tmp_path):
    failing = MUTANTS["comb_not_transposed"].build(right_backend())()
    ran = runner.run(Session(failing, "smoke", dump=tmp_path), cases=["hc_post/small"])
    held = np.load(tmp_path / "hc_post__small.npz")
    assert {"operand.y", "operand.h", "operand.post", "operand.comb", "got.0", "want.0", "budget.0", "scalars"} == set(
        held
    )
    at = tuple(ran.findings[0].worst["element"])
    assert held["got.0"][at] == ran.findings[0].worst["got"]
    lines = beside(ran.findings[0].worst)
    assert f"[{ran.findings[0].worst['got']:.6g}" in lines[1].replace(" ", "")
    assert len(lines) == 3


@dataclass(frozen=True)
class Named:
    id: str


@pytest.mark.parametrize(
    ("needed", "found"), [({"c"}, ["c", "x"]), ({"b", "d"}, ["b", "c", "d", "x"]), ({"z"}, None), (set(), None)]
)
def test_the_earlier_calls_that_a_failure_needs_are_found(needed, found):
    before = [Named(n) for n in "abcd"]

    def fresh(checks):
        bad = needed <= {c.id for c in checks[:-1]}
        return [Finding(c.id, "op", "op", 1, "failed" if bad and c is checks[-1] else "passed") for c in checks]

    chain = earlier.explain(Named("x"), before, fresh)
    assert (chain and [c.id for c in chain]) == found
    if chain:
        assert "--case x" in earlier.words(chain)


def test_watching_runs_again_after_a_change_and_keeps_the_last_status(tmp_path, monkeypatch):
    source = tmp_path / "watched_backend.py"
    source.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    runs = []

    class Done:
        returncode = 1

    monkeypatch.setattr(watching.subprocess, "run", lambda command, check: runs.append(command) or Done())
    turns = iter((lambda: None, lambda: source.with_name("watched_backend.py").touch(), None))

    def wait():
        turn = next(turns)
        if turn is None:
            raise KeyboardInterrupt
        turn()

    import os

    os.utime(source, (1, 1))
    assert watching.watching("watched_backend", ["--op", "hadamard"], wait) == 1
    assert len(runs) == 2
    assert runs[0][-2:] == ["--op", "hadamard"]
