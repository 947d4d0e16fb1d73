import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_conformance.model import golden
from rewriting import Tensor, change, poke, read, shard_names, small, weight_map

from dsv4_core.checkpoint.audit import BUFFER, audit
from dsv4_core.checkpoint.shards import Shard
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.cli.inspect import command

SCALE = "layers.1.attn.wq_b.scale"  # [4, 1] of FP8 [512, 128]
GROUPS = "layers.2.ffn.experts.1.w1.scale"  # [128, 8] of FP4 [128, 256]


@pytest.fixture
def model(tmp_path):
    return small(tmp_path / "model")


def found(path):
    """Audit, and give rule, tensor and sentence of everything found."""
    return [(f.rule, f.tensor, f.text, f.severity) for f in audit(Checkpoint(path, check=False))]


@pytest.mark.parametrize("name", golden.MODELS)
def test_recorded_checkpoints_are_sound(name):
    assert found(golden.checkpoint_path(name)) == []


def test_random_checkpoint_is_sound(model):
    assert found(model) == []


def test_scales_all_zero(model):
    poke(model, GROUPS, 0, np.zeros(128 * 8, np.uint8))
    text = f"all 1024 scale bytes are 0, which is 2^-127: nothing is left of {GROUPS[:-5]}weight; fetch it again"
    assert found(model) == [("scale all zero", GROUPS, text, "error")]


def test_some_scales_zero_is_a_note(model):
    poke(model, GROUPS, 19, np.zeros(2, np.uint8))
    text = "2 of 1024 scale bytes (first at [2, 3]) are 0, which is 2^-127"
    assert found(model) == [("scale byte 0", GROUPS, text, "note")]


def test_scale_byte_255(model):
    poke(model, SCALE, 2, np.array([255], np.uint8))
    text = f"1 of 4 scale bytes (first at [2, 0]) is 255, which is NaN; requantise {SCALE[:-5]}weight"
    assert found(model) == [("scale byte 255", SCALE, text, "error")]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("norm.weight", np.array([0x7FC0, 0xFF80], "<u2"), "2 of 256 values (first at [5]) are NaN or infinite"),
        ("layers.2.attn.attn_sink", np.array([np.inf], "<f4"), "1 of 4 values (first at [3]) is NaN or infinite"),
        ("hc_head_fn", np.array([np.nan], "<f4"), "1 of 4096 values (first at [0, 5]) is NaN or infinite"),
        (
            "layers.0.attn.wkv.weight",
            np.array([0x7F, 0xFF], "u1"),
            "2 of 32768 values (first at [0, 5]) are NaN (codes",
        ),
    ],
)
def test_nan_and_infinity(model, name, values, said):
    poke(model, name, 3 if name.endswith("attn_sink") else 5, values)
    [(rule, tensor, text, severity)] = found(model)
    assert (rule, tensor, severity) == ("NaN or infinity", name, "error")
    assert text.startswith(said)
    assert text.endswith("fetch it again")


def test_largest_finite_values_are_no_nan(model):
    poke(model, "norm.weight", 0, np.array([0x7F7F, 0xFF7F], "<u2"))
    poke(model, "hc_head_fn", 0, np.array([np.finfo(np.float32).max, np.finfo(np.float32).min], "<f4"))
    poke(model, "layers.0.attn.wkv.weight", 0, np.array([0x7E, 0xFE], "u1"))
    poke(model, SCALE, 0, np.array([254], "u1"))
    assert found(model) == []


@pytest.mark.parametrize("expert", [-1, 4])
def test_expert_ids_out_of_range(model, expert):
    name = "layers.0.ffn.gate.tid2eid"
    poke(model, name, 7, np.array([expert], "<i8"))
    text = "1 of 1024 expert ids (first at [3, 1]) is outside 0 .. 3 (4 routed experts): "
    text += "no expert has a negative number" if expert < 0 else "the table is of"
    ((rule, tensor, said, severity),) = found(model)
    assert (rule, tensor, severity) == ("expert id out of range", name, "error")
    assert said.startswith(text)


def test_values_beyond_the_first_buffer_are_read(tmp_path):
    model = small(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    rows = BUFFER // (2 * config["hidden_size"]) + 100
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    for name in ("embed.weight", "head.weight"):
        change(model, name, Tensor("BF16", (rows, 256), bytes(rows * 512)))
    change(model, "layers.0.ffn.gate.tid2eid", Tensor("I64", (rows, 2), bytes(16 * rows)))
    poke(model, "head.weight", (rows - 1) * 256 + 7, np.array([0x7F80], "<u2"))
    [(_, tensor, text, _)] = found(model)
    assert tensor == "head.weight"
    assert f"(first at [{rows - 1}, 7])" in text


def test_a_hole_is_said_to_be_one_and_not_a_zero_scale(model):
    """A preallocated download that stopped: every size is right, and half of a file was never
    written.
    """
    file = model / shard_names(model)[0]
    data = file.read_bytes()
    keep = len(data) // 2 // 4096 * 4096
    with file.open("wb") as out:
        out.write(data[:keep])
        out.truncate(len(data))
    if file.stat().st_blocks * 512 >= len(data):
        pytest.skip("this file system has no sparse files")
    findings = found(model)
    assert {rule for rule, *_ in findings} == {"hole"}
    lost = [name for name, stored in Shard(file).entries.items() if stored.end > keep]
    assert [tensor for _, tensor, *_ in findings] == lost
    whole = next(text for _, tensor, text, _ in findings if tensor == lost[-1])
    size = len(read(model, file.name)[lost[-1]].data)
    assert whole.startswith(
        f"{size} of {size} bytes are a hole: never written, they read as zero; fetch the file again"
    )


def test_structural_findings_come_first_and_do_not_stop_the_audit(model):
    change(model, "norm.weight", None)
    poke(model, SCALE, 0, np.array([255], np.uint8))
    assert [rule for rule, *_ in found(model)] == ["missing tensor", "scale byte 255"]


def test_memory_is_bounded_by_the_buffer(tmp_path):
    """Auditing 64 MiB of one tensor may not take 64 MiB."""
    model = small(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    rows = (64 << 20) // 512
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    for name in ("embed.weight", "head.weight"):
        change(model, name, Tensor("BF16", (rows, 256), b"\x01\x00" * (rows * 256)))
    change(model, "layers.0.ffn.gate.tid2eid", Tensor("I64", (rows, 2), bytes(16 * rows)))
    script = (
        "import resource, sys; from dsv4_core.checkpoint.audit import audit; from dsv4_core.checkpoint.weights import Checkpoint\n"
        "checkpoint = Checkpoint(sys.argv[1]); peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); assert audit(checkpoint) == []; print(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", script, model], capture_output=True, text=True, check=True)
    assert int(out.stdout) * 1024 < 6 * BUFFER  # the buffer, a mask of it, temporaries


def test_inspect_prints_the_checkpoint_and_exits_with_0():
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0, result.output
    assert "585 tensors, 9.97 MB, 1 file\n" in result.output
    assert "parameters: 8.48M total, 4.42M active per token" in result.output
    assert "layers: 2 window (ratio 0), 2 CSA (ratio 4), 2 HCA (ratio 128)" in result.output
    assert "sound: names, dtypes, shapes, scale grids, values" in result.output


def test_inspect_exits_with_1_and_names_what_it_found(model):
    poke(model, SCALE, 0, np.array([255], np.uint8))
    result = CliRunner().invoke(command, [str(model)])
    assert result.exit_code == 1
    file = weight_map(model)[SCALE]
    assert f"error: {file}: {SCALE}: 1 of 4 scale bytes (first at [0, 0]) is 255, which is NaN" in result.output
    assert "1 error in names, dtypes, shapes, scale grids, values; --json lists every one" in result.output


def test_inspect_without_audit_reads_no_values(model):
    poke(model, SCALE, 0, np.array([255], np.uint8))
    result = CliRunner().invoke(command, [str(model), "--no-audit"])
    assert result.exit_code == 0
    assert "(values not read: --no-audit)" in result.output


def test_inspect_json_lists_every_finding(model):
    for layer in range(3):
        for norm in ("attn_norm", "ffn_norm"):
            change(model, f"layers.{layer}.{norm}.weight", None)
    result = CliRunner().invoke(command, [str(model), "--json"])
    assert result.exit_code == 1
    document = json.loads(result.output)["result"]
    assert len(document["findings"]) == 6
    assert document["findings"][0]["rule"] == "missing tensor"
    assert document["config"]["compress_ratios"] == [0, 4, 128, 0]
    assert sum(group["bytes"] for group in document["tensors"]) == document["bytes"]
    assert set(document["parameters"]) == {"total", "active", "draft"}


def test_inspect_of_a_checkpoint_without_any_readable_shard(model):
    for file in shard_names(model):
        (model / file).unlink()
    result = CliRunner().invoke(command, [str(model)])
    assert result.exit_code == 1
    assert "no such file, and model.safetensors.index.json names it" in result.output
