"""config.json: what is refused, and by what words."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dsv4_core.checkpoint.config import PRESETS, ConfigError, ModelConfig


def as_dict(**changes):
    return json.loads(PRESETS["tiny"].to_json()) | changes


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset):
    assert ModelConfig.from_dict(json.loads(PRESETS[preset].to_json())) == PRESETS[preset]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scoring_func": "sigmoid"},
            "scoring_func = 'sigmoid' is not implemented; the published models have 'sqrtsoftplus'",
        ),
        ({"compress_ratios": [0, 4]}, r"compress_ratios = \(0, 4\) must have 6 entries: one per layer"),
        ({"compress_ratios": [0, 0, 8, 128, 4, 128, 0]}, "may hold 0 .window only., 4 .CSA. and 128"),
        ({"compress_ratios": 4}, "compress_ratios = 4 must be a list"),
        ({"head_dim": 100}, "head_dim = 100 less qk_rope_head_dim must be a multiple of 64"),
        ({"hidden_size": 200}, "hidden_size = 200 must be a multiple of 128"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 must not exceed n_routed_experts"),
        ({"index_head_dim": 96}, "index_head_dim = 96 must be a power of two"),
        ({"o_groups": 3}, "o_groups = 3 must divide num_attention_heads"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(as_dict(**changes))


def test_missing_keys_are_named():
    values = as_dict()
    del values["o_groups"], values["head_dim"]
    with pytest.raises(ConfigError, match="missing head_dim, o_groups, which DeepSeek-V4 needs"):
        ModelConfig.from_dict(values)


def test_files(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a model directory holds"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        ModelConfig.load(tmp_path)


def test_cut():
    cut = PRESETS["flash"].cut(layers=4, experts=64)
    assert cut.compress_ratios == (0, 0, 4, 128, 0)
    assert (cut.num_hidden_layers, cut.num_hash_layers, cut.n_routed_experts) == (4, 3, 64)
    with pytest.raises(ConfigError, match="layers = 44: the preset has 1 to 43"):
        PRESETS["flash"].cut(layers=44)


def test_rope_frequencies():
    config = PRESETS["flash"]
    plain, yarn = config.rope_frequencies(0), config.rope_frequencies(4)
    assert plain.dtype == yarn.dtype == np.float32
    np.testing.assert_allclose(plain, 10000.0 ** (-np.arange(32) / 32), rtol=1e-7)
    unscaled = 160000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(yarn[0], unscaled[0], rtol=1e-7)  # fast channels keep their frequency
    np.testing.assert_allclose(yarn[-1], unscaled[-1] / 16, rtol=1e-7)  # slow ones are stretched by the factor
    equal = replace(config, rope_scaling=replace(config.rope_scaling, beta_fast=1, beta_slow=1))
    assert np.isfinite(equal.rope_frequencies(4)).all()
