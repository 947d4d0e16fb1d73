"""Rung L2b: nothing of a decode step runs on AICPU, nothing is unknown, and the host reads
nothing.
"""

import dataclasses

import pytest
from dsv4_backend_ascend.capability import GENERATIONS
from dsv4_backend_ascend.launches import Pair, count, lines, place

from dsv4_core.checkpoint.config import PRESETS

SMALL = dataclasses.replace(
    PRESETS["flash"], vocab_size=256, num_hidden_layers=3, n_routed_experts=8, num_experts_per_tok=2, num_hash_layers=1,
    num_nextn_predict_layers=0, compress_ratios=(0, 4, 128),
)  # fmt: skip
"""Three layers, one of each kind, of Flash's own widths."""


@pytest.mark.parametrize("tier", ["composed", "cann", "vendor"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_nothing_of_a_decode_step_runs_on_aicpu(generation, tier):
    step = count(SMALL, generation, tier=tier, start=5000)
    assert step.at("AICPU") == {}
    assert step.at("unknown") == {}
    assert set(step.layers) == {None, 0, 1, 2}
    assert any("::npu" in f"::{pair.op.rpartition(':')[2]}" for pair in step.pairs) == (tier != "composed")


def test_each_tier_launches_less_than_the_one_below():
    launched = {tier: count(SMALL, "910B", tier=tier, start=5000).launched() for tier in ("composed", "cann", "vendor")}
    assert launched["vendor"] < launched["cann"] < launched["composed"]


def test_a_step_in_words_names_what_runs_where():
    step = count(SMALL, "910B", tier="cann", start=100)
    step.note(0, Pair("aten::searchsorted.Tensor", "int32"))
    step.note(0, Pair("aten::frobnicate", "int32"))
    said = "\n".join(lines(step))
    assert "AICPU: 1 (1 x aten::searchsorted.Tensor int32)" in said
    assert "unknown: 1 (1 x aten::frobnicate int32)" in said


@pytest.mark.parametrize(
    ("op", "dtype", "a2", "a5"),
    [
        ("aten::sort.stable", "int32", "AICPU", "AI Core"),
        ("aten::sort.stable", "float32", "AI Core", "AI Core"),
        ("aten::bitwise_left_shift.Tensor_Scalar", "int64", "AICPU", "AICPU"),
        ("aten::__rshift__.Scalar", "int32", "AICPU", "AI Core"),
        ("aten::index_copy_", "uint8", "AICPU", "AI Core"),
        ("aten::argmax", "uint8", "AICPU", "AICPU"),
        ("aten::div.Tensor_mode", "int64", "AICPU", "AI Core"),
        ("aten::view.dtype", "uint8", "none", "none"),
    ],
)
def test_the_table(op, dtype, a2, a5):
    assert [place(Pair(op, dtype), generation) for generation in ("910B", "910C", "950")] == [a2, a2, a5]
