"""Compression, indexer and hyper-connections against their definitions."""

from __future__ import annotations

import oracle
import pytest
import torch
from dsv4_backend_cuda.kernels import compress, index, mhc


@pytest.mark.parametrize(
    ("ratio", "overlap", "dim"), [(128, False, 512), (4, True, 512), (4, True, 192), (8, False, 40)]
)
def test_compress(ratio, overlap, dim):
    width, span = (2 * dim, 2 * ratio) if overlap else (dim, ratio)
    pool = oracle.normal(2 * span, 2 * width, seed=1, dtype=torch.float32)
    ape = oracle.normal(ratio, width, seed=2, dtype=torch.float32)
    windows = oracle.uniform_int(-1, 2 * span, 3, span, seed=3, dtype=torch.int32)
    windows[0, :ratio] = -1
    windows[2] = -1
    entries = pool.double()[windows.clamp(min=0).long()]
    kv, score = entries[..., :width], entries[..., width:] + ape.double().repeat(span // ratio, 1)
    if overlap:
        kv, score = (torch.cat([v[:, :ratio, :dim], v[:, ratio:, dim:]], 1) for v in (kv, score))
    weight = torch.softmax(score.masked_fill((windows < 0)[..., None], -torch.inf), 1).nan_to_num()
    got = compress.compress(pool, ape, windows, dim=dim)
    assert not got[2].any()
    oracle.close(got, (weight * kv).sum(1))
    slots = oracle.uniform_int(-1, 2 * span, span, seed=4, dtype=torch.int32)
    slots[1] = -1
    before = pool[slots.clamp(min=0).long()] * (slots >= 0)[:, None]
    joined, step = torch.cat([before, pool[:3]]), oracle.guarded(pool[:3].clone())
    windows = windows.clamp(max=span + 2)
    cached = compress.compress(step, ape, windows, dim=dim, state=pool, slots=slots)
    assert torch.equal(cached, compress.compress(joined, ape, windows, dim=dim))


@pytest.mark.parametrize(("batch", "seq", "heads", "dim", "rows"), [(1, 1, 64, 128, 300), (2, 3, 5, 64, 40)])
@pytest.mark.parametrize("packed", [False, True])
def test_index_scores(batch, seq, heads, dim, rows, packed):
    q, weights = (
        oracle.normal(batch, seq, heads, dim, seed=4),
        oracle.normal(batch, seq, heads, seed=5, dtype=torch.float32),
    )
    if packed:
        codes, scale = (
            oracle.uniform_int(0, 256, rows, dim // 2, seed=6),
            oracle.uniform_int(120, 132, rows, dim // 32, seed=7),
        )
        slots = oracle.uniform_int(-1, rows, batch * rows, seed=8, dtype=torch.int32)
        keys = oracle.fp4_weight(codes, scale)[slots.clamp(min=0).long()] * (slots >= 0)[:, None]
        got = index.cached_index_scores(q, weights, oracle.guarded(torch.cat([codes, scale], 1)), slots, scale=0.25)
    else:
        keys = oracle.normal(batch, rows, dim, seed=9)
        got = index.index_scores(q, weights, keys, scale=0.25)
    hits = torch.einsum("bshd,bnd->bshn", q.double(), keys.double().view(batch, rows, dim)).clamp(min=0)
    oracle.close(got, torch.einsum("bsh,bshn->bsn", weights.double() * 0.25, hits))


@pytest.mark.parametrize(
    ("rows", "topk", "piece"), [(5000, 512, 0), (2048, 1024, 0), (3000, 1, 0), (7, 7, 0), (1000, 12, 64), (999, 32, 64)]
)
def test_index_select(rows, topk, piece, monkeypatch):
    """One program a token, and pieces of a token's rows side by side, then the best of their
    best.
    """
    if piece:
        monkeypatch.setattr(index, "PIECE", piece)
    scores = oracle.normal(2, 3, rows, seed=10, dtype=torch.float32)
    scores[0, 1] = torch.round(scores[0, 1])  # many equals, both signs of zero among them
    scores[1, 0] = 0.5
    visible = oracle.guarded(
        torch.tensor([[rows, rows, 0], [rows, min(topk, rows) // 2, min(rows, topk + 1)]], dtype=torch.int32)
    )
    offset = oracle.uniform_int(0, 1000, 2, 3, seed=11, dtype=torch.int32)
    picks = index.index_select(scores, visible, offset, topk=topk)
    for b in range(2):
        for s in range(3):
            seen = int(visible[b, s])
            best = torch.sort(scores[b, s, :seen] + 0.0, descending=True, stable=True).indices[:topk].sort().values
            assert torch.equal(picks[b, s, : len(best)].long(), best + int(offset[b, s]))
            assert (picks[b, s, len(best) :] == -1).all()


def test_index_select_takes_nan_and_infinities():
    scores = oracle.guarded(torch.tensor([[[-torch.inf, 3.0, torch.nan, torch.inf, 2.0, -torch.inf]]]))
    visible, offset = (oracle.guarded(torch.tensor([[v]], dtype=torch.int32)) for v in (6, 0))
    assert index.index_select(scores, visible, offset, topk=5).tolist() == [[[0, 1, 2, 3, 4]]]


def test_index_select_takes_nan_and_infinities_in_pieces(monkeypatch):
    """The last piece is short, one holds nothing but the least, and one token sees less than a
    piece.
    """
    monkeypatch.setattr(index, "PIECE", 8)
    scores = torch.full((1, 3, 37), -torch.inf)
    scores[0, :, 3], scores[0, :, 17], scores[0, :, 36], scores[0, :, 20] = torch.nan, torch.inf, 2.0, -1.0
    visible = oracle.guarded(torch.tensor([[37, 19, 5]], dtype=torch.int32))
    offset = oracle.guarded(torch.tensor([[100, 0, 7]], dtype=torch.int32))
    picks = index.index_select(oracle.guarded(scores), visible, offset, topk=4)
    assert picks.tolist() == [[[103, 117, 120, 136], [0, 1, 3, 17], [7, 8, 9, 10]]]


def mixes_of(h, fn, eps):
    x = h.double().flatten(1)
    return (x @ fn.double().T) / torch.sqrt((x**2).mean(1, keepdim=True) + eps)


def split(mixes, scale, base, hc, eps, iters):
    mixes, scale, base = mixes.double(), scale.double(), base.double()
    pre = torch.sigmoid(mixes[:, :hc] * scale[0] + base[:hc]) + eps
    post = 2 * torch.sigmoid(mixes[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    comb = torch.softmax((mixes[:, 2 * hc :] * scale[2] + base[2 * hc :]).unflatten(1, (hc, hc)), -1) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return pre, post, comb


@pytest.mark.parametrize(("dim", "piece", "pieces"), [(4096, 2048, 8), (128, 512, 1), (100, 448, 1)])
def test_hc_goes_through_no_channels_that_are_not_there(monkeypatch, dim, piece, pieces):
    """A narrow model's streams are one piece, no longer than they are."""
    launched = []

    class Mix:
        def __getitem__(self, grid):
            return lambda *_, **constants: launched.append((grid, constants["PIECE"]))

    monkeypatch.setattr(mhc, "mix_kernel", Mix())
    h, fn = oracle.normal(1, 4, dim, seed=0), oracle.normal(24, 4 * dim, seed=1, dtype=torch.float32)
    mhc.hc_pre(h, fn, torch.ones(3), torch.zeros(24), norm_eps=1e-6, eps=1e-6, iters=1)
    assert launched == [((1, pieces), piece)]


@pytest.mark.parametrize(("tokens", "hc", "dim"), [(1, 4, 4096), (17, 4, 192), (3, 2, 100)])
def test_hc(tokens, hc, dim):
    n = hc * (hc + 2)
    h, fn = (
        oracle.normal(tokens, hc, dim, seed=12),
        oracle.normal(n, hc * dim, seed=13, dtype=torch.float32, scale=0.05),
    )
    scale, base = oracle.normal(3, seed=14, dtype=torch.float32), oracle.normal(n, seed=15, dtype=torch.float32)
    pre, post, comb = split(mixes_of(h, fn, 1e-6), scale, base, hc, 1e-6, 20)
    exact = torch.einsum("tj,tjd->td", pre, h.double())
    y, got_post, got_comb = mhc.hc_pre(h, fn, scale, base, norm_eps=1e-6, eps=1e-6, iters=20)
    oracle.close(y, exact, wide=1e-5)
    torch.testing.assert_close(got_post.double(), post, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(got_comb.double(), comb, rtol=2e-5, atol=1e-6)
    weight = oracle.normal(dim, seed=16)
    for paired in (False, True):
        normed, _, _, made = mhc.hc_pre_norm(
            h, fn, scale, base, weight, norm_eps=1e-6, eps=1e-6, iters=20, paired=paired
        )
        assert (made is None) == bool(dim % 128)
        if made:
            codes, scales = oracle.quantise_fp8(normed, 128)
            assert torch.equal(made[0][0], codes)
            assert torch.equal(made[1], scales)
            if paired:  # of every 32 channels the even ones, then the odd ones
                assert torch.equal(made[0][1], codes.reshape(tokens, -1, 16, 2).transpose(2, 3).reshape(tokens, dim))
    wide = y.double()
    oracle.close(normed, wide / torch.sqrt((wide**2).mean(1, keepdim=True) + 1e-6) * weight.double())
    mixed = torch.einsum("tn,td->tnd", got_post.double(), wide) + torch.einsum(
        "tjn,tjd->tnd", got_comb.double(), h.double()
    )
    oracle.close(mhc.hc_post(y, h, oracle.guarded(got_post), oracle.guarded(got_comb)), mixed)
    pre = torch.sigmoid(mixes_of(h, fn[:hc], 1e-6) * scale[0].double() + base[:hc].double()) + 1e-6
    got = mhc.hc_head(h, oracle.guarded(fn[:hc]), scale[:1], oracle.guarded(base[:hc]), norm_eps=1e-6, eps=1e-6)
    oracle.close(got, torch.einsum("tj,tjd->td", pre, h.double()), wide=1e-5)
