from dataclasses import replace

import pytest

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.create import stored_bytes
from dsv4_core.checkpoint.layout import canonical_name, parameters, tensor_specs, unpacked


def test_parameter_counts_are_the_published_ones():
    flash, pro = parameters(PRESETS["flash"]), parameters(PRESETS["pro"])
    assert (round(flash.total / 1e9, 1), round(flash.active / 1e9, 2)) == (284.3, 13.27)
    assert (round(pro.total / 1e9), round(pro.active / 1e9, 2)) == (1573, 48.85)


def test_tensor_counts_of_the_published_models():
    # 43 layers + MTP, 256 experts x 3 projections x (weight, scale)
    assert sum(".experts." in name for name in tensor_specs(PRESETS["flash"])) == 44 * 256 * 3 * 2
    assert sum(".experts." in name for name in tensor_specs(PRESETS["pro"])) == 62 * 384 * 3 * 2


@pytest.mark.parametrize(
    ("older", "published"),
    [
        ("model.embed.weight", "embed.weight"),
        ("layers.3.self_attn.wq_a.weight", "layers.3.attn.wq_a.weight"),
        ("layers.3.mlp.experts.7.w1.weight", "layers.3.ffn.experts.7.w1.weight"),
        ("layers.3.attn.wkv.weight_scale_inv", "layers.3.attn.wkv.scale"),
        ("layers.3.ffn.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
        ("model.mtp.0.self_attn.wo_a.weight_scale_inv", "mtp.0.attn.wo_a.scale"),
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.hc_head.hc_base", "hc_head_base"),
        ("model.layers.2.attn.norm.weight", "layers.2.attn.kv_norm.weight"),
        ("model.layers.2.attn.compressor.norm.weight", "layers.2.attn.compressor.norm.weight"),
        ("layers.2.attn.wq_a.weight_scale", "layers.2.attn.wq_a.scale"),
    ],
)
def test_other_spellings(older, published):
    assert canonical_name(older) == published


@pytest.mark.parametrize("name", ["out.weight", "layers.0.attention.wq_a.weight", "layers.0.attn.wq_a.qweight"])
def test_other_spellings_stay_and_are_not_in_the_layout(name):
    assert canonical_name(name) == name
    assert name not in tensor_specs(PRESETS["tiny"])


def test_layout_follows_ratio_and_routing():
    specs = tensor_specs(PRESETS["tiny"])
    for layer, ratio in enumerate(PRESETS["tiny"].compress_ratios[:6]):
        assert (f"layers.{layer}.attn.compressor.ape" in specs) == (ratio > 0)
        assert (f"layers.{layer}.attn.indexer.wq_b.scale" in specs) == (ratio == 4)
        assert (f"layers.{layer}.ffn.gate.tid2eid" in specs) == (layer < 1)
        assert (f"layers.{layer}.ffn.gate.bias" in specs) == (layer >= 1)
    assert specs["layers.2.attn.compressor.ape"].shape == (4, 256)
    assert specs["layers.3.attn.compressor.ape"].shape == (128, 128)
    assert not any("compressor" in name or "tid2eid" in name for name in specs if name.startswith("mtp."))


def test_expert_formats():
    fp4 = tensor_specs(PRESETS["tiny"])
    fp8 = tensor_specs(PRESETS["tiny"], "e4m3")
    weight, scale = "layers.0.ffn.experts.5.w2.weight", "layers.0.ffn.experts.5.w2.scale"
    assert (fp4[weight].dtype, fp4[weight].shape, fp4[scale].shape) == ("I8", (256, 64), (256, 4))
    assert (fp8[weight].dtype, fp8[weight].shape, fp8[scale].shape) == ("F8_E4M3", (256, 128), (2, 1))
    assert unpacked(fp4[weight]) == unpacked(fp8[weight]) == (256, 128)
    assert {name for name, spec in fp4.items() if spec != fp8[name]} == {name for name in fp4 if ".experts." in name}


@pytest.mark.parametrize(
    ("preset", "tensors", "size", "drafts"),
    [("flash-0731", 72317, 166878536440, 4705), ("pro-0813", 149782, 892727580904, 7009)],
)
def test_official_releases_have_their_published_counts_and_bytes(preset, tensors, size, drafts):
    specs = tensor_specs(PRESETS[preset])
    assert (len(specs), sum(map(stored_bytes, specs.values()))) == (tensors, size)
    assert sum(name.startswith("mtp.") for name in specs) == drafts


def test_an_mtp_block_has_the_ratio_that_the_list_gives_it():
    specs = tensor_specs(replace(PRESETS["tiny"], compress_ratios=(0, 0, 4, 128, 4, 128, 4)))
    assert "mtp.0.attn.indexer.wq_b.weight" in specs
