"""A torch without the small dtypes, and a CPU without BF16 products: the backend imports, runs, and
gives the same numbers.
"""

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dsv4_backend_torch import matmul  # noqa: E402
from dsv4_conformance.model import golden  # noqa: E402
from recorded import relative, vectors  # noqa: E402

from dsv4_core.checkpoint.weights import Checkpoint  # noqa: E402
from dsv4_core.contract import registry  # noqa: E402
from dsv4_core.contract.dtypes import BFLOAT16, Experts, quantise_weight  # noqa: E402
from dsv4_core.graph.evaluate import teacher_forced  # noqa: E402
from dsv4_core.graph.model import Model  # noqa: E402

WITHOUT_SMALL_DTYPES = """
import torch
gone = [name for name in vars(torch) if name.startswith(("float8", "float4"))]
assert "float4_e2m1fn_x2" in gone and "float8_e8m0fnu" in gone, gone
for name in gone:
    delattr(torch, name)  # before the backend is imported
import numpy as np
from dsv4_core.contract import registry
from dsv4_core.contract.dtypes import BFLOAT16, RowLayout, quantise_weight

reference, backend = registry.create("reference"), registry.create("torch")
x = np.random.default_rng(0).standard_normal((1, 512)).astype(BFLOAT16)
layout, index = RowLayout("kv", 512, 64), np.array([1], np.int32)
caches = [be.zeros((3, layout.width), "uint8") for be in (reference, backend)]
for be, cache in zip((reference, backend), caches):
    be.cache_write(cache, be.from_numpy(x), be.from_numpy(index), layout=layout)
assert (backend.to_numpy(caches[1]) == caches[0]).all()
for fmt, block in (("e4m3", 64), ("e2m1", 32)):
    want = reference.act_qdq(x, format=fmt, block=block, channels=448)
    got = backend.to_numpy(backend.act_qdq(backend.from_numpy(x), format=fmt, block=block, channels=448))
    assert (got == want).all(), fmt
    weight = quantise_weight(np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32), fmt)
    want = reference.linear(x, weight, out_dtype="float32")
    got = backend.to_numpy(backend.linear(backend.from_numpy(x), backend.load(weight), out_dtype="float32"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
print("; ".join(f"{d.what}: {d.found}" for d in type(backend).diagnose()))
"""


def test_the_backend_imports_and_runs_in_a_torch_without_small_dtypes():
    done = subprocess.run(  # a process of its own: the import is what is tested
        [sys.executable, "-c", WITHOUT_SMALL_DTYPES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dtypes it lacks, done by tables: float8_e4m3fn, float8_e8m0fnu, float4_e2m1fn_x2" in done.stdout


@pytest.fixture
def no_bf16(monkeypatch):
    """As on a CPU with AVX2 only; gives the dtypes of every product."""
    monkeypatch.setattr(matmul, "cpu_multiplies_bf16", lambda: False)
    seen, linear, bmm = set(), torch.nn.functional.linear, torch.bmm

    def watched(name, run):
        def call(a, b, *rest):
            seen.add((name, a.dtype))
            return run(a, b, *rest)

        return call

    monkeypatch.setattr(matmul.functional, "linear", watched("linear", linear))
    monkeypatch.setattr(torch, "bmm", watched("bmm", bmm))
    return seen


def weights(fmt, *shape, seed=0):
    plain = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5
    return plain.astype(BFLOAT16) if fmt == "bfloat16" else quantise_weight(plain, fmt)


@pytest.mark.parametrize("fmt", ["bfloat16", "e4m3", "e2m1"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_without_bf16_products_operands_are_widened_and_results_rounded(no_bf16, fmt, tokens):
    backend, reference = registry.create("torch"), registry.create("reference")
    assert not backend.bf16_products
    x = np.random.default_rng(3).standard_normal((tokens, 256)).astype(BFLOAT16)
    w, up, down = (weights(fmt, *shape, seed=i) for i, shape in enumerate([(256, 256), (256, 256), (256, 256)]))
    got = {
        "linear": backend.linear(backend.from_numpy(x), backend.load(w), out_dtype="bfloat16"),
        "grouped": backend.grouped_linear(backend.from_numpy(x.reshape(tokens, 2, 128)), backend.load(weights("bfloat16", 64, 128))),
        "ffn": backend.ffn(backend.from_numpy(x), *map(backend.load, (w, up, down)), limit=10.0),
    }  # fmt: skip
    want = {
        "linear": reference.linear(x, w, out_dtype="bfloat16"),
        "grouped": reference.grouped_linear(x.reshape(tokens, 2, 128), weights("bfloat16", 64, 128)),
        "ffn": reference.ffn(x, w, up, down, limit=10.0),
    }
    for name, value in got.items():
        assert value.dtype == torch.bfloat16
        np.testing.assert_allclose(
            backend.to_numpy(value).astype(np.float32), want[name].astype(np.float32), rtol=2**-6, atol=2e-2, err_msg=name
        )  # fmt: skip
    assert not {pair for pair in no_bf16 if pair[1] == torch.bfloat16}


def test_a_model_without_bf16_products_is_as_near_to_exact_as_the_published_one(no_bf16):
    want = vectors("tiny-flash", "golden")
    model = Model(Checkpoint(golden.checkpoint_path("tiny-flash")), registry.create("torch"))
    got = teacher_forced(model, want["prompt"], prefill=300)
    assert relative(got["logits"], want["exact.logits"]) < 1.5 * relative(
        want["quantized.logits"], want["exact.logits"]
    )
    assert not {pair for pair in no_bf16 if pair[1] == torch.bfloat16}


def test_experts_without_bf16_products(no_bf16):
    backend, reference = registry.create("torch"), registry.create("reference")
    stacks = [Experts([weights("e2m1", 128, 128, seed=10 * p + e) for e in range(4)]) for p in range(3)]
    x = np.random.default_rng(5).standard_normal((1, 128)).astype(BFLOAT16)
    share = np.array([[0.75, 0.5]], np.float32)
    picked = np.array([[3, 1]], np.int32)
    want = reference.moe(x, share, picked, None, *stacks, first_expert=0, limit=10.0, out_dtype="float32")
    got = backend.moe(
        *map(backend.from_numpy, (x, share, picked)), None, *map(backend.load_experts, stacks),
        first_expert=0, limit=10.0, out_dtype="float32",
    )  # fmt: skip
    np.testing.assert_allclose(backend.to_numpy(got), want, rtol=2**-6, atol=2e-2)
    assert not {pair for pair in no_bf16 if pair[1] == torch.bfloat16}
