"""Checkpoints as people have them: each is read with the published one's bytes and numbers, or
named in one sentence.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dsv4_backend_reference import ReferenceBackend
from rewriting import (
    INDEX,
    Tensor,
    change,
    cut_experts,
    read,
    rename,
    retype,
    shard_names,
    small,
    stored,
    weight_map,
    write,
)

import dsv4_core as dsv4
from dsv4_core import cli
from dsv4_core.checkpoint import spelling_page
from dsv4_core.checkpoint.config import PRESETS, ConfigError, ModelConfig
from dsv4_core.checkpoint.create import create
from dsv4_core.checkpoint.findings import CheckpointError, ForeignError
from dsv4_core.checkpoint.layout import parameters
from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.dtypes import BFLOAT16, ScaledArray
from dsv4_core.graph.generate import generate
from dsv4_core.graph.model import Model

EXPERT = "layers.2.ffn.experts.3.w2"


@pytest.fixture
def model(tmp_path):
    return small(tmp_path / "model")


def config(path, remove=(), **changes):
    """Rewrite config.json."""
    values = json.loads((path / "config.json").read_text()) | changes
    for key in remove:
        del values[key]
    (path / "config.json").write_text(json.dumps(values))


def values(checkpoint, name):
    """A tensor's values in float32, whatever it is stored in."""
    if name.endswith(".scale"):
        return None
    if name.endswith(".weight"):
        weight = checkpoint.weight(name.removesuffix(".weight"))
        return weight.dequantise() if isinstance(weight, ScaledArray) else np.asarray(weight, np.float32)
    return np.asarray(checkpoint.array(name), np.float64)


def same_model(path, expected, *, notes=()):
    """Every tensor has the published values and the published dtype's type; the notes say what was
    read.
    """
    checkpoint = Checkpoint(path)
    assert set(checkpoint.names) <= set(expected)
    for name in checkpoint.names:
        found = values(checkpoint, name)
        if found is not None:
            np.testing.assert_array_equal(found, expected[name], err_msg=name)
    said = "\n".join(checkpoint.notes)
    for note in notes:
        assert note in said, said
    return checkpoint


@pytest.fixture
def expected(model):
    checkpoint = Checkpoint(model)
    return {name: values(checkpoint, name) for name in checkpoint.names}


def tokens(path, prompt=(0, 3, 327), count=6):
    model = Model(Checkpoint(path), ReferenceBackend())
    return [step[0] for step in generate(model, [list(prompt)], max_tokens=count)]


def refused(path, *parts):
    """Opening names it in one line, and gives no advice that would damage the files."""
    with pytest.raises((ConfigError, CheckpointError, ForeignError)) as caught:
        Checkpoint(path)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message
    assert not [word for word in ("remove it", "convert it", "fetch the shard", "Traceback") if word in message]
    return message


# Configuration


ROPE = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1}


def test_transformers_configuration_means_the_same():
    published = json.loads(PRESETS["tiny"].to_json()) | {"rope_theta": 20000.0, "compress_rope_theta": 320000.0}
    published["rope_scaling"] = ROPE
    written = {k: v for k, v in published.items() if not k.startswith(("rope_", "compress_r"))}
    del written["num_hash_layers"], written["qk_rope_head_dim"]
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    written |= {
        "layer_types": [kinds[m] for m in published["compress_ratios"][:-1]],
        "compress_rates": {kinds[4]: 4, kinds[128]: 128},
        "mlp_layer_types": ["hash_moe"] + 5 * ["moe"],
        "partial_rotary_factor": 0.5,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
            "compress": {**ROPE, "rope_type": "yarn", "rope_theta": 320000.0, "attention_factor": 1.0},
        },
    }
    read_back = ModelConfig.from_dict(written)
    assert read_back == ModelConfig.from_dict(published)
    assert len(read_back.notes) == 4 + 1  # and the ratio of the MTP block, of which transformers writes none
    np.testing.assert_array_equal(read_back.rope_frequencies(4), ModelConfig.from_dict(published).rope_frequencies(4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling of type 'linear' is not implemented"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "rope_scaling of type 'llama3' is not implemented"),
        ({"rope_scaling": ROPE | {"mscale": 0.7}}, "rope_scaling.mscale = 0.7 is not implemented"),
        ({"rope_scaling": ROPE | {"attention_factor": 1.2}}, "rope_scaling.attention_factor = 1.2 is not implemented"),
        ({"rope_scaling": ROPE | {"rope_type": "linear"}}, "has type 'yarn' and rope_type 'linear'"),
        ({"rope_scaling": ROPE | {"factor": None}}, "rope_scaling.factor = None must be"),
        ({"rope_parameters": {"main": {"rope_theta": 5.0}, "compress": ROPE}}, "rope_theta itself says 10000.0"),
        ({"rope_parameters": {"main": {}, "compress": {"rope_type": "linear"}}}, "of type 'linear' is not implemented"),
        ({"rope_parameters": {"main": {"rope_type": "yarn"}, "compress": ROPE}}, "rope_parameters.main has rope_type"),
        ({"layer_types": ["sliding_attention"] * 6}, "compress_ratios says"),
        ({"layer_types": ["linear_attention"] * 6}, "must be a list of sliding_attention"),
        ({"mlp_layer_types": ["moe", "hash_moe"] + 4 * ["moe"]}, "a hash_moe layer after a moe layer"),
        ({"mlp_layer_types": 6 * ["moe"]}, "mlp_layer_types says 0 hash layers, num_hash_layers says 1"),
        ({"n_routed_experts": None}, "n_routed_experts = None must be"),
        ({"swiglu_limit": None}, "swiglu_limit = None must be"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers = '6' must be"),
        ({"hc_mult": True}, "hc_mult = True must be"),
        ({"compress_ratios": None}, "compress_ratios"),
        ({"compress_ratios": [0, 0, 4]}, "must have 6 entries"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' must be"),
        ({"dspark_target_layer_ids": [6], "compress_ratios": [0, 0, 4, 128, 4, 128, 0]}, "must be layers 0 .. 5"),
    ],
)
def test_configurations_that_say_what_dsv4_has_not(changes, said):
    if "dspark_target_layer_ids" in changes:
        changes = {"dspark_block_size": 5, "dspark_markov_rank": 8} | changes
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(json.loads(PRESETS["tiny"].to_json()) | changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "deepseek_v41"}, "model_type 'deepseek_v41' is DeepSeek-V4.1, another architecture"),
        ({"model_type": "x", "text_config": {"model_type": "deepseek_v41_text"}}, "is DeepSeek-V4.1"),
        ({"engram_layer_ids": [1, 14]}, "engram_layer_ids is a key of DeepSeek-V4.1"),
        ({"kv_source_layer_ids": [2]}, "kv_source_layer_ids is a key of DeepSeek-V4.1"),
        ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3' is DeepSeek-V3, another architecture"),
        ({"model_type": "deepseek_v32"}, "is DeepSeek-V3.2"),
        ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' is another architecture"),
        ({"model_type": None, "architectures": ["LlamaForCausalLM"]}, "no model_type and architectures = ['Llama"),
        ({"model_type": None, "architectures": None}, "no model_type and no architectures"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "ModelOpt's NVFP4"),
        ({"quantization_config": {"quant_method": "fp8", "moe_quant_algo": "NVFP4"}}, "ModelOpt's NVFP4"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors quantisation"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "the AWQ quantisation"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the GPTQ quantisation"),
        ({"quantization_config": {"quant_method": "new-one"}}, "another quantisation (quant_method 'new-one')"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}, "weight_block_size [32, 32]"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX's quantisation"),
    ],
)
def test_other_models_and_quantisations_are_named_first(model, changes, said):
    config(model, remove=("head_dim",), **changes)  # whatever else is missing, too
    refused(model, said, "dsv4")


# Tensors


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ("weight_scale_2", "NVFP4"),
        ("weight_packed", "compressed-tensors"),
        ("qweight", "AWQ or GPTQ"),
        ("scales", "MLX"),
        ("deq_scale", "ModelSlim's static W8A8"),
    ],
)
def test_tensors_of_other_formats_are_named_first(model, like, said):
    file = weight_map(model)[f"{EXPERT}.weight"]
    tensors = read(model, file)
    tensors[f"{EXPERT}.{like}"] = Tensor("F32", (1,), bytes(4))
    write(model, file, tensors)
    refused(model, said, f"{EXPERT}.{like}", "which dsv4 does not read; use the published checkpoint")


def test_gguf_and_other_files(model, tmp_path):
    gguf = tmp_path / "V4-IQ2.gguf"
    gguf.write_bytes(b"GGUF\3\0\0\0")
    refused(gguf, "a GGUF file, which dsv4 does not read; use the published checkpoint", "llama.cpp")
    refused(gguf.rename(tmp_path / "unnamed"), "a GGUF file")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "unnamed").rename(folder / "a.gguf")
    refused(folder, "holds GGUF files (a.gguf), which dsv4 does not read")
    (folder / "a.gguf").rename(folder / "pytorch_model.bin")
    refused(folder, "PyTorch pickles (pytorch_model.bin)")
    refused(model / shard_names(model)[0], "a single file; give its directory")
    result = CliRunner().invoke(cli.root, ["generate", str(folder), "--tokens", "1"])
    assert "PyTorch pickles" in str(result.exception)


def test_everything_floating_in_bf16(model, expected):
    """Case 13: quantised weights dequantised, float32 parameters rounded to BF16."""

    def cast(name, tensor, array):
        if name.endswith(".scale"):
            return None
        if tensor.dtype == "I64":
            return tensor
        wide = expected[name].astype(BFLOAT16)
        expected[name] = wide.astype(expected[name].dtype)
        return stored("BF16", wide)

    retype(model, cast)
    config(model, remove=("quantization_config", "expert_dtype"))
    checkpoint = same_model(model, expected, notes=["BF16 widened to F32 (such as layers.0.hc_attn_fn)"])
    assert checkpoint.array("layers.0.hc_attn_fn").dtype == np.float32
    assert tokens(model)


def test_f32_where_bf16_is_published(model, expected):
    """Case 14: read where every value is a BF16 number; refused where it would be rounded."""
    before = tokens(model)
    retype(model, lambda _, t, array: stored("F32", array.astype(np.float32)) if t.dtype == "BF16" else t)
    same_model(model, expected, notes=["F32 whose every value is a BF16 number"])
    assert tokens(model) == before
    norm = np.ones(256, np.float32)
    norm[7] += 2.0**-12
    change(model, "norm.weight", stored("F32", norm))
    with pytest.raises(CheckpointError, match=r"norm\.weight: 1 of 256 values are no BF16 numbers .* at \[7\]"):
        tokens(model)


def test_u8_for_bytes_of_other_dtypes(model, expected):
    """Case 15."""
    before = tokens(model)
    retype(model, lambda _, t, __: t._replace(dtype="U8") if t.dtype in {"F8_E8M0", "I8"} else t)
    checkpoint = same_model(model, expected, notes=["U8 that holds E8M0 bytes", "U8 that holds packed FP4"])
    assert checkpoint.format(f"{EXPERT}.weight") == "e2m1"
    assert tokens(model) == before
    change(model, f"{EXPERT}.scale", Tensor("U8", (256, 4), bytes(1024)))
    result = CliRunner().invoke(cli.root, ["inspect", str(model)])
    assert "all 1024 scale bytes are 0" in result.output  # audited as what they are


def test_f32_scales_and_their_other_names(model, expected):
    """Case 16: powers of two are the same scales; a name is shown as it stands in the file."""
    retype(
        model,
        lambda _, t, a: stored("F32", np.ldexp(np.float32(1), a.astype(int) - 127)) if t.dtype == "F8_E8M0" else t,
    )
    rename(model, lambda name: name.replace(".scale", ".weight_scale_inv"))
    same_model(model, expected, notes=["F32 scales that are powers of two", "weight_scale_inv for"])


def test_f32_scales_that_are_no_powers_of_two_are_float_factors(model, expected):
    name = "layers.1.attn.wq_a"
    scale = np.array([[0.75, 3e-3]], np.float32)
    codes = Checkpoint(model).array(f"{name}.weight").copy()
    change(model, f"{name}.scale", stored("F32", scale))
    factor = np.repeat(scale, 128, axis=1)
    one = ScaledArray(codes, np.full((1, 2), 127, np.uint8), "e4m3").dequantise()
    expected[f"{name}.weight"] = one * factor
    checkpoint = same_model(
        model, expected, notes=["no powers of two (such as layers.1.attn.wq_a.scale): they are read as float32"]
    )
    assert checkpoint.format(f"{name}.weight") is None
    assert f"{name}.scale" not in checkpoint
    assert tokens(model)


def test_fp4_scales_that_are_no_powers_of_two_are_float_factors_of_all_experts(model, expected):
    """A factor of 32 channels of a row; experts are all plain then, since they are multiplied
    together.
    """
    checkpoint = Checkpoint(model)
    weight, one = checkpoint.weight(EXPERT), np.full((256, 4), 127, np.uint8)
    factors = np.random.default_rng(0).uniform(0.5, 2, (256, 4)).astype(np.float32) * 2.0**-6
    expected[f"{EXPERT}.weight"] = ScaledArray(weight.data, one, "e2m1").dequantise() * np.repeat(factors, 32, axis=1)
    change(model, f"{EXPERT}.scale", stored("F32", factors))
    checkpoint = same_model(model, expected, notes=["weights have scales that are no powers of two"])
    experts = [name for name in checkpoint.names if ".experts." in name]
    assert {checkpoint.format(name) for name in experts} == {None}
    assert checkpoint.array(f"{EXPERT}.weight").dtype == np.float32
    assert tokens(model)


@pytest.mark.parametrize("block", ["layers.1", "mtp.0"])
def test_blocks_of_other_numbers_of_experts_run(model, block):
    """Case 20: cut unevenly, or the drafter not. The same tokens as with an expert that is never
    chosen.
    """
    bias = Checkpoint(model).array(f"{block}.ffn.gate.bias").copy()
    bias[3] = -1e30
    change(model, f"{block}.ffn.gate.bias", stored("F32", bias))

    def drafted():
        with dsv4.load(model, backend="reference") as session:
            run = session.generate([0, 3, 327], max_tokens=12, speculative=1).run()
            return run.tokens, run.drafts.accepted, session.checkpoint

    expected, accepted, _ = drafted()
    cut_experts(model, 3, [block])
    found, kept, checkpoint = drafted()
    assert (found, kept) == (expected, accepted)
    assert checkpoint.config.experts_by_block == {block: 3}
    assert any("another number of routed experts than config.json's 4" in note for note in checkpoint.notes)
    Place(tp=1, ep=3, rank=0).check(checkpoint.config)
    with pytest.raises(ValueError, match=f"routed experts of {block} = 3 is less than 4 ranks"):
        Place(tp=1, ep=4, rank=0).check(checkpoint.config)
    assert parameters(checkpoint.config).total <= parameters(PRESETS["tiny"]).total


def test_experts_cut_below_what_a_token_takes_or_unlike_config_everywhere(model):
    cut_experts(model, 1, ["layers.1"])
    refused(model, "layers.1.ffn.gate.weight: 1 experts, fewer than num_experts_per_tok = 2")
    config(model, n_routed_experts=5)
    with pytest.raises(CheckpointError, match=r"(?s)7 wrong shape.*is it the config.json that came with the weights"):
        Checkpoint(model)


def test_i32_hash_table(model, expected):
    name = "layers.0.ffn.gate.tid2eid"
    change(model, name, stored("I32", Checkpoint(model).array(name).astype(np.int32)))
    checkpoint = same_model(model, expected, notes=["I32 widened to I64"])
    assert checkpoint.array(name).dtype == np.int64


def test_hash_table_of_more_experts_is_an_error_before_the_first_token(tmp_path):
    """Case 20: pruned experts; the table still names those that are gone."""
    model = small(tmp_path / "model")
    config(model, n_routed_experts=3)
    for file in shard_names(model):
        kept = {n: t for n, t in read(model, file).items() if ".experts.3." not in n}
        for name, t in kept.items():
            if name.endswith((".gate.weight", ".gate.bias")):
                kept[name] = Tensor(t.dtype, (3, *t.shape[1:]), t.data[: len(t.data) * 3 // 4])
        write(model, file, kept)
    refused(model, "layers.0.ffn.gate.tid2eid", "outside 0 .. 2 (3 routed experts)", "a model with more experts")
    table = Checkpoint(model, check=False).array("layers.0.ffn.gate.tid2eid") % 3
    change(model, "layers.0.ffn.gate.tid2eid", stored("I64", table))
    assert tokens(model)


def test_single_file_of_any_name_and_tied_head(model, expected):
    whole = {name: tensor for file in shard_names(model) for name, tensor in read(model, file).items()}
    for file in (*shard_names(model), INDEX):
        (model / file).unlink()
    write(model, "model-00001-of-00001.safetensors", whole)
    same_model(model, expected)
    del whole["head.weight"]
    write(model, "model-00001-of-00001.safetensors", whole)
    refused(model, "head.weight: missing")
    config(model, tie_word_embeddings=True)
    expected["head.weight"] = expected["embed.weight"]
    both = whole["embed.weight"]
    same_model(model, expected, notes=["tie_word_embeddings: where head.weight or embed.weight is missing"])
    del whole["embed.weight"]
    write(model, "model-00001-of-00001.safetensors", whole | {"lm_head.weight": both})
    assert same_model(model, expected).stored("embed.weight").dtype == "BF16"


# Draft modules


def test_mtp_that_is_not_wanted_or_not_there(model, expected):
    """Cases 10 and 11: the main model's tokens are the same, and one note says why there is no
    drafting.
    """
    before = tokens(model)
    config(model, num_nextn_predict_layers=0)
    checkpoint = same_model(model, expected, notes=["of an MTP block: config.json asks for none"])
    assert checkpoint.config.layers == 3
    assert tokens(model) == before
    config(model, num_nextn_predict_layers=1, compress_ratios=[0, 4, 128])
    assert Checkpoint(model).config.draft == "mtp"
    retype(model, lambda name, t, _: None if name.startswith("mtp.") else t)
    checkpoint = same_model(model, expected, notes=["this copy has not an MTP block, and runs without"])
    assert checkpoint.config.draft == ""
    assert tokens(model) == before


def test_ratio_one_and_longer_lists(model):
    config(model, compress_ratios=[1, 4, 128, 0, 0, 0])
    checkpoint = Checkpoint(model)
    assert checkpoint.config.compress_ratios == (0, 4, 128, 0)
    assert any("ratio 1" in note for note in checkpoint.notes)
    assert any("[0, 0] at the end of compress_ratios belong to no layer" in note for note in checkpoint.notes)


def test_official_layout_runs_with_its_leftover_key(tmp_path):
    path = tmp_path / "model"
    create(path, PRESETS["tiny-dspark"], seed=0)
    written = json.loads((path / "config.json").read_text())
    assert (written["num_nextn_predict_layers"], len(written["compress_ratios"])) == (1, 9)
    checkpoint = Checkpoint(path)
    assert not checkpoint.notes
    assert (checkpoint.config.draft, checkpoint.config.stages) == ("dspark", 3)
    before = tokens(path)
    for name in ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank"):
        del written[name]
    (path / "config.json").write_text(json.dumps(written))
    checkpoint = Checkpoint(path)
    assert any("of a DSpark drafter: config.json has no dspark_target" in note for note in checkpoint.notes)
    assert tokens(path) == before


def test_vision_parts_are_ignored_with_one_note(tmp_path):
    path = tmp_path / "model"
    create(path, PRESETS["tiny-dspark"], seed=0)
    before = tokens(path)
    file = weight_map(path)["norm.weight"]
    extra = {name: Tensor("BF16", (4,), bytes(8)) for name in ("vision.blocks.0.w", "aligner.a", "image_start")}
    extra |= {f"{at}.ffn.gate.bias_vl": Tensor("F32", (8,), bytes(32)) for at in ("layers.0", "layers.1", "mtp.2")}
    extra["layers.0.ffn.gate.bias"] = Tensor("F32", (8,), bytes(32))
    write(path, file, read(path, file) | extra)
    config(path, vision_n_layers=32, num_nextn_predict_layers=3)
    assert [n for n in Checkpoint(path).notes if "vision" in n] == [
        "7 tensors of the vision part (such as vision.blocks.0.w) are ignored: dsv4 runs text"
    ]
    assert tokens(path) == before


# ModelSlim


def modelslim(path, tmp_path):
    """Our own W8A8 in ModelSlim's spelling."""
    from dsv4_core.checkpoint.convert import Options, convert

    convert(path, tmp_path / "w8a8", Options(int8=True))
    out = tmp_path / "w8a8"
    (out / "convert.json").unlink()
    for file in shard_names(out):
        tensors = {}
        for name, t in read(out, file).items():
            if name.endswith(".scale") and t.dtype == "F32":
                stem = name.removesuffix(".scale")
                tensors[f"{stem}.weight_scale"] = Tensor("F32", (*t.shape, 1), t.data)
                tensors[f"{stem}.weight_offset"] = Tensor("F32", (*t.shape, 1), bytes(len(t.data)))
            else:
                tensors[name] = t
        write(out, file, tensors)
    config(out, quantization_config={"quant_method": "ascend"})
    (out / "quant_model_description.json").write_text(json.dumps({"embed.weight": "FLOAT", "a": "W8A8_DYNAMIC"}))
    return out


def test_modelslim_w8a8_is_our_own(model, tmp_path):
    from dsv4_core.checkpoint.convert import Options, convert

    theirs = modelslim(model, tmp_path)
    checkpoint = Checkpoint(theirs)
    assert any("offsets, all zero, are ignored" in note for note in checkpoint.notes)
    convert(model, tmp_path / "ours", Options(int8=True))
    ours = Checkpoint(tmp_path / "ours")
    assert set(checkpoint.names) == set(ours.names)
    for name in ours.names:
        np.testing.assert_array_equal(checkpoint.array(name), ours.array(name))
    assert tokens(theirs) == tokens(tmp_path / "ours")


@pytest.mark.parametrize(
    ("description", "said"),
    [({"x": "W4A8_DYNAMIC"}, "W4A8_DYNAMIC"), ({"x": "W8A8"}, "W8A8"), ({"quarot": True}, "rotated by QuaRot")],
)
def test_other_modelslim_schemes_are_named(model, description, said):
    config(model, quantization_config={"quant_method": "ascend"})
    (model / "quant_model_description.json").write_text(json.dumps(description))
    refused(model, said, "ModelSlim", "use the published checkpoint")


# Keys and files beside


def test_unused_keys_survive_convert_and_several_ends_stop(model, tmp_path):
    from dsv4_core.checkpoint.convert import Options, convert
    from dsv4_core.session import load

    config(model, use_cache=True, num_key_value_heads=1, custom={"a": [1]}, eos_token_id=[1, 7])
    convert(model, tmp_path / "bf16", Options(bf16=True))
    written = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert (written["custom"], written["num_key_value_heads"], written["eos_token_id"]) == ({"a": [1]}, 1, [1, 7])
    session = load(tmp_path / "bf16", backend="reference", lazy=True)
    assert session.generate([0, 3], stop_tokens=[9])._ends == {1, 7, 9}


def test_the_document_is_fresh():
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    assert page.read_text() == spelling_page.page(), (
        "python -m dsv4_core.checkpoint.spelling_page > docs/checkpoints.md"
    )


@pytest.mark.proof
def test_transformers_reads_a_copy_and_its_own_is_read_back(tmp_path):
    """Both ways, with the library itself: no key missing or unexpected, the same values, nearly the
    same logits.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dsv4_core.graph.cache import Cache
    from dsv4_core.graph.step import Step

    create(tmp_path / "published", PRESETS["tiny"], seed=1)
    done = CliRunner().invoke(
        cli.root, ["convert", str(tmp_path / "published"), str(tmp_path / "copy"), "--to", "transformers"]
    )
    assert done.exit_code == 0, done.output
    theirs, seen = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "copy", output_loading_info=True, dtype=torch.float32
    )
    assert not any(seen.values()), seen
    theirs.save_pretrained(tmp_path / "theirs")
    ours, back = Checkpoint(tmp_path / "copy"), Checkpoint(tmp_path / "theirs")
    assert any("written by transformers" in note for note in back.notes)
    assert set(ours.names) - set(back.names) == {name for name in ours.names if name.startswith("mtp.")}
    for name in back.names:
        np.testing.assert_array_equal(values(back, name), values(ours, name), err_msg=name)
    assert back.config.drafting("") == ours.config.drafting("")
    ids = [0, 3, 327, 5, 9, 100, 44, 301]
    model = Model(back, ReferenceBackend(numerics="float32"))
    step = Step(Cache(model.backend, back.config, 1, 64), np.array([ids]))
    found = np.asarray(model.logits(model.forward(step)))
    wanted = theirs(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
