"""``dsv4 kernels`` where it cannot compile or tune, and tuning with a clock of the test's own."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from dsv4_backend_cuda import build, cli, decode, launch, roofline, tune

from dsv4_core.contract.spec import BackendError


def run(*args):
    return CliRunner().invoke(cli.command, args)


def test_an_unknown_architecture_is_named_with_the_known_ones():
    result = run("build", "--arch", "sm_90,sm_75")
    assert result.exit_code == 2
    assert "'sm_75' has no kernels here" in result.output
    assert "sm_80, sm_89, sm_90, sm_100, sm_120" in result.output


def refused(*args):
    """What the command line prints before it exits with 2."""
    with pytest.raises(BackendError) as caught:
        cli.command.main(args, standalone_mode=False)
    return str(caught.value)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    for name in ("build", "tune"):
        assert "pip install triton==" in refused(name)


def test_an_untested_triton(monkeypatch):
    monkeypatch.setattr(cli, "version", lambda _: "9.9.9")
    message = refused("build")
    assert "triton 9.9.9" in message
    assert "--untested-triton" in message


def test_tuning_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "tuning needs a GPU" in refused("tune")


def test_the_interpreters_process_is_told_to_start_anew():
    assert "unset TRITON_INTERPRET" in refused("build", "--jobs", "1")


def test_a_failed_gate_exits_with_1_and_names_itself(monkeypatch, tmp_path):
    bad = build.Result("k", "flash", 90, failures=["empty kernel"])
    monkeypatch.setattr(build, "build", lambda *_, **__: iter([bad]))
    result = run("build", "--report", str(tmp_path / "report.json"))
    assert result.exit_code == 1
    assert "k/flash/sm_90: empty kernel" in result.output
    assert (
        json.loads((tmp_path / "report.json").read_text())["heading"]
        == build.HEADING
        == "Compiled offline; model, not measured"
    )


def test_a_decode_step_by_hand():
    config = {"BLOCK_N": 64, "BLOCK_T": 16, "num_warps": 4, "num_stages": 4}
    result = build.Result("fp4_experts_decode", "shared_down", 90, config=config, loop_instructions=1000)
    step = next(s for s in decode.steps([result]) if (s.model, s.layer) == ("flash", "experts w2"))
    assert step.programs == 4096 // 64 * 6
    size = 6 * 2048 * 4096 * (1 / 2 + 1 / 32)
    assert step.megabytes == pytest.approx(size / 1e6, abs=1e-3)
    cycles = 3 * 16 * 1000  # 384 programs on 132 multiprocessors one after the other, 16 passes each
    seconds = cycles / (roofline.DEVICES[90].gigahertz * 1e9) + roofline.LAUNCH
    assert step.share == pytest.approx(size / 3350e9 / seconds, abs=1e-3)
    assert step.microseconds == pytest.approx(seconds * 1e6, abs=1e-2)
    result = build.Result("linear_decode", "flash", 90, config=config, loop_instructions=1000)
    step = next(s for s in decode.steps([result]) if (s.model, s.layer) == ("flash", "shared w2"))
    seconds = 16 * 1000 / (roofline.DEVICES[90].gigahertz * 1e9)  # in the experts' launch
    assert (step.programs, step.microseconds) == (64, pytest.approx(seconds * 1e6, abs=1e-2))


def test_candidates_change_one_option_and_keep_what_bits_depend_on():
    config = {"BLOCK_N": 64, "BLOCK_T": 16, "SPLIT": 128, "num_warps": 4, "num_stages": 1}
    found = tune.candidates("linear_decode", config)
    assert found[0] == config
    assert all(sum(c[k] != config[k] for k in config) == 1 for c in found[1:])
    assert all(c["SPLIT"] == 128 and c["BLOCK_T"] == 16 for c in found)
    assert {"BLOCK_N": 128} | {k: config[k] for k in config if k != "BLOCK_N"} in found
    assert len(found) == 4  # wider, more warps, one more stage


def test_tuning_walks_to_the_fastest_and_writes_the_table(monkeypatch, tmp_path):
    start = {"BLOCK_N": 64, "BLOCK_T": 16, "num_warps": 4, "num_stages": 1}
    best = tune.best(
        "linear_decode",
        start,
        lambda c: float("inf") if c["num_stages"] > 3 else 10 / c["BLOCK_N"] - c["num_stages"] / 100,
    )
    assert best.config == start | {"BLOCK_N": 128, "num_stages": 3}
    table = tmp_path / "table.json"
    table.write_text(launch.TABLE.read_text())
    monkeypatch.setattr(launch, "TABLE", table)
    before = json.loads(table.read_text())
    tune.write(90, {"linear_decode": best}, "a part")
    changed = [(a, b) for a, b in zip(before, json.loads(table.read_text()), strict=True) if a != b]
    assert [(b["kernel"], b["arch"], b["config"]) for _, b in changed] == [("linear_decode", 90, best.config)]
    assert changed[0][1]["how"].startswith("measured on a part")


def test_a_configuration_with_another_result_is_never_the_fastest(capsys):
    """One that is twice as fast and wrong in one element, and one that does not launch."""
    import torch

    row = {"kernel": "linear_decode", "config": {"BLOCK_N": 64, "num_stages": 1}}

    def call():
        if row["config"]["num_stages"] == 3:
            raise RuntimeError("out of resource: shared memory")
        y = torch.arange(8.0)
        y[7] += row["config"]["BLOCK_N"] == 128
        return y

    def milliseconds(_):
        return 1.0 / row["config"]["BLOCK_N"] - row["config"]["num_stages"] / 1e3

    reached = tune.best("linear_decode", row["config"], tune.measured(call, row, milliseconds))
    assert reached.config == {"BLOCK_N": 64, "num_stages": 2}
    assert "another result: linear_decode with {'BLOCK_N': 128" in capsys.readouterr().out
    assert row["config"] == {"BLOCK_N": 64, "num_stages": 1}


def test_no_candidate_is_wider_than_a_scale():
    for (kernel, arch), row in launch.table().items():
        for config in tune.candidates(kernel, row["config"]):
            assert config.get("BLOCK_N", 0) <= 128, (kernel, arch)
