"""sm_90's arithmetic in the interpreter: what the imitation does to numbers, by hand, and what the
kernels make of it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from dsv4_backend_cuda import device, hopper
from dsv4_backend_cuda.backend import CudaBackend

from dsv4_core.contract.spec import BackendError


def test_fp8_sums_keep_thirteen_bits_of_the_largest():
    left = np.array([[256.0, 1.0, -1.0, 0.03125]])  # units of 2^(8 - 13) = 2^-5: the last is one, half of it none
    ones = np.ones((4, 1))
    assert hopper.aligned(left, ones, np.zeros((1, 1), np.float32)) == 256.03125
    left[0, 3] = 0.031
    assert hopper.aligned(left, ones, np.zeros((1, 1), np.float32)) == 256
    assert hopper.aligned(-left, ones, np.zeros((1, 1), np.float32)) == -256  # cut towards zero, not rounded down
    small = np.concatenate([np.full((1, 32), 2.0**-6), np.full((1, 32), 2.0**8)], 1)  # what is summed first is cut too
    assert hopper.aligned(small, np.ones((64, 1)), np.zeros((1, 1), np.float32)) == 32 * 256 + 0.5


def test_sums_of_halves_are_cut_and_not_rounded():
    left, ones = np.full((1, 16), 2.0**-25), np.ones((16, 1))
    assert hopper.cut(left, ones, np.ones((1, 1), np.float32)) == np.float32(1 + 2.0**-21)
    almost = np.array([[2.0**-24 + 2.0**-25]])  # to nearest it would be the next number after 1
    assert hopper.cut(almost, ones[:1], np.ones((1, 1), np.float32)) == 1
    assert hopper.cut(-almost, ones[:1], -np.ones((1, 1), np.float32)) == -1


def test_exponentials_and_quotients_are_off_by_two_units_at_most():
    x = np.linspace(-80, 80, 20001, dtype=np.float32)
    right = np.exp2(x.astype(np.float64)).astype(np.float32)
    units = (hopper.exp2(x).view(np.int32) - right.view(np.int32)).astype(int)
    assert set(units) == {-2, -1, 0, 1, 2}
    assert (hopper.exp2(np.arange(-126, 127, dtype=np.float32)) == 2.0 ** np.arange(-126, 127)).all()
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149], np.float32)
    np.testing.assert_array_equal(hopper.off(odd), odd)


def test_what_there_is_not_is_refused(monkeypatch):
    with pytest.raises(BackendError, match="arithmetic 'volta' is not one of exact, hopper"):
        CudaBackend(interpret=True, arithmetic="volta")
    with pytest.raises(BackendError, match="is the interpreter's; add --interpret"):
        CudaBackend(arithmetic="hopper")
    monkeypatch.setattr(hopper, "_installed", True)
    with pytest.raises(BackendError, match="start another for exact arithmetic"):
        device.require_interpreter()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "dsv4_core", "conformance", "run", "--backend", "cuda", "--interpret"]
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [*argv, "-O", "arithmetic=hopper", "--quiet", *words], capture_output=True, text=True, check=False, env={**os.environ, **alone}
    )  # fmt: skip


def test_it_is_what_the_kernels_run_on():
    """In a process of its own: a program's product of E4M3 loses what sm_90 would lose."""
    code = """
import torch
from dsv4_backend_cuda.backend import CudaBackend
from dsv4_core.contract.dtypes import ScaledArray
be = CudaBackend(interpret=True, arithmetic="hopper")
x = torch.zeros(1, 128, dtype=torch.bfloat16)
x[0, 0], x[0, 1] = 448.0, 0.25
ones = ScaledArray(torch.full((64, 128), 0x38, dtype=torch.uint8), torch.full((1, 1), 127, dtype=torch.uint8), "e4m3")
print(be.linear(x, ones, out_dtype="float32")[0, 0].item(), be.environment()["device"])
x[0, 1] = 0.0155
print(be.linear(x, ones, out_dtype="float32")[0, 0].item())
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines() == ["448.25 none: kernels were interpreted, with sm_90's arithmetic", "448.0"], (
        done.stderr[-800:]
    )


@pytest.mark.proof
def test_the_ops_stay_within_their_budgets():
    """The standard tier of what multiplies, exponentiates and divides."""
    ops = (
        "linear",
        "grouped_linear",
        "expert_linear",
        "ffn",
        "moe",
        "gate",
        "sparse_attn",
        "cached_sparse_attn",
        "index_scores",
        "hc_pre",
        "swiglu",
    )
    done = run("--tier", "standard", "--require", "2", *(w for op in ops for w in ("--op", op)))
    assert done.returncode == 0, done.stdout[-3000:]
