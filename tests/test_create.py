import json
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from rewriting import INDEX, read, shard_names, small, weight_map

from dsv4_core.checkpoint import create as creating
from dsv4_core.checkpoint.audit import audit
from dsv4_core.checkpoint.config import PRESETS, ConfigError
from dsv4_core.checkpoint.create import create, preset
from dsv4_core.checkpoint.layout import tensor_specs
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.cli.init import command
from dsv4_core.contract.dtypes import ScaledArray

CUT = {"layers": None, "experts": None, "ratios": None, "max_position": None, "expert_dtype": "fp4"}


def tensors(path):
    return {name: t for file in shard_names(path) for name, t in read(path, file).items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole tiny preset, seed 0."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    create(path, PRESETS["tiny"], seed=0)
    return path


def test_same_seed_same_bytes_whatever_the_shards(tiny, tmp_path):
    size = create(tmp_path / "again", PRESETS["tiny"], seed=0, shard_size=300_000)
    again, whole = tensors(tmp_path / "again"), tensors(tiny)
    assert len(shard_names(tmp_path / "again")) > len(shard_names(tiny)) == 1
    assert again == whole
    assert size == sum(len(t.data) for t in whole.values()) == Checkpoint(tiny).nbytes


def test_a_tensor_does_not_depend_on_the_others(tiny, tmp_path):
    """A cut checkpoint shares the kept layers' bytes, shapes being equal."""
    create(tmp_path / "cut", PRESETS["tiny"].cut(layers=2), seed=0)
    whole = tensors(tiny)
    assert all(whole[name] == t for name, t in tensors(tmp_path / "cut").items())


def test_other_seed_and_other_name_other_values(tiny, tmp_path):
    create(tmp_path / "other", PRESETS["tiny"], seed=1)
    whole, other = tensors(tiny), tensors(tmp_path / "other")
    drawn = [name for name, t in whole.items() if len(t.data) >= 64]
    assert all(whole[name].data != other[name].data for name in drawn)
    same = {}
    for name in drawn:
        same.setdefault(whole[name].data, []).append(name)
    assert all(len(names) == 1 for names in same.values())


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_what_is_written_is_the_published_layout_and_sound(tmp_path, expert_dtype):
    model = small(tmp_path / "model", expert_dtype=expert_dtype)
    checkpoint = Checkpoint(model)
    specs = tensor_specs(checkpoint.config, "e2m1" if expert_dtype == "fp4" else "e4m3")
    assert {name: checkpoint.spec(name) for name in checkpoint.names} == specs
    assert checkpoint.config.expert_dtype == expert_dtype
    assert checkpoint.config.compress_ratios == (0, 4, 128, 0)
    assert audit(checkpoint) == []
    index = json.loads((model / INDEX).read_text())
    assert index["metadata"]["total_size"] == checkpoint.nbytes
    assert all(array.flags.aligned for array in map(checkpoint.array, checkpoint.names))


def test_shards_stay_under_their_size_and_a_larger_tensor_gets_its_own(tmp_path):
    model = small(tmp_path / "model", shard_size=200_000)
    sizes = {file: [len(t.data) for t in read(model, file).values()] for file in shard_names(model)}
    assert all(sum(size) <= 200_000 or len(size) == 1 for size in sizes.values())
    assert any(sum(size) > 200_000 for size in sizes.values())
    assert set(weight_map(model).values()) == set(sizes)
    assert next(iter(sizes)) == f"model-00001-of-{len(sizes):05}.safetensors"


def test_values_are_normal_with_one_over_the_root_of_the_inputs(tiny):
    """Five standard errors of a deviation are 2.5 % at 32768 elements, and FP4's clamping takes 2
    %.
    """
    checkpoint = Checkpoint(tiny)
    checked = Counter()
    for name in checkpoint.names:
        stored = checkpoint.stored(name)
        if not name.endswith(".weight") or len(stored.shape) == 1 or name == "embed.weight":
            continue
        weight = checkpoint.weight(name.removesuffix(".weight"))
        values, expected = weight, weight.shape[1] ** -0.5
        if isinstance(weight, ScaledArray):
            values, factor = weight.dequantise(), 2.0 ** (weight.scale.astype(float) - weight.scale.max())
            if factor.min() == 1:  # a few blocks that happen to have one factor do not say which
                continue
            expected *= np.sqrt(np.mean(factor**2) / np.mean([1, 0.5**2]))  # what these blocks came to have
        if values.size >= 32768:
            assert np.float32(values).std() == pytest.approx(expected, rel=0.045), name
            assert abs(np.float32(values).mean()) < 5 * expected / values.size**0.5, name
            checked[stored.dtype] += 1
    assert min(checked[dtype] for dtype in ("I8", "F8_E4M3", "BF16")) > 10, checked


def test_scales_differ_between_blocks(tiny):
    """So that a scale applied to the wrong block shows."""
    checkpoint = Checkpoint(tiny)
    for name in ("layers.2.ffn.experts.0.w1.scale", "layers.2.ffn.experts.0.w2.scale"):
        values, counts = np.unique(checkpoint.array(name), return_counts=True)
        assert len(values) == 2
        assert values[1] == values[0] + 1
        assert counts.min() > 0.4 * counts.sum()


@pytest.mark.parametrize("name", ["w1", "w3", "w2"])
def test_fp4_codes_use_the_whole_format(tiny, name):
    codes = Checkpoint(tiny).array(f"layers.0.ffn.experts.0.{name}.weight")
    nibbles = np.concatenate([codes.ravel() & 0xF, codes.ravel() >> 4])
    assert set(np.unique(nibbles)) == set(range(16))
    assert np.corrcoef(codes.ravel() & 7, codes.ravel() >> 4 & 7)[0, 1] == pytest.approx(0, abs=0.05)


def test_small_tensors_have_their_own_moments(tiny):
    checkpoint = Checkpoint(tiny)

    def all_of(suffix):
        names = [name for name in checkpoint.names if name.endswith(suffix)]
        return np.concatenate([checkpoint.array(name).astype(np.float64).ravel() for name in names])

    for suffix, mean, std in (
        ("norm.weight", 1, 0.1),
        ("embed.weight", 0, 1),
        (".ape", 0, 0.1),
        ("_base", 0, 0.1),
        ("attn_sink", 0, 0.1),
        ("gate.bias", 0, 0.05),
        ("_scale", 0.75, 0.1),
    ):
        values = all_of(suffix)
        error = 5 * std / values.size**0.5
        assert abs(values.mean() - mean) < error, suffix
        assert abs(values.std() - std) < error, suffix


def test_hash_rows_hold_distinct_experts_and_use_all(tiny):
    table = Checkpoint(tiny).array("layers.0.ffn.gate.tid2eid")
    assert table.shape == (512, 2)
    assert (table[:, 0] != table[:, 1]).all()
    assert (np.bincount(table.ravel(), minlength=8) > 64).all()  # 128 each on average
    assert 0.35 < (table[:, 0] < table[:, 1]).mean() < 0.65  # not sorted


def test_pieces_join_into_the_tensor(monkeypatch, tiny, tmp_path):
    """Full-size tensors are drawn in pieces; here pieces so small that they matter."""
    monkeypatch.setattr(creating, "CHUNK", 4096)
    create(tmp_path / "again", PRESETS["tiny"], seed=0)
    table, again = (tensors(path).pop("layers.0.ffn.gate.tid2eid") for path in (tiny, tmp_path / "again"))
    assert (table.shape, table.dtype) == (again.shape, again.dtype)
    assert tensors(tmp_path / "again") == tensors(tiny)


def test_directory_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not an empty directory; give a new one, nothing is ever overwritten"):
        create(tmp_path, PRESETS["tiny"], seed=0)
    with pytest.raises(FileExistsError, match=r"notes\.txt: not an empty directory"):
        create(tmp_path / "notes.txt", PRESETS["tiny"], seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_disk_without_room_is_said_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"needs \d+ bytes and the disk has 10 free; cut layers or experts"):
        create(tmp_path / "model", PRESETS["tiny"], seed=0)
    assert not (tmp_path / "model").exists()


def test_interrupted_writing_leaves_no_index(tmp_path):
    calls = []

    def stop(done, of):
        calls.append((done, of))
        if done > of // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(tmp_path / "model", PRESETS["tiny"], seed=0, shard_size=300_000, progress=stop)
    assert not (tmp_path / "model" / INDEX).exists()
    with pytest.raises(ValueError, match="fetch the index"):
        Checkpoint(tmp_path / "model")


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    total = create(tmp_path / "model", PRESETS["tiny"], seed=0, progress=lambda done, of: calls.append((done, of)))
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_published_keys_that_dsv4_does_not_use_are_written(tmp_path):
    """Other engines read some of them; of the published 48 keys only the version of transformers is
    left out.
    """
    create(tmp_path / "model", PRESETS["tiny"], seed=0)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["num_key_value_heads"], written["torch_dtype"], written["use_cache"]) == (1, "bfloat16", True)
    assert {"attention_bias", "attention_dropout", "initializer_range", "tie_word_embeddings"} <= written.keys()


def test_preset_is_cut():
    config = preset(PRESETS["flash"], **CUT | {"layers": 4, "experts": 64, "max_position": 8192, "expert_dtype": "fp8"})
    assert (config.num_hidden_layers, config.n_routed_experts, config.max_position_embeddings) == (4, 64, 8192)
    assert (config.compress_ratios, config.expert_dtype) == ((0, 0, 4, 128, 0), "fp8")
    assert preset(PRESETS["pro"], **CUT) == PRESETS["pro"]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({"layers": 3, "ratios": (0, 4)}, r"ratios \[0, 4\]: 2 of them for 3 layers; give one per layer"),
        ({"layers": 3, "ratios": (0, 4, 8)}, r"compress_ratios = .* may hold 0 \(window only\), 4 \(CSA\) and 128"),
        ({"layers": 7}, "layers = 7: the preset has 1 to 6"),
        ({"experts": 1}, "num_experts_per_tok = 2 must not exceed n_routed_experts"),
        ({"max_position": 0}, "max_position_embeddings = 0 must be at least 1"),
    ],
)
def test_preset_refuses(cut, said):
    with pytest.raises(ConfigError, match=said):
        preset(PRESETS["tiny"], **CUT | cut)


def test_init_writes_what_its_flags_say(tmp_path):
    flags = "--preset tiny --layers 3 --experts 4 --expert-dtype fp8 --ratios 0,4,128 --max-position 2048 --seed 7"
    path = tmp_path / "model"
    result = CliRunner().invoke(command, [str(path), *flags.split(), "--shard-size", "1MiB"])
    assert result.exit_code == 0, result.output
    checkpoint = Checkpoint(path)
    assert result.output == f"{path}: 3 layers, 4 experts, {checkpoint.nbytes} bytes\n"
    config = checkpoint.config
    assert (config.num_hidden_layers, config.n_routed_experts, config.max_position_embeddings) == (3, 4, 2048)
    assert config.compress_ratios == (0, 4, 128, 0)
    assert checkpoint.expert_dtype == "F8_E4M3"
    assert len(shard_names(path)) > 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "1", "--ratios", "a,4"], "'a,4' is not a list of ratios; write one of 0, 4, 128 per layer"),
        (["--seed", "-1"], "-1 is not in the range x>=0"),
        ([], "Missing option '--seed'"),
        (
            ["--seed", "1", "--preset", "huge"],
            "'huge' is not one of 'flash', 'flash-0731', 'pro', 'pro-0813', 'tiny', 'tiny-dspark'",
        ),
        (["--seed", "1", "--shard-size", "big"], "'big' is not a size"),
    ],
)
def test_init_refuses(tmp_path, flags, said):
    result = CliRunner().invoke(command, [str(tmp_path / "model"), *flags])
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "model").exists()
