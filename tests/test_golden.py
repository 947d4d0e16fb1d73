import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from dsv4_conformance.model import golden

from dsv4_core.checkpoint.config import ModelConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("model", golden.MODELS)
def test_golden_vectors_have_their_shapes(model):
    vectors, vocab = golden.load(model, "golden"), ModelConfig.load(golden.checkpoint_path(model)).vocab_size
    assert vectors["prompt"].shape == (2, 320)
    for mode in ("exact", "quantized"):
        assert vectors[f"{mode}.logits"].shape == (2, 21, vocab)
        assert vectors[f"{mode}.mtp_logits"].shape == (2, vocab)
        assert np.isfinite(vectors[f"{mode}.logits"]).all()
    assert vectors["quantized.greedy_tokens"].max() < vocab


@pytest.mark.parametrize("model", ["tiny-flash", "tiny-pro"])
def test_traces_cover_prefill_and_every_recorded_position(model):
    trace = golden.load(model, "trace")
    assert trace["tokens"].shape == (1, 258)
    layers = {name.split(".")[1] for name in trace if name != "tokens"}
    assert len(layers) == 3
    for at in ("prefill", *(f"decode{p}" for p in range(250, 257))):
        for layer in layers:
            for tensor in ("sparse_attn.q", "moe.out", "hc_post.out", "gate.weights", "fp8_gemm.out", "block.out"):
                assert f"{at}.{layer}.{tensor}" in trace
    assert not any(array.flags.writeable for array in trace.values())  # shared between tests


def test_a_trace_that_was_not_recorded():
    with pytest.raises(FileNotFoundError, match="tiny-jargon/trace"):
        golden.load("tiny-jargon", "trace")


def test_every_data_file_is_in_the_wheel():
    """Globs in pyproject.toml cover what lies in the packages' data; fnmatch's * also matches /, so
    parts are counted.
    """
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package, folder in (("dsv4_core", "dsv4_core"), ("dsv4_conformance", "conformance/dsv4_conformance")):
        files = [p.relative_to(ROOT / folder) for p in (ROOT / folder / "data").rglob("*") if p.is_file()]
        assert len(files) > 5
        globs = setuptools["package-data"][package]
        for file in files:
            assert any(fnmatch(str(file), g) and len(file.parts) == g.count("/") + 1 for g in globs), file
