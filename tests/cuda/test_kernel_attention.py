"""Sparse attention over plain and packed rows against a float64 softmax."""

from __future__ import annotations

import oracle
import pytest
import torch
from dsv4_backend_cuda.kernels import sparse_attn


def attend(q, rows, sink, picks, scale):
    chosen = rows.double()[picks.clamp(min=0).long()]
    score = torch.einsum("thd,tjd->thj", q.double(), chosen) * scale
    score = score.masked_fill((picks < 0)[:, None], -torch.inf)
    drain = sink.double()[None, :, None].expand(len(q), -1, 1)
    weight = torch.softmax(torch.cat([score, drain], -1), -1)[..., :-1]
    return torch.einsum("thj,tjd->thd", weight, chosen)


def case(tokens, heads, dim, rows, picks, seed):
    q, kv = oracle.normal(tokens, heads, dim, seed=seed), oracle.normal(rows, dim, seed=seed + 1)
    sink = oracle.normal(heads, seed=seed + 2, dtype=torch.float32)
    chosen = oracle.uniform_int(0, rows, tokens, picks, seed=seed + 3, dtype=torch.int32)
    chosen[oracle.uniform_int(0, 4, tokens, picks, seed=seed + 4, dtype=torch.int32) == 0] = -1
    return q, kv, sink, chosen


def judge(got, exact):
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert error < 2**-8 * 1.5, f"{error:.5f}"


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 192), (16, 128), (70, 512)])
@pytest.mark.parametrize("picks", [1, 33, 300])
def test_sparse_attn(heads, dim, picks, split):
    q, kv, sink, chosen = case(3, heads, dim, 400, picks, seed=1)
    got = sparse_attn.sparse_attn(q, kv, sink, chosen, softmax_scale=dim**-0.5, split=split)
    judge(got, attend(q, kv, sink, chosen, dim**-0.5))


@pytest.mark.parametrize("split", [False, True])
def test_a_token_without_rows_is_zero_and_a_row_listed_twice_counts_twice(split):
    q, kv, sink, chosen = case(3, 4, 64, 10, 200, seed=9)
    chosen[:] = -1
    chosen[1, 150:153] = torch.tensor([7, 7, 2])
    sink[1] = -torch.inf
    got = sparse_attn.sparse_attn(q, kv, sink, chosen, softmax_scale=0.125, split=split)
    assert not got[0].any()
    assert not got[2].any()
    judge(got, attend(q, kv, sink, chosen, 0.125).nan_to_num())


@pytest.mark.parametrize("split", [False, True])
def test_scores_far_from_zero(split):
    q, kv, sink, chosen = case(2, 4, 64, 300, 290, seed=11)
    q *= 60
    got = sparse_attn.sparse_attn(q, kv, sink, chosen, softmax_scale=1.0, split=split)
    judge(got, attend(q, kv, sink, chosen, 1.0))


def pack(rows: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """[rows, dim] BF16 -> packed bytes, as the cache stores them."""
    plain = rows.shape[1] - rope_dim
    codes, scales = oracle.quantise_fp8(rows[:, :plain], 64)
    padded = torch.zeros((len(rows), 8 * -(-scales.shape[1] // 8)), dtype=torch.uint8)
    padded[:, : scales.shape[1]] = scales
    return oracle.guarded(torch.cat([codes, padded, rows[:, plain:].contiguous().view(torch.uint8)], 1))


def on_grid(*shape: int, rope_dim: int, seed: int) -> torch.Tensor:
    rows = oracle.normal(*shape, seed=seed)
    plain = shape[-1] - rope_dim
    rows[..., :plain] = oracle.qdq(rows[..., :plain], "e4m3", 64).to(torch.bfloat16)
    return rows


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("dim", "rope_dim"), [(512, 64), (192, 64), (128, 64)])
def test_cached_sparse_attn(dim, rope_dim, compressed, split):
    ring, kv, old = (on_grid(n, dim, rope_dim=rope_dim, seed=s) for n, s in ((20, 21), (3, 22), (50, 23)))
    ring_index = oracle.guarded(torch.tensor([4, 19, 0, -1, 7], dtype=torch.int32))
    old_index = oracle.guarded(torch.tensor([49, 3, 0, 11, -1, 30, 31], dtype=torch.int32))
    zero = torch.zeros(1, dim, dtype=torch.bfloat16)
    table = [torch.cat([ring, zero])[ring_index.long()], kv, torch.cat([old, zero])[old_index.long()]]
    rows = torch.cat(table if compressed else table[:2])
    q, _, sink, _ = case(3, 6, dim, 4, 4, seed=24)
    picks = oracle.uniform_int(-1, len(rows), 3, 170, seed=25, dtype=torch.int32)
    got = sparse_attn.cached_sparse_attn(
        q, kv, pack(ring, rope_dim), ring_index, pack(old, rope_dim) if compressed else None, old_index if compressed else None,
        sink, picks, rope_dim=rope_dim, softmax_scale=dim**-0.5, split=split,
    )  # fmt: skip
    judge(got, attend(q, rows, sink, picks, dim**-0.5))


def test_a_tokens_bits_do_not_depend_on_the_batch():
    q, kv, sink, chosen = case(5, 4, 128, 300, 200, seed=31)
    for split in (False, True):
        whole = sparse_attn.sparse_attn(q, kv, sink, chosen, softmax_scale=0.1, split=split)
        for t in range(5):
            alone = sparse_attn.sparse_attn(
                q[t : t + 1].clone(), kv, sink, chosen[t : t + 1].clone(), softmax_scale=0.1, split=split
            )
            assert torch.equal(alone[0], whole[t])


def test_addresses_beyond_two_gigabytes():
    dim, rows = 512, (1 << 31) // 1024 + 3
    kv = torch.empty((rows, dim), dtype=torch.bfloat16)  # pages are touched where rows are written
    kv[-4:] = oracle.normal(4, dim, seed=41)
    q, _, sink, _ = case(1, 2, dim, 4, 4, seed=42)
    picks = torch.tensor([[rows - 1, rows - 2, rows - 4]], dtype=torch.int32)
    got = sparse_attn.sparse_attn(q, kv, sink, picks, softmax_scale=0.05, split=False)
    judge(got, attend(q, kv[-4:], sink, picks - (rows - 4), 0.05))
