from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from dsv4_core.checkpoint.audit import audit
from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.layout import tensor_specs
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.cli import root
from dsv4_core.contract.registry import create
from dsv4_core.planning import rehearse

WIDE = replace(  # many experts, few filled tensors
    PRESETS["flash"],
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    hidden_size=2048,
    num_attention_heads=16,
    moe_intermediate_size=1024,
    vocab_size=4096,
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    path = tmp_path_factory.mktemp("rehearsal") / "flash"
    rehearse.write(path, WIDE, seed=2)
    return path


def test_big_weights_take_no_room_and_are_reported_as_holes(sparse):
    checkpoint = Checkpoint(sparse)
    assert checkpoint.nbytes > 3e9
    filled = [name for name, spec in tensor_specs(checkpoint.config).items() if rehearse.filled(spec)]
    held = sum(checkpoint.stored(name).end - checkpoint.stored(name).begin for name in filled)
    assert rehearse.on_disk(sparse) == pytest.approx(held, rel=0.05)  # headers and whole blocks beside them
    for name in (
        "embed.weight",
        "layers.2.attn.wq_b.scale",
        "layers.0.ffn.gate.tid2eid",
        "layers.1.hc_ffn_fn",
        "layers.2.attn_norm.weight",
    ):
        assert checkpoint.array(name).view(np.uint8).any(), name


def test_the_audit_tells_holes_from_zeros(tmp_path):
    rehearse.write(tmp_path / "tiny", PRESETS["tiny"])
    checkpoint = Checkpoint(tmp_path / "tiny")
    found = {f.tensor: f.rule for f in audit(checkpoint)}
    holes = {name for name, rule in found.items() if rule == "hole"}
    assert "layers.0.ffn.experts.0.w1.weight" in holes
    assert "scale all zero" not in found.values()
    assert not holes & {name for name, spec in checkpoint.layout.items() if rehearse.filled(spec)}


def test_tokens_go_through_every_layer_and_memory_is_given_back(sparse):
    checkpoint, seen = Checkpoint(sparse), []
    model = rehearse.Rehearsal(checkpoint, create("reference", weight_cache=0), memory=1 << 28)
    plain = model.note
    model.note = lambda: seen.append(plain())
    before = rehearse.resident("RssFile")  # libraries of other tests, torch's above all
    reports = list(rehearse.run(model, [1, 2], 2))
    assert len(seen) == 2 * (checkpoint.config.num_hidden_layers + 1)
    assert [r.tokens for r in reports] == [2, 1]
    assert all(0 <= r.sampled < checkpoint.config.vocab_size for r in reports)
    files = rehearse.resident("RssFile") - before
    assert files < sum(r.touched for r in reports) / 2, "pages of weights were kept"
    assert rehearse.summary(reports)["predicted"] == sum(r.predicted for r in reports)


def test_command_line_writes_once_and_runs_twice(tmp_path):
    asked = ["rehearse", "--preset", "tiny", "--out", str(tmp_path / "tiny"), "--tokens", "2", "--backend", "reference"]
    first, second = (CliRunner().invoke(root, asked) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert "wrote" in first.output
    assert "wrote" not in second.output
    assert "plan said" in second.output
    other = CliRunner().invoke(root, [*asked[:2], "flash", *asked[3:]])
    assert "is not a checkpoint of flash" in str(other.exception)
