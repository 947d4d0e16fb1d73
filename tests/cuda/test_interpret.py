"""The interpreter's repair: proofs, and its refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import interpreter_proofs
import numpy as np
import pytest
from dsv4_backend_torch import interpret


@pytest.mark.parametrize("proof", interpreter_proofs.PROOFS, ids=lambda p: p.__name__)
def test_proof(proof):
    proof()


def test_a_product_with_a_scale_and_a_sum_are_rounded_once():
    """As Triton has it element by element; where a product is not exact, that is what does it."""
    from triton._C.libtriton import interpreter as one_by_one

    rng, quick = np.random.default_rng(0), 0
    with np.errstate(all="ignore"):
        for i in range(400):
            exponents = rng.integers(-149, 128, (4, 1, 8)) if i % 2 else rng.integers(-10, 10, (4, 1, 8))
            y = np.broadcast_to(np.ldexp(np.float32(1), exponents), (4, 16, 8))
            x, z = (np.float32(rng.standard_normal((4, 16, 8)) * 2.0 ** rng.integers(-60, 60)) for _ in range(2))
            x[0, 0, 0] = (x[0, 0, 0], 0, np.inf, np.nan)[i % 4]
            got = interpret._single_fma(x, y, z)
            quick += got is not None
            if got is not None:
                want = one_by_one.fma_fp32(x, np.ascontiguousarray(y), z)
                assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
        assert 50 < quick < 250
        assert interpret._single_fma(x, np.float32(3) * y, z) is None
        for x, power, z in (
            (1.25, -149, 2.0**-125),
            (2.0**100, 28, -1.5 * 2.0**127),
        ):  # subnormal, overflown: sums differ
            given = [np.full((1, 1), each, np.float32) for each in (x, 2.0**power, z)]
            assert given[0] * given[1] + given[2] != one_by_one.fma_fp32(*given)
            assert interpret._single_fma(*given) is None


def test_self_check_catches_a_wrong_rounding(monkeypatch):
    right = interpret.narrow
    monkeypatch.setattr(interpret, "narrow", lambda data, dtype: right(np.trunc(np.asarray(data) * 64) / 64, dtype))
    with pytest.raises(interpret.InterpreterError, match="rounds wrongly"):
        interpret.self_check()


def test_self_check_catches_a_wrong_decode(monkeypatch):
    right = interpret.widen
    monkeypatch.setattr(interpret, "widen", lambda data, dtype: right(data, dtype) * np.float32(2))
    with pytest.raises(interpret.InterpreterError, match="decodes wrongly"):
        interpret.self_check()


def test_refuses_a_version_without_proof(monkeypatch):
    monkeypatch.setattr(interpret, "_active", False)
    monkeypatch.setattr(interpret, "version", lambda _: "3.10.1")
    with pytest.raises(interpret.InterpreterError, match=r"triton 3\.10\.1.*proven for 3\.9\.0"):
        interpret.activate()


def test_refuses_compiled_kernels():
    code = "import triton\nfrom dsv4_backend_torch import interpret\ninterpret.activate()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "before the interpreter was chosen" in run.stderr
