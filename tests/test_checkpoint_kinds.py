"""Kinds of copies beside those that were reported: each runs with the published one's tokens, or is
named.
"""

import json

import numpy as np
import pytest
from dsv4_backend_reference import ReferenceBackend
from rewriting import INDEX, Tensor, read, rename, shard_names, small, write

from dsv4_core.checkpoint.config import PRESETS, ConfigError, ModelConfig
from dsv4_core.checkpoint.create import create, preset
from dsv4_core.checkpoint.findings import CheckpointError, ForeignError
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.graph.generate import generate
from dsv4_core.graph.model import Model

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024, "beta_fast": 32, "beta_slow": 1}


@pytest.fixture
def model(tmp_path):
    return small(tmp_path / "model")


def tokens(path):
    model = Model(Checkpoint(path), ReferenceBackend())
    return [step[0] for step in generate(model, [[0, 3, 327]], max_tokens=6)]


def retype(path, change):
    """Give each tensor and its array to ``change(name, tensor, array)``, which returns the new
    ones.
    """
    checkpoint = Checkpoint(path)
    for file in shard_names(path):
        made = {}
        for name, tensor in read(path, file).items():
            made |= change(name, tensor, checkpoint.array(name))
        write(path, file, made)


def stored(dtype, array):
    return Tensor(dtype, array.shape, np.ascontiguousarray(array).tobytes())


def published(**changes):
    return json.loads(PRESETS["tiny"].to_json()) | changes


def without(*keys, **changes):
    return {key: value for key, value in published(**changes).items() if key not in keys}


ROPE = ("rope_scaling", "rope_theta", "compress_rope_theta")


@pytest.mark.parametrize(
    "values",
    [
        without(
            *ROPE,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                "compressed_sparse_attention": YARN | {"rope_theta": 4e4},
                "heavily_compressed_attention": YARN | {"rope_theta": 4e4},
            },
        ),
        without("rope_scaling", "rope_theta", compress_rope_theta=4e4, rope_parameters=YARN | {"rope_theta": 5e3}),
        without("rope_scaling", rope_theta=5e3, compress_rope_theta=4e4, rope_parameters=YARN),
        {
            "model_type": "deepseek_v4",
            "text_config": published(rope_theta=5e3, compress_rope_theta=4e4, rope_scaling=YARN),
        },
        {
            "model_type": "some_vl",
            "architectures": ["SomeForConditionalGeneration"],
            "torch_dtype": "float16",
            "text_config": published(
                model_type="deepseek_v4_text", rope_theta=5e3, compress_rope_theta=4e4, rope_scaling=YARN
            ),
        },
    ],
)
def test_other_places_for_the_same_keys(values):
    expected = ModelConfig.from_dict(published(rope_theta=5e3, compress_rope_theta=4e4, rope_scaling=YARN))
    found = ModelConfig.from_dict(values)
    assert found == expected
    assert found.notes


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (published(rope_scaling={"type": "yarn", "factor": 16}), "yarn without original_max_position_embeddings"),
        (published(rope_scaling={"type": "yarn"}), "yarn without factor and original_max_position_embeddings"),
        (published(rope_scaling=YARN | {"truncate": False}), "rope_scaling.truncate = False"),
        (published(rope_scaling=YARN | {"mscale": 1, "mscale_all_dim": 1}), "rope_scaling.mscale = 1"),
        (without(*ROPE, rope_parameters=YARN | {"rope_theta": 1e4}), "does not say what RoPE layers"),
        (without(*ROPE, rope_parameters={"main": {}, "rest": YARN}), "rope_parameters has main, rest"),
        (without(*ROPE, rope_parameters={"sliding_attention": {}}), "rope_parameters has sliding_attention"),
        (published(n_group=8, topk_group=4), "n_group = 8 is a key of other models"),
        (published(rope_interleave=False), "rope_interleave = False"),
        (published(attention_bias=True), "attention_bias = True"),
        (published(eos_token_id=[1, 512]), "must be in the vocabulary 0 .. 511"),
        (published(model_type="DeepSeek-V4"), "must be spelt 'deepseek_v4'"),
        (
            {"model_type": "deepseek_v4", "vocab_size": 7, "text_config": published()},
            "text_config says vocab_size = 512",
        ),
        ({"model_type": "x", "text_config": published(model_type="qwen3")}, "model_type 'x' is another architecture"),
    ],
)
def test_what_a_configuration_may_not_say(values, said):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_null_and_absent_keys_are_noted():
    found = ModelConfig.from_dict(without("swiglu_limit", "hc_mult", eos_token_id=None, num_nextn_predict_layers=None))
    assert (found.eos_token_id, found.draft) == ((), "")
    said = "\n".join(found.notes)
    for part in ("eos_token_id is null", "num_nextn_predict_layers is null", "swiglu_limit = 10.0", "hc_mult = 4"):
        assert part in said
    assert not ModelConfig.from_dict(published()).notes


@pytest.mark.parametrize("wrapper", ["language_model.", "model.language_model.", "module.", "_orig_mod.model."])
def test_names_of_the_classes_around_a_model(model, wrapper):
    before = tokens(model)
    rename(model, lambda name: wrapper + name)
    assert tokens(model) == before


def frequencies(name, tensor, _):
    extra = {f"{name[:9]}self_attn.rotary_emb.inv_freq": stored("F32", np.ones(4, np.float32))}
    return {name: tensor} | (extra if name.endswith(".attn_norm.weight") and name.startswith("layers.") else {})


def with_ones(name, tensor, _):
    ones = name.endswith(("attn_sink", "gate.bias", "hc_head_fn"))
    return {name: tensor._replace(shape=(1, *tensor.shape))} if ones else {name: tensor}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (frequencies, "3 tables of rotary frequencies"),
        (with_ones, "dimensions of 1 that the published have not"),
        (lambda n, t, a: {n: stored("U16", a.astype("u2")) if "tid2eid" in n else t}, "U16 widened to I64"),
        (
            lambda n, t, a: {n: stored("F64", a.astype("f8")) if t.dtype in {"F32", "BF16"} else t},
            "F64 whose every value is a BF16 number",
        ),
    ],
)
def test_other_dtypes_shapes_and_buffers_run(model, change, note):
    before = tokens(model)
    retype(model, change)
    assert note in "\n".join(Checkpoint(model).notes)
    assert tokens(model) == before


def test_f64_that_says_more_is_refused_when_read(model):
    retype(model, lambda n, t, a: {n: stored("F64", a.astype("f8") + 1e-12) if n.endswith("hc_attn_base") else t})
    with pytest.raises(CheckpointError, match="values are no F32 numbers"):
        tokens(model)


def fused(name, tensor, _):
    return {name.replace(".experts.0.", ".experts."): tensor} if ".ffn.experts." in name else {name: tensor}


def nvidia(name, tensor, _):
    expert = ".ffn.experts." in name and name.endswith(".scale")
    return {name: tensor._replace(dtype="F8_E4M3") if expert else tensor}


def another(name, tensor, _):
    return {f"blocks.{name.replace('.', '_')}": tensor}


def adapter(name, tensor, _):
    extra = {"layers.0.attn.wq_a.lora_A.weight": stored("F32", np.zeros((8, 256), np.float32))}
    return {name: tensor} | (extra if name == "norm.weight" else {})


def nan(name, tensor, array):
    return {
        name: stored("BF16", (array * np.nan).astype(array.dtype)) if name == "layers.1.attn.q_norm.weight" else tensor
    }


def negative(name, tensor, array):
    return {name: stored("I64", array - 1) if name.endswith("tid2eid") else tensor}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fused, "joins a layer's experts in one tensor"),
        (nvidia, "NVIDIA's NVFP4 (scales in F8_E4M3)"),
        (another, "tensors have names that dsv4 does not know (such as blocks_layers_0"[:55]),
        (adapter, "a LoRA adapter"),
        (nan, "layers.1.attn.q_norm.weight: 128 of 128 values (first at [0]) are NaN or infinite"),
        (negative, "no expert has a negative number"),
    ],
)
def test_weights_that_cannot_run_are_named_in_one_line(model, change, said):
    retype(model, change)
    with pytest.raises((CheckpointError, ForeignError)) as caught:
        Checkpoint(model)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, in place of the file"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"PK\3\4" + bytes(60), "a ZIP archive"),
        (b"<!doctype html><title>Sign in</title>", "a web page, in place of the file"),
    ],
)
def test_files_that_are_something_else(model, begin, said):
    shard = model / shard_names(model)[0]
    whole = shard.read_bytes()
    shard.write_bytes(begin)
    with pytest.raises(CheckpointError, match=f"{shard.name}: {said}"):
        Checkpoint(model)
    shard.write_bytes(whole)
    (model / "config.json").write_bytes(begin)
    with pytest.raises(ConfigError, match=f"config.json: {said}"):
        Checkpoint(model)


def test_directories_of_other_things(model, tmp_path):
    shard_names(model)
    (model / INDEX).unlink()
    (model / shard_names(model)[0]).rename(model / "model0-mp2.safetensors")
    with pytest.raises(ForeignError, match=r"model0-mp2.safetensors, as the release's inference/convert.py"):
        Checkpoint(model)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ForeignError, match="a LoRA adapter"):
        Checkpoint(tmp_path)


def test_dspark_with_ratios_and_without_its_last_stage(tmp_path):
    path = tmp_path / "model"
    cut = preset(PRESETS["tiny-dspark"], layers=3, experts=4, ratios=(0, 4, 128), max_position=None, expert_dtype="fp4")
    create(path, cut, seed=0)
    before = tokens(path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"compress_ratios": [0, 4, 128, 4, 0, 128]}))
    checkpoint = Checkpoint(path)
    assert checkpoint.config == cut
    assert any("end with [4, 0, 128], read as 0" in note for note in checkpoint.notes)
    assert tokens(path) == before
    retype(path, lambda name, t, _: {} if name.startswith("mtp.2.") else {name: t})
    with pytest.raises(CheckpointError, match=r"mtp.2.norm.weight: missing|mtp.2.attn_norm.weight: missing"):
        Checkpoint(path)
