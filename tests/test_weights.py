import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from dsv4_conformance.model import golden
from rewriting import INDEX, Tensor, change, read, rename, shard_names, small, weight_map, write

from dsv4_core.checkpoint.config import ConfigError
from dsv4_core.checkpoint.findings import CheckpointError
from dsv4_core.checkpoint.layout import tensor_specs
from dsv4_core.checkpoint.shards import Shard
from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.contract.dtypes import BFLOAT16, ScaledArray

WQ_A = "layers.1.attn.wq_a.weight"  # FP8 [128, 256]
EXPERT = "layers.2.ffn.experts.3.w2.weight"  # FP4 [256, 128]


@pytest.fixture
def model(tmp_path):
    return small(tmp_path / "model")


def refused(path, *parts):
    """Open, and read the message: every part is in it."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    for part in (str(path), *parts):
        assert part in message, message
    return caught.value


# What a sound checkpoint gives


@pytest.mark.parametrize("name", golden.MODELS)
def test_recorded_checkpoints_have_exactly_the_layout(name):
    checkpoint = Checkpoint(golden.checkpoint_path(name))
    specs = tensor_specs(checkpoint.config)
    assert set(checkpoint.names) == set(specs)
    assert all(checkpoint.spec(n) == specs[n] for n in specs)
    assert not checkpoint.notes
    index = json.loads((checkpoint.path / INDEX).read_text())
    assert checkpoint.nbytes == index["metadata"]["total_size"]


def test_arrays_hold_the_files_bytes(model):
    checkpoint = Checkpoint(model)
    for file in shard_names(model):
        for name, tensor in read(model, file).items():
            array = checkpoint.array(name)
            assert (array.shape, array.tobytes()) == (tensor.shape, tensor.data)
    kinds = {"embed.weight": BFLOAT16, "layers.0.attn.attn_sink": "f4", "layers.0.ffn.gate.tid2eid": "i8", WQ_A: "u1"}
    assert all(checkpoint.array(name).dtype == dtype for name, dtype in kinds.items())
    assert not checkpoint.array(WQ_A).flags.writeable


def test_weight_joins_codes_and_scales_by_dtype(model):
    checkpoint = Checkpoint(model)
    fp8, fp4 = checkpoint.weight("layers.1.attn.wq_a"), checkpoint.weight("layers.2.ffn.experts.3.w2")
    assert isinstance(fp8, ScaledArray)
    assert isinstance(fp4, ScaledArray)
    assert (fp8.format, fp8.shape, fp8.scale.shape) == ("e4m3", (128, 256), (1, 2))
    assert (fp4.format, fp4.shape, fp4.scale.shape) == ("e2m1", (256, 128), (256, 4))
    assert checkpoint.weight("norm").dtype == BFLOAT16
    experts = checkpoint.experts("layers.2.ffn", "w2")
    assert (experts.shape, experts.dtype) == ((4, 256, 128), "float4_e2m1fn@1x32")
    np.testing.assert_array_equal(experts[3].data, fp4.data)
    assert experts[3] is experts[3]


def test_opening_maps_no_file_and_reading_a_tensor_maps_its_own_alone(model):
    checkpoint = Checkpoint(model)
    shards = {shard.path.name: shard for shard, _ in checkpoint.where.values()}
    assert len(shards) > 1
    assert all(shard._map is None for shard in shards.values())
    checkpoint.array(WQ_A)
    assert [name for name, shard in shards.items() if shard._map is not None] == [weight_map(model)[WQ_A]]


def test_single_file_without_index(model):
    whole = {name: tensor for file in shard_names(model) for name, tensor in read(model, file).items()}
    sharded = {name: Checkpoint(model).array(name).tobytes() for name in whole}
    for file in shard_names(model):
        (model / file).unlink()
    (model / INDEX).unlink()
    write(model, "model.safetensors", whole)
    checkpoint = Checkpoint(model)
    assert {name: checkpoint.array(name).tobytes() for name in checkpoint.names} == sharded


def test_older_spellings_are_read_as_the_published_ones(model):
    expected = {name: Checkpoint(model).array(name).tobytes() for name in weight_map(model)}

    def older(name):
        name = (
            name.replace(".attn.", ".self_attn.")
            .replace(".ffn.", ".mlp.")
            .replace(".gate.bias", ".gate.e_score_correction_bias")
        )
        return "model." + re.sub(r"\.scale$", ".weight_scale_inv", name)

    rename(model, older)
    checkpoint = Checkpoint(model)
    assert {name: checkpoint.array(name).tobytes() for name in checkpoint.names} == expected


def test_fp4_written_as_f4_states_its_unpacked_shape(model):
    expected = Checkpoint(model).weight("layers.2.ffn.experts.3.w2").dequantise()
    for file in shard_names(model):
        tensors = read(model, file)
        for name, t in tensors.items():
            if t.dtype == "I8":
                tensors[name] = Tensor("F4", (*t.shape[:-1], 2 * t.shape[-1]), t.data)
        write(model, file, tensors)
    weight = Checkpoint(model).weight("layers.2.ffn.experts.3.w2")
    assert weight.data.shape == (256, 64)
    np.testing.assert_array_equal(weight.dequantise(), expected)


def test_fp8_experts_and_plain_weights_are_told_by_their_dtypes(tmp_path):
    model = small(tmp_path / "model", expert_dtype="fp8")
    config = json.loads((model / "config.json").read_text()) | {"expert_dtype": "fp4"}
    (model / "config.json").write_text(json.dumps(config))  # a key that is wrong in published releases, too
    plain = np.arange(128 * 256, dtype=np.float32).reshape(128, 256).astype(BFLOAT16)
    change(model, WQ_A, Tensor("BF16", (128, 256), plain.tobytes()))
    change(model, "layers.1.attn.wq_a.scale", None)
    checkpoint = Checkpoint(model)
    assert checkpoint.experts("layers.0.ffn", "w1").dtype == "float8_e4m3fn@128x128"
    np.testing.assert_array_equal(checkpoint.weight("layers.1.attn.wq_a"), plain)


def test_tensors_after_a_header_of_odd_length_are_aligned(model):
    file = weight_map(model)["layers.0.ffn.gate.tid2eid"]
    expected = Checkpoint(model).array("layers.0.ffn.gate.tid2eid").copy()
    data = (model / file).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)
    (model / file).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    array = Checkpoint(model).array("layers.0.ffn.gate.tid2eid")
    assert array.flags.aligned
    np.testing.assert_array_equal(array, expected)


def test_copies_under_mtp_are_ignored_and_said(model):
    file = weight_map(model)["mtp.0.norm.weight"]
    tensors = read(model, file)
    source = Checkpoint(model).array("embed.weight")
    copy = Tensor("BF16", source.shape, source.tobytes())
    write(model, file, tensors | {"mtp.0.emb.tok_emb.weight": copy, "mtp.0.head.weight": copy})
    checkpoint = Checkpoint(model)
    assert not {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"} & set(checkpoint.names)
    assert checkpoint.notes == [
        f"{name} in {file} is a copy of the main model's and is ignored"
        for name in ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight")
    ]


def test_total_size_that_disagrees_is_noted_and_does_not_stop(model):
    index = json.loads((model / INDEX).read_text())
    size = index["metadata"]["total_size"]
    index["metadata"]["total_size"] += 1
    (model / INDEX).write_text(json.dumps(index))
    assert Checkpoint(model).notes == [f"{INDEX} says total_size {size + 1}, the shards hold {size} bytes"]


def test_progress_counts_files(model):
    calls = []
    Checkpoint(model, progress=lambda done, of: calls.append((done, of)))
    n = len(shard_names(model))
    assert calls == [(i, n) for i in range(n + 1)]


def test_embedded_checkpoint_is_package_data():
    assert Checkpoint(embedded()).config.vocab_size == 2048


# What is refused, and what the message says


def test_no_directory(tmp_path):
    refused(tmp_path / "nowhere", "no such directory", "give a model directory")


def test_no_config(model):
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a model directory holds"):
        Checkpoint(model)


def test_no_index(model):
    (model / INDEX).unlink()
    others = len(shard_names(model))
    refused(model, INDEX, f"nor model.safetensors; {others} other *.safetensors files are there", "fetch the index")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON ("),
        ("[" * 200, "nested over 100 levels deep"),
        ("[]", "must be an object"),
        ("{}", "has no `weight_map`"),
        ('{"weight_map": 3}', "weight_map = 3 must be an object"),
        ('{"weight_map": {"embed.weight": 1}}', "weight_map[...] must be a string"),
        ('{"weight_map": {"a\\u001b[2J": "x"}}', "must be printable text"),
    ],
)
def test_corrupt_index(model, text, said):
    (model / INDEX).write_text(text)
    refused(model, INDEX, said, "fetch the index again")


def test_index_that_leads_out_of_the_directory(model):
    index = {"weight_map": weight_map(model) | {"embed.weight": "../secret.safetensors"}}
    (model / INDEX).write_text(json.dumps(index))
    refused(model, "../secret.safetensors", "must name files of its own directory", f"repair {INDEX}")


def test_empty_index(model):
    (model / INDEX).write_text('{"weight_map": {}}')
    error = refused(model, "embed.weight: missing", "more of: missing tensor")
    assert len(error.findings) == len(tensor_specs(Checkpoint(model, check=False).config))


def test_missing_shard(model):
    file = shard_names(model)[1]
    (model / file).unlink()
    held = sum(shard == file for shard in weight_map(model).values())
    error = refused(model, f"{file}: no such file, and {INDEX} names it ({held} tensors); fetch it")
    assert len(error.findings) == 1  # its tensors are not listed one by one


def test_truncated_shard(model):
    file = shard_names(model)[1]
    size = (model / file).stat().st_size
    with (model / file).open("r+b") as shard:
        shard.truncate(size - 1000)
    error = refused(
        model, f"{file}: truncated: the header says {size} bytes, the file has {size - 1000}; copy it again"
    )
    assert len(error.findings) == 1


@pytest.mark.parametrize("length", [0, 5, 100])
def test_shard_truncated_in_its_header(model, length):
    file = shard_names(model)[0]
    with (model / file).open("r+b") as shard:
        shard.truncate(length)
    refused(model, f"{file}: truncated: the file needs", f"has {length} bytes in all; copy it again")


def test_shard_with_trailing_bytes(model):
    file = shard_names(model)[0]
    size = (model / file).stat().st_size
    with (model / file).open("ab") as shard:
        shard.write(b"more")
    refused(model, f"{file}: longer than its header says: the header says {size} bytes, the file has {size + 4}")


def with_header(model, text):
    file = shard_names(model)[0]
    (model / file).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{not json", "corrupt header: not JSON ("),
        (b"{\x80}", "corrupt header: not JSON ("),
        (b"[1, 2]", "corrupt header must be an object; copy the file again"),
        (
            b'{"a": {"dtype": "F32", "shape": [16]}}',
            "tensor a has no `data_offsets`; copy it again",
        ),
        (
            b'{"a\\u001b[31m": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}',
            "control characters: a\\x1b[31m",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": 16, "data_offsets": [0, 64]}}',
            "tensor a: shape = 16 must be a list; copy it again",
        ),
        (
            b'{"a": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}',
            "tensor a has dtype 'F99', which dsv4 does not read (it reads F64",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [15], "data_offsets": [0, 64]}}',
            "tensor a, F32 [15], does not fill its 64 bytes",
        ),
        (b'{"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}', "begins at byte"),
    ],
)
def test_corrupt_header(model, text, said):
    refused(model, f"{with_header(model, text)}: ", said)


def test_header_longer_than_any_header(model):
    file = shard_names(model)[0]
    with (model / file).open("r+b") as shard:
        shard.write((100_000_001).to_bytes(8, "little"))
        shard.truncate(100_000_100)
    refused(model, f"{file}: corrupt header: its length 100000001 is over 100000000; is this a safetensors file?")


def test_index_names_a_tensor_that_its_shard_does_not_hold(model):
    file = weight_map(model)[WQ_A]
    tensors = read(model, file)
    del tensors[WQ_A]
    write(model, file, tensors, index=False)
    error = refused(model, f"{file}: {WQ_A}: the index says it is in this file, and it is not")
    assert len(error.findings) == 1  # not missing besides


def test_shard_holds_a_tensor_that_the_index_gives_to_another(model):
    first, second = shard_names(model)[:2]
    weights = weight_map(model)
    assert weights["embed.weight"] == first
    (model / INDEX).write_text(json.dumps({"weight_map": weights | {"embed.weight": second}}))
    refused(
        model,
        f"{second}: embed.weight: the index says it is in this file, and it is not",
        f"{first}: embed.weight: this file holds it, and the index gives it to {second}",
    )


def test_shard_holds_a_tensor_that_the_index_does_not_name(model):
    weights = weight_map(model)
    file = weights.pop("embed.weight")
    (model / INDEX).write_text(json.dumps({"weight_map": weights}))
    refused(model, f"{file}: embed.weight: this file holds it, and the index does not name it")


def test_same_tensor_in_two_spellings(model):
    file = weight_map(model)["norm.weight"]
    tensors = read(model, file)
    write(model, file, tensors | {"model.norm.weight": tensors["norm.weight"]})
    refused(model, f"{file}: norm.weight: {file} holds it, too, as norm.weight and as")


def test_missing_tensors_are_counted_and_all_listed(model):
    names = [f"layers.{layer}.{half}_norm.weight" for layer in range(3) for half in ("attn", "ffn")]
    for name in names:
        change(model, name, None)
    error = refused(
        model,
        "6 problems (6 missing tensor); `dsv4 inspect",
        "layers.0.attn_norm.weight: missing: BF16 [256] by config.json; no file here holds it: get a complete copy",
        "... and 3 more of: missing tensor",
    )
    assert [finding.tensor for finding in error.findings] == names
    assert str(error).count("missing:") == 3


def test_missing_weight_with_its_scale(model):
    change(model, WQ_A, None)
    change(model, "layers.1.attn.wq_a.scale", None)
    error = refused(model, f"{WQ_A}: missing: F8_E4M3 [128, 256]", "layers.1.attn.wq_a.scale: missing: F8_E8M0 [1, 2]")
    assert len(error.findings) == 2


def test_unexpected_tensor_is_refused_by_the_name_in_the_file(model):
    def renamed(name):
        return {"head.weight": "model.other_head.weight"}.get(name, name)

    rename(model, renamed)
    file = weight_map(model)["model.other_head.weight"]
    refused(
        model,
        "head.weight: missing: BF16 [512, 256]",
        f"{file}: model.other_head.weight: unexpected: the model of config.json has no tensor of this name",
        "is it the config.json that came with the weights?",
    )


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (
            "norm.weight",
            Tensor("BF16", (255,), bytes(510)),
            "shape [255] must be [256] by config.json; is it the config.json that",
        ),
        (WQ_A, Tensor("F8_E4M3", (256, 128), bytes(32768)), "shape [256, 128] must be [128, 256]"),
        (EXPERT, Tensor("I8", (64, 256), bytes(16384)), "shape [64, 512] must be [256, 128]"),
        ("norm.weight", Tensor("I64", (256,), bytes(2048)), "dtype I64 must be BF16; use the published checkpoint"),
        (
            WQ_A,
            Tensor("I8", (128, 128), bytes(16384)),
            "dtype I8 must be F8_E4M3 or BF16 or F32; use the published checkpoint",
        ),
        (
            EXPERT,
            Tensor("BF16", (256, 128), bytes(65536)),
            "dtype BF16 must be I8, as most experts are; use the published checkpoint",
        ),
        (
            "layers.0.ffn.gate.tid2eid",
            Tensor("F32", (512, 2), bytes(4096)),
            "dtype F32 must be I64; use the published checkpoint",
        ),
    ],
)
def test_wrong_shape_or_dtype(model, name, tensor, said):
    file = change(model, name, tensor)
    error = refused(model, f"{file}: {name}: {said}")
    assert len(error.findings) == 1


def test_missing_scale(model):
    change(model, "layers.1.attn.wq_a.scale", None)
    refused(model, f"layers.1.attn.wq_a.scale: missing scale: {WQ_A} is e4m3 and cannot be read without, and no file")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (
            "layers.1.attn.wq_a.scale",
            (2, 1),
            "scale grid [2, 1] must be [1, 2] for e4m3 [128, 256]: one per 128 x 128 block",
        ),
        (
            EXPERT.replace("weight", "scale"),
            (256, 1),
            "must be [256, 4] for e2m1 [256, 128]: one per 32 channels of a row",
        ),
    ],
)
def test_scale_grid_that_does_not_match_its_weight(model, name, shape, said):
    file = change(model, name, Tensor("F8_E8M0", shape, bytes([120]) * (shape[0] * shape[1])))
    refused(model, f"{file}: {name}: ", said, "dsv4 reads no other grid")


def test_scale_that_is_not_an_exponent(model):
    name = "layers.1.attn.wq_a.scale"
    file = change(model, name, Tensor("I64", (1, 2), bytes(16)))
    refused(model, f"{file}: {name}: dtype I64 must be F8_E8M0, an exponent a byte; use the published checkpoint")


def test_scale_of_a_weight_that_is_not_quantised(model):
    change(model, WQ_A, Tensor("BF16", (128, 256), bytes(65536)))
    file = weight_map(model)["layers.1.attn.wq_a.scale"]
    refused(
        model,
        f"{file}: layers.1.attn.wq_a.scale: unexpected scale: {WQ_A} is BF16, which has none; use a complete copy",
    )


def test_unchecked_opening_collects_and_reads_what_is_sound(model):
    (model / shard_names(model)[1]).unlink()
    change(model, "embed.weight", Tensor("I32", (512, 256), bytes(512 * 1024)))
    checkpoint = Checkpoint(model, check=False)
    assert {finding.rule for finding in checkpoint.errors} == {"shard missing", "wrong dtype"}
    assert checkpoint.weight("layers.0.attn.wq_a").shape == (128, 256)


def test_shard_reads_what_safetensors_writes(tmp_path):
    from safetensors.numpy import save_file

    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1, 2], np.int64),
        "none": np.empty((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    shard = Shard(tmp_path / "x.safetensors")
    assert shard.metadata == {"format": "np"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(shard.array(name), array)


# Files that change under us


def test_a_shard_written_over_while_it_is_open_is_named(model):
    checkpoint = Checkpoint(model)
    checkpoint.hold()
    file = model / shard_names(model)[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file.name}: was written to since it was opened"):
        checkpoint.hold()


def test_a_shard_that_shrinks_while_it_is_mapped_ends_the_process_by_name(model):
    code = """if True:
        import os, sys
        from dsv4_core.checkpoint.weights import Checkpoint
        c = Checkpoint(sys.argv[1])
        views = [c.array(name) for name in c.names]
        for file in os.scandir(sys.argv[1]):
            if file.name.endswith("safetensors"):
                os.truncate(file.path, 4096)
        print(sum(int(v.view("u1").sum()) for v in views if v.size))
    """
    done = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True, check=False)
    assert done.returncode == 74, done
    assert "became shorter while it was read (4096 of" in done.stderr
    assert "Traceback" not in done.stderr


def test_pipes_and_devices_are_refused(model):
    (model / "config.json").rename(model / "kept")
    os.mkfifo(model / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json: a pipe, where a file is needed"):
        Checkpoint(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=r"config\.json: a device, where a file is needed"):
        Checkpoint(model)
    (model / "config.json").unlink()
    (model / "kept").rename(model / "config.json")
    shard = model / shard_names(model)[0]
    shard.unlink()
    os.mkfifo(shard)
    refused(model, shard.name, "a pipe, where a file is needed")
