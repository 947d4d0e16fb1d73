"""Norm, RoPE, quantisation and rotation against their definitions."""

from __future__ import annotations

import oracle
import pytest
import torch
from dsv4_backend_cuda.kernels import norm, norm_rope, quant, rope

EPS = 1e-6


@pytest.mark.parametrize(("rows", "dim"), [(1, 4096), (3, 192), (17, 512), (5, 7168), (2, 100)])
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(rows, dim, weighted):
    x = oracle.normal(rows, dim, seed=1, scale=3.0)
    weight = oracle.normal(dim, seed=2) if weighted else None
    wide = x.double()
    exact = wide / torch.sqrt((wide**2).mean(-1, keepdim=True) + EPS) * (weight.double() if weighted else 1)
    oracle.close(norm.rms_norm(x, weight, eps=EPS), exact)


@pytest.mark.parametrize("dim", [128, 384, 1024])
def test_rms_norm_quant(dim):
    x, weight = oracle.normal(5, dim, seed=3), oracle.normal(dim, seed=4)
    y, codes, scales = norm.rms_norm_quant(x, weight, eps=EPS)
    assert torch.equal(y, norm.rms_norm(x, weight, eps=EPS))
    expected = oracle.quantise_fp8(y, 128)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])


def test_a_row_of_zeros_stays_zero():
    assert not norm.rms_norm(oracle.guarded(torch.zeros(2, 64, dtype=torch.bfloat16)), None, eps=EPS).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("heads", "dim", "rope_dim"), [(1, 64, 64), (3, 192, 64), (64, 512, 64), (5, 128, 16)])
def test_norm_and_rope_in_one_launch_are_the_two(heads, dim, rope_dim, weighted):
    x, weight = oracle.normal(3, heads, dim, seed=8, scale=3.0), oracle.normal(dim, seed=9) if weighted else None
    positions = oracle.guarded(torch.tensor([0, 77, 1 << 20], dtype=torch.int32))
    freqs = oracle.guarded((10000.0 ** -(torch.arange(0, rope_dim, 2).double() / rope_dim)).float())
    normed = norm.rms_norm(x.reshape(3 * heads, dim), weight, eps=EPS).reshape(x.shape)
    want = rope.apply_rope(normed, positions, freqs, inverse=False)
    of = norm_rope.norm_rope(x, weight, positions, freqs, eps=EPS)
    of.made()
    got, grid = of.room, of.grid
    assert torch.equal(got, want)
    assert grid is None


@pytest.mark.parametrize(("dim", "rope_dim"), [(512, 64), (192, 64), (80, 16)])
def test_key_value_rows_are_rounded_beside(dim, rope_dim):
    x, weight = oracle.normal(5, 1, dim, seed=8, scale=3.0), oracle.normal(dim, seed=9)
    positions = oracle.uniform_int(0, 1 << 20, 5, seed=10, dtype=torch.int32)
    freqs = oracle.guarded((10000.0 ** -(torch.arange(0, rope_dim, 2).double() / rope_dim)).float())
    of = norm_rope.norm_rope(x, weight, positions, freqs, eps=EPS)
    of.made()
    got, grid = of.room, of.grid
    want = quant.act_qdq(got[:, 0], format="e4m3", block=64, channels=dim - rope_dim)
    assert torch.equal(grid[:, 0], want)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("heads", "dim", "rope_dim"), [(1, 64, 64), (3, 192, 64), (64, 512, 64), (5, 128, 16)])
def test_rope(heads, dim, rope_dim, inverse):
    x = oracle.normal(4, heads, dim, seed=5)
    positions = oracle.guarded(torch.tensor([0, 1, 4097, 1_000_003], dtype=torch.int32))
    freqs = oracle.guarded((10000.0 ** -(torch.arange(0, rope_dim, 2).double() / rope_dim)).float())
    angle = (positions.float()[:, None] * freqs).double()[:, None] * (-1 if inverse else 1)
    a, b = x.double()[..., dim - rope_dim :].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)
    got = rope.apply_rope(x, positions, freqs, inverse=inverse)
    assert torch.equal(got[..., : dim - rope_dim], x[..., : dim - rope_dim])
    oracle.close(got[..., dim - rope_dim :], turned)


def edge_rows(dim: int) -> torch.Tensor:
    """Rows whose largest values sit on, above and below powers of two and rounding ties, beside
    ordinary ones.
    """
    x = oracle.normal(24, dim, seed=6)
    x *= torch.exp2(torch.arange(-12, 12).double())[:, None].to(torch.bfloat16)
    x[0] = 0
    x[1, 0], x[2, 0], x[3, 0] = 448.0, 450.0, 1e-5
    x[4, :8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x[5, :8] = -x[4, :8]
    x[6, :3] = torch.tensor([1e38, -1e38, 1.0])
    return oracle.guarded(x)


def test_act_quant():
    x = edge_rows(384)
    codes, scales = quant.act_quant(x, block=128)
    expected = oracle.quantise_fp8(x, 128)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])


def test_encoding_without_fp8_instructions(monkeypatch):
    x = edge_rows(512)
    native = quant.act_quant(x, block=128)[0]
    rounded = quant.act_qdq(x, format="e4m3", block=64, channels=448)
    monkeypatch.setattr(quant.launch, "native_fp8", lambda _: False)
    assert torch.equal(quant.act_quant(x, block=128)[0], native)
    assert torch.equal(quant.act_qdq(x, format="e4m3", block=64, channels=448), rounded)


@pytest.mark.parametrize(
    ("format", "block", "dim", "channels"),
    [("e4m3", 64, 512, 448), ("e4m3", 64, 192, 128), ("e2m1", 32, 128, 128), ("e4m3", 64, 80, 64)],
)
def test_act_qdq(format, block, dim, channels):
    x = edge_rows(dim)
    got = quant.act_qdq(x, format=format, block=block, channels=channels)
    assert torch.equal(got[:, :channels].double(), oracle.qdq(x[:, :channels], format, block))
    assert torch.equal(got[:, channels:], x[:, channels:])


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_hadamard(dim):
    x = oracle.normal(70, dim, seed=7)
    i = torch.arange(dim)
    popcount = sum(((i[:, None] & i[None, :]) >> b) & 1 for b in range(8))
    exact = x.double() @ (1.0 - 2.0 * (popcount % 2)).double() * dim**-0.5
    got, grid = quant.hadamard(x)
    oracle.close(got, exact)
    if dim >= 32:
        assert torch.equal(grid.double(), oracle.qdq(got, "e2m1", 32))
    else:
        assert grid is None
