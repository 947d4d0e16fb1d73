import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rewriting import cut_experts

from dsv4_core.checkpoint.config import PRESETS, RopeScaling
from dsv4_core.checkpoint.convert import MANIFEST, ConvertError, Options, convert, fp4_to_fp8
from dsv4_core.checkpoint.create import create
from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.checkpoint.shards import Shard
from dsv4_core.checkpoint.tensors import INDEX
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.dtypes import ScaledArray
from dsv4_core.planning import rehearse

SMALL = replace(
    PRESETS["tiny"],
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128, 0),
    o_lora_rank=128,
    moe_intermediate_size=256,
    vocab_size=257,
    max_position_embeddings=512,
    rope_scaling=RopeScaling(),
)  # divides for two ranks, but for its vocabulary


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "source"
    create(path, SMALL, seed=3, shard_size=1 << 20)
    (path / "tokenizer.json").write_text("{}")
    return path


def rank_arrays(path):
    """Every tensor of a directory, without holding it to a whole model's layout."""
    index = json.loads((path / INDEX).read_text())["weight_map"]
    shards = {file: Shard(path / file) for file in set(index.values())}
    return {name: shards[file].array(name) for name, file in index.items()}


def wide(weight):
    return weight.dequantise("float64") if isinstance(weight, ScaledArray) else np.asarray(weight, np.float64)


def test_fp8_experts_and_bf16_hold_the_same_values(source, tmp_path):
    original = Checkpoint(source)
    for options in (Options(experts="fp8"), Options(bf16=True)):
        out = tmp_path / ("bf16" if options.bf16 else "fp8")
        assert convert(source, out, options)["lossy_blocks"] == 0
        copy = Checkpoint(out)
        assert (out / "tokenizer.json").read_text() == "{}"
        for name in original.names:
            if name.endswith(".weight"):
                a, b = (wide(c.weight(name.removesuffix(".weight"))) for c in (original, copy))
                assert np.array_equal(a, b), name
                assert np.array_equal(np.signbit(a), np.signbit(b)), name
            elif not name.endswith(".scale"):
                assert np.array_equal(original.array(name), copy.array(name)), name


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_ranks_joined_are_the_source(source, tmp_path, tp, ep):
    split, original = Place(tp, ep), Checkpoint(source)
    convert(source, tmp_path / "ranks", Options(tp=tp, ep=ep))
    ranks = [rank_arrays(tmp_path / "ranks" / f"rank-{r}-of-{split.ranks}") for r in range(split.ranks)]
    for name in original.names:
        want, parts = original.array(name), [rank[name] for rank in ranks if name in rank]
        if ".experts." in name:
            assert len(parts) == 1, name
            assert np.array_equal(parts[0], want), name
        elif (cut := split.range(name.removesuffix(".weight").removesuffix(".scale"), SMALL)) is None:
            assert [np.array_equal(part, want) for part in parts] == [True] * split.ranks, name
        else:
            for group in range(ep):
                joined = np.concatenate(parts[group * tp : (group + 1) * tp], axis=cut[0])
                assert np.array_equal(joined, want), name
    read = [sum(a.nbytes for a in rank.values()) for rank in ranks]
    assert max(read) - min(read) <= 2 * SMALL.hidden_size * 2  # the vocabulary's last part is a row shorter


def test_an_interrupted_conversion_goes_on(source, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    counts = convert(source, out, Options(experts="fp8"))
    whole = {f.name: f.read_bytes() for f in out.iterdir()}
    out.rename(partial)
    shards = sorted(partial.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"x")
    again = convert(source, out, Options(experts="fp8"))
    assert (again["written"], again["kept"]) == (2, counts["written"] - 2)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == whole
    out.rename(partial)
    with pytest.raises(ConvertError, match="begun with other options"):
        convert(source, out, Options(bf16=True))


def test_nothing_is_overwritten_or_done_for_nothing(source, tmp_path):
    with pytest.raises(ConvertError, match="exists; give a new directory"):
        convert(source, tmp_path, Options(bf16=True))
    with pytest.raises(ConvertError, match="which is read; give a directory beside it"):
        convert(source, source / "copy", Options(bf16=True))
    with pytest.raises(ConvertError, match="nothing to convert"):
        convert(source, tmp_path / "out", Options())
    with pytest.raises(ValueError, match="o_groups = 2 is not a multiple of it"):
        convert(source, tmp_path / "out", Options(tp=4))
    assert not list(tmp_path.iterdir())


def poisoned(source, tmp_path, value):
    """A copy in which one expert has a scale byte of ``value``."""
    path = shutil.copytree(source, tmp_path / "poisoned")
    checkpoint = Checkpoint(path)
    name = "layers.1.ffn.experts.3.w2.scale"
    with checkpoint.file(name).open("r+b") as file:
        file.seek(checkpoint.stored(name).begin)
        file.write(bytes([value]))
    return path


def test_scale_byte_255_is_refused(source, tmp_path):
    with pytest.raises(ConvertError, match=r"layers\.1\.ffn\.experts\.3\.w2\.scale: 1 scale bytes are 255"):
        convert(poisoned(source, tmp_path, 255), tmp_path / "out", Options(bf16=True))


def test_scales_too_far_apart_are_counted_and_refused(source, tmp_path):
    path = poisoned(source, tmp_path, 150)
    with pytest.raises(
        ConvertError, match=r"1 blocks of 128 x 128 in 1 tensors \(most: 1 in layers\.1\.ffn\.experts\.3\.w2\)"
    ):
        convert(path, tmp_path / "out", Options(experts="fp8"))
    assert not (tmp_path / "out.partial").exists()
    assert convert(path, tmp_path / "out", Options(experts="fp8", allow_lossy=True))["lossy_blocks"] == 1
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["options"]["allow_lossy"]


def test_every_spread_that_is_said_to_be_lossless_is():
    codes = np.tile(np.arange(256, dtype=np.uint8), 128 * 64 // 256).reshape(128, 64)
    for low in (0, 1, 8, 100, 239):
        for spread in range(20):
            if low + spread > 254:
                continue
            scale = np.full((128, 4), low, np.uint8)
            scale[:, 2] = low + spread
            weight = ScaledArray(codes, scale, "e2m1")
            made, lossy = fp4_to_fp8(weight)
            same = np.array_equal(made.dequantise("float64"), weight.dequantise("float64"))
            assert same == (not lossy)
            assert same or spread > 14, (low, spread)
            assert low < 8 or same == (spread <= 14), (low, spread)


@pytest.mark.parametrize("options", [Options(tp=2), Options(experts="fp8"), Options(bf16=True), Options(int8=True)])
def test_a_disk_without_room_is_said_before_anything_is_read_or_written(source, tmp_path, monkeypatch, options):
    """What is asked for is at most what the copy takes: ranks repeat small tensors, which count
    much in a model of this size.
    """
    convert(source, tmp_path / "copy", options)
    takes = sum(f.stat().st_size for f in (tmp_path / "copy").glob("**/*.safetensors"))
    for free, fits in ((int(0.5 * takes), False), (int(1.1 * takes), True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        out = tmp_path / f"other-{free}"
        if fits:
            assert convert(source, out, options)["written"]
        else:
            with pytest.raises(ConvertError, match=r"the copy needs .* GB and the disk has .* GB free"):
                convert(source, out, options)
            assert not list(tmp_path.glob(f"{out.name}*"))


def test_holes_stay_holes_and_need_no_room(tmp_path, monkeypatch):
    """A rehearsal of 167 GB takes 3 on the disk, and so does its copy."""
    rehearse.write(tmp_path / "rehearsal", SMALL)
    takes = rehearse.on_disk(tmp_path / "rehearsal")
    assert Checkpoint(tmp_path / "rehearsal").nbytes > 2 * takes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(1.2 * takes)))
    convert(tmp_path / "rehearsal", tmp_path / "copy", Options(ep=2))
    ranks = sorted((tmp_path / "copy").iterdir())
    assert sum(map(rehearse.on_disk, ranks)) < 2.1 * takes  # small tensors are repeated, and hold values
    source = Checkpoint(tmp_path / "rehearsal")
    for name, copied in [item for rank in ranks for item in rank_arrays(rank).items()]:
        assert np.array_equal(source.array(name).view(np.uint8), copied.view(np.uint8)), name


def test_ranks_share_out_blocks_of_unlike_numbers_of_experts(source, tmp_path):
    uneven, count = shutil.copytree(source, tmp_path / "uneven"), SMALL.n_routed_experts
    cut_experts(uneven, count - 1, ["layers.1"])
    convert(uneven, tmp_path / "ranks", Options(ep=2))
    held = [
        [
            sum(f"{block}.ffn.experts." in name and name.endswith("w1.weight") for name in rank_arrays(path))
            for path in ranks
        ]
        for block in ("layers.0", "layers.1")
        for ranks in [sorted((tmp_path / "ranks").iterdir())]
    ]
    assert [sum(each) for each in held] == [count, count - 1]
    assert min(min(each) for each in held) >= count // 2 - 1
