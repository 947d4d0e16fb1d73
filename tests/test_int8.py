"""W8A8: what is lost is bounded, measured, carried, and never happens unasked."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from dsv4_core.checkpoint.convert import ConvertError, Options, convert
from dsv4_core.checkpoint.weights import Checkpoint, embedded
from dsv4_core.cli.convert import command
from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import BFLOAT16, quantise_int8, quantise_tokens
from dsv4_core.contract.spec import Operand


def test_codes_are_within_half_a_step_and_scales_are_bf16():
    weight = (
        np.random.default_rng(0).standard_normal((37, 64), np.float32)
        * np.logspace(-20, 20, 37, dtype=np.float32)[:, None]
    )
    weight[5] = 0
    made = quantise_int8(weight)
    assert np.array_equal(made.scale.astype(BFLOAT16).astype(np.float32), made.scale)
    assert np.all(np.abs(made.dequantise("float64") - weight) <= 0.5001 * made.scale[:, None])
    assert np.abs(made.data.astype(int)).max() <= 127
    assert not made.data[5].any()
    assert made.nbytes == 37 * 64 + 37 * 4


def test_tokens_do_not_share_a_scale():
    x = np.array([[1.0, -127.0], [0.0, 0.0], [1e-3, 5e-4]], np.float32)
    codes, scale = quantise_tokens(x)
    assert np.array_equal(codes[:2], [[1, -127], [0, 0]])
    assert codes[2, 0] == 127
    assert scale[0] == 1


def test_the_copy_carries_its_error(tmp_path):
    out = tmp_path / "w8a8"
    done = CliRunner().invoke(command, [str(embedded()), str(out), "--to", "w8a8-int8"])
    assert done.exit_code == 0, done.output
    assert "W8A8 is lossy" in done.output
    declared = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["w8a8_int8"]
    assert declared["lossy"] is True
    assert declared["error"].keys() == {"attention", "experts", "indexer", "mtp", "shared expert"}
    assert all(0.003 < e["relative_rms"] <= e["worst_tensor"] < 0.02 for e in declared["error"].values())
    copy, source = Checkpoint(out), Checkpoint(embedded())
    got, want = (c.weight("layers.0.attn.wq_a") for c in (copy, source))
    assert (got.format, want.format) == ("int8", "e4m3")
    assert copy.weight("layers.0.attn.wo_a").format == "e4m3"
    assert np.array_equal(got.data, quantise_int8(want.dequantise()).data)
    with pytest.raises(ConvertError, match="is W8A8 already"):
        convert(out, tmp_path / "again", Options(bf16=True))


def test_a_backend_without_int8_says_so():
    pytest.importorskip("torch")
    operands = {"x": Operand("bfloat16", (4, 64)), "weight": Operand("int8@1xin", (8, 64)), "out_dtype": "bfloat16"}
    answer = registry.create("torch").supports("linear", **operands)
    assert "multiplies no int8 weights" in answer.reason
    assert registry.create("reference").supports("linear", **operands)
