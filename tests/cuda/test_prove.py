"""``dsv4 kernels prove`` as a machine: what it remembers, leaves out and reports. Its stages run
whole in `make proof`, dry.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from dsv4_backend_cuda import cli, prove
from dsv4_backend_cuda.prove import Prover

PRINT = [sys.executable, "-c"]


def test_what_ended_is_not_run_again(tmp_path):
    def steps(p):
        p.run("one", [*PRINT, f"open({str(tmp_path / 'count')!r}, 'a').write('x')"])

    for _ in range(2):
        assert Prover(tmp_path / "out", dry=False).stage("smoke", steps).state == "passed"
    assert (tmp_path / "count").read_text() == "x"
    Prover(tmp_path / "out", dry=False).stage("smoke", steps, again=True)
    assert (tmp_path / "count").read_text() == "xx"


def test_a_failure_stays_one_and_is_shown_with_its_last_lines(tmp_path):
    p = Prover(tmp_path, dry=False)
    stage = p.stage("smoke", lambda p: p.run("bad", [*PRINT, "print('why'); raise SystemExit(3)"]))
    assert stage.state == "failed"
    assert stage.ran["bad"].status == 3
    text = prove.report(p)
    assert "## smoke/bad: failed" in text
    assert "    why" in text
    assert "| versions | not started |" in text


def test_a_stage_that_runs_out_of_time_goes_on_next_time(tmp_path):
    def steps(p):
        p.run("quick", [*PRINT, "pass"])
        p.run("slow", [*PRINT, "import time; time.sleep(60)"])
        p.run("after", [*PRINT, "pass"])

    stage = Prover(tmp_path, dry=False, seconds=3).stage("times", steps)
    assert [r.state for r in stage.ran.values()] == ["passed", "late", "late"]
    assert stage.state == "late"
    assert not stage.ended
    began = json.loads((tmp_path / "prove.json").read_text())["stages"]["times"]["ran"]["quick"]
    again = Prover(tmp_path, dry=False, seconds=1).stage("times", steps)
    assert vars(again.ran["quick"]) == began


def test_a_dry_run_leaves_out_what_wants_a_gpu_and_says_so(tmp_path):
    p = Prover(tmp_path, dry=True)
    assert p.stage("counters", prove.counters).line.split() == [
        "counters",
        "left",
        "out",
        "1",
        "left",
        "out,",
        "0",
        "s",
    ]
    text = prove.report(p)
    assert "| counters | left out | 1 | 0 | 0 | 0 | 1 | 0 |" in text
    assert text.splitlines()[2] == "**A dry run: no GPU, no time, no proof.**"
    assert "- counters/ncu: a dry run has no GPU" in text
    with pytest.raises(FileExistsError, match="holds a dry run"):
        Prover(tmp_path, dry=False)


def test_a_missing_tool_is_left_out(tmp_path):
    p = Prover(tmp_path, dry=False)
    p.stage("counters", lambda p: p.run("x", ["true"], tool="no-such-tool"))
    assert "- counters/x: no-such-tool is not on the path" in prove.report(p)


def test_predictions_stand_beside_results(tmp_path):
    row = {
        "model": "flash",
        "ratio": 0,
        "step": "1 x 1 after 8191",
        "op": "linear",
        "kernels": "linear_decode",
        "floor_us": 1.26,
        "us": 11.04,
        "torch_us": None,
    }
    (tmp_path / "times.json").write_text(json.dumps([row]))
    (tmp_path / "kernels.json").write_text(
        json.dumps({"decode": [{"model": "flash", "layer": "wq_a", "microseconds": 10.5}]})
    )
    text = "\n".join(prove.compared(tmp_path))
    assert "| flash | wq_a | 1.26 | 10.5 | 11.0 | not measured |" in text
    assert "## Furthest from their floors" in text


def test_where_nothing_was_predicted_there_is_no_comparison(tmp_path):
    (tmp_path / "times.json").write_text("[]")
    (tmp_path / "kernels.json").write_text(json.dumps({"decode": []}))
    assert prove.compared(tmp_path) == []


def test_each_stage_is_told_as_it_ends_and_one_in_which_nothing_ran_is_no_failure(tmp_path):
    found = CliRunner().invoke(cli.command, ["prove", "--dry-run", "--out", str(tmp_path), "--stage", "tune"])
    assert found.exit_code == 0, found.output
    assert found.output.startswith("tune           left out     3 left out, 0 s\n")
    assert found.output.rstrip().endswith(f"report: {tmp_path / 'report.md'}")


def test_without_a_gpu_it_says_what_a_dry_run_is_for(tmp_path):
    found = CliRunner().invoke(cli.command, ["prove", "--out", str(tmp_path / "out")])
    assert found.exit_code != 0
    assert not (tmp_path / "out").exists()


def test_nothing_to_warm():
    found = CliRunner().invoke(cli.command, ["warm"])
    assert found.exit_code == 2
    assert "name a MODEL directory, or --preset" in found.output
    found = CliRunner().invoke(cli.command, ["warm", "--preset", "flash", "--arch", "75"])
    assert found.exit_code == 2
    assert "compute capability 7.5 has no kernels here" in found.output


def test_every_call_of_a_layer_has_a_floor(tmp_path):
    """The planner sees the calls that the backend gets; Flash's and Pro's layers, launched dry."""
    out = tmp_path / "times.json"
    code = f"import sys; sys.argv = ['x', 'times', '--json', {str(out)!r}, '--dry-run']; from dsv4_backend_cuda.proving import main; main()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    rows = json.loads(out.read_text())
    assert {(r["model"], r["ratio"]) for r in rows} == {(m, r) for m in ("flash", "pro") for r in (0, 4, 128)}
    assert all(r["us"] is None for r in rows)
    layer = sum(r["floor_us"] for r in rows if (r["model"], r["ratio"], r["step"]) == ("flash", 4, "1 x 1 after 8191"))
    assert layer == pytest.approx(0.9 * 82, rel=0.05)  # 82 us by hand, at nine tenths of the bandwidth


@pytest.mark.proof
def test_all_stages_dry(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_core", "kernels", "prove", "--out", str(tmp_path), "--dry-run"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "A dry run" in (tmp_path / "report.md").read_text()
