"""`dsv4 ascend prove`: stages that go on where they stopped, and say what they are of."""

import json
import sys

import pytest
from click.testing import CliRunner
from dsv4_backend_ascend import prove, selftest
from dsv4_backend_ascend.cli import command
from dsv4_backend_ascend.selftest_cases import CASES

from dsv4_core.contract.backend import BackendError

QUICK = [sys.executable, "-S", "-c"]


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Three stages: one passes, one fails, one writes a file a time, so that a second run of a
    command shows.
    """
    marks = tmp_path / "marks"

    def good(p):
        """Passes."""
        p.run("one", *QUICK, f"open({str(marks)!r}, 'a').write('x')")
        p.run("npu", *QUICK, "raise SystemExit(9)", on_npu=True)
        p.run("tool", "no-such-tool")

    def bad(p):
        """Fails."""
        p.run("two", *QUICK, "print('why'); raise SystemExit(3)")

    def slow(p):
        """Is cut off."""
        p.run("three", *QUICK, "import time; time.sleep(60)")

    monkeypatch.setattr(prove, "STAGES", {"good": good, "bad": bad, "slow": slow})
    return marks


def ask(out, *words):
    return CliRunner().invoke(command, ["prove", "--out", str(out), *words])


def test_what_ended_is_not_run_again_and_the_report_says_what_it_is_of(stages, tmp_path):
    out = tmp_path / "out"
    first = ask(out, "--simulate", "910B", "--stage", "good")
    assert first.exit_code == 0, first.output
    assert ask(out, "--simulate", "910B", "--stage", "good").exit_code == 0
    assert stages.read_text() == "x"
    assert ask(out, "--simulate", "910B", "--stage", "good", "--again").exit_code == 0
    assert stages.read_text() == "xx"
    report = (out / "report.md").read_text()
    assert report.startswith("# `dsv4 ascend prove` on simulated CANN (910B), on a CPU: nothing of hardware was proven")
    assert "- npu: left out, 0.0 s (no NPU in a simulated run)" in report
    assert "(no-such-tool is not on the path)" in report
    assert "## bad: not finished" in report


def test_a_failed_command_is_named_and_its_output_is_kept(stages, tmp_path):
    found = ask(tmp_path / "out", "--simulate", "910B", "--stage", "bad")
    assert found.exit_code == 1
    assert "failed two" in found.output
    assert (tmp_path / "out" / "bad" / "two.log").read_text() == "why\n"


def test_what_ran_past_its_time_is_left_for_the_next_run(stages, tmp_path):
    found = ask(tmp_path / "out", "--simulate", "910B", "--stage", "slow", "--seconds", "0.5")
    assert found.exit_code == 3, found.output
    state = json.loads((tmp_path / "out" / "prove.json").read_text())["stages"]["slow"]
    assert (state["ended"], state["ran"]["three"]["state"]) == (False, "late")


def test_a_folder_of_another_run_a_chip_and_a_stage_that_are_not_there_are_refused(stages, tmp_path):
    prove.Prover(tmp_path / "a", simulate="910B").stage("good", prove.STAGES["good"])
    with pytest.raises(BackendError, match="holds a run on simulated 910B; choose another folder"):
        prove.Prover(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "prove.json").write_text('{"dry": true, "stages": {}}')
    with pytest.raises(BackendError, match="holds a run of another backend"):
        prove.Prover(tmp_path / "b")
    with pytest.raises(BackendError, match="simulate '910A' is not one of 910B, 910C, 950"):
        prove.Prover(tmp_path / "c", simulate="910A")
    with pytest.raises(BackendError, match="stage 'all' is not one of good, bad, slow"):
        prove.stages(["all"])


def test_every_command_of_the_stages_is_one_that_there_is(monkeypatch, tmp_path):
    """No command is run: their words are held to the command line's own options."""
    from dsv4_core.cli import root

    asked = []
    monkeypatch.setattr(
        prove.Prover,
        "run",
        lambda self, name, *argv, **_: asked.append([*map(str, argv)]) or prove.Ran(name, [], "passed"),
    )
    for simulate in (None, "950"):
        prover = prove.Prover(tmp_path / str(simulate), simulate=simulate)
        for steps in prove.STAGES.values():
            steps(prover)
    mine = {tuple(words[3:]) for words in asked if words[1:3] == ["-m", "dsv4_core"]}
    assert len(mine) > 60
    for words in mine:
        named = [word for word in words if word.startswith("--")]
        commands = []
        for word in words:
            if word.startswith("-"):
                break
            commands.append(word)
        shown = CliRunner().invoke(root, [*commands, "--help"]).output
        assert all(option in shown for option in named), (words, shown[:200])


class TestApart:
    def test_contracts_have_processes_of_their_own(self):
        cases = [case for case in CASES if case.contract in {"swiglu", "hc_post"} and not case.gigabytes]
        found = list(selftest.apart(cases, small=True, words=["--simulate", "910B"]))
        assert {(o.contract, o.case) for o in found} == {(case.contract, case.name) for case in cases}
        assert not any(o.found for o in found)
        assert any(o.ops == ("npu_clipped_swiglu",) for o in found)

    def test_a_process_that_ends_without_a_report_fails_its_contract_alone(self):
        cases = [case for case in CASES if case.contract == "swiglu"][:1]
        (found,) = selftest.apart(cases, words=["--simulate", "no such chip"])
        assert found.contract == "swiglu"
        assert "its process ended with 2" in found.found

    def test_a_contract_without_cases_is_named(self):
        with pytest.raises(BackendError, match="contract 'sort' is not one of rms_norm"):
            selftest.chosen(["sort"])
