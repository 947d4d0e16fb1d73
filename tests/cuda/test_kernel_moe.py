"""Routing, dispatch, SwiGLU, combination and unquantised linear layers against their
definitions.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from dsv4_backend_cuda.kernels import dense_matmul, moe


def scores(logits):
    return torch.sqrt(torch.logaddexp(logits.double(), torch.zeros((), dtype=torch.float64)))


@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (256, 6), (384, 6), (5, 5)])
def test_route(experts, topk):
    logits = oracle.normal(7, experts, seed=1, dtype=torch.float32, scale=4.0)
    logits[1] = -60.0  # softplus is 1e-26 here: log(1 + exp(x)) without care is zero
    logits[1, :2] = -50.0
    bias = oracle.normal(experts, seed=2, dtype=torch.float32, scale=0.1)
    weights, indices, _ = moe.route(logits[None], bias, topk=topk, route_scale=1.5)
    ranked = scores(logits) + bias.double()
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :topk]
    assert torch.equal(indices.long(), order)
    chosen = scores(logits).gather(1, order)
    torch.testing.assert_close(weights.double(), chosen / chosen.sum(1, keepdim=True) * 1.5, rtol=1e-5, atol=1e-9)


def test_route_ties_go_to_the_lower_expert():
    logits = oracle.guarded(torch.zeros(2, 16))
    _, indices, _ = moe.route(logits[None], oracle.guarded(torch.zeros(16)), topk=4, route_scale=1.0)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2


def test_the_router_adds_up_its_products_pieces():
    parts = oracle.normal(3, 7, 24, seed=21, dtype=torch.float32)
    bias = oracle.normal(24, seed=22, dtype=torch.float32, scale=0.1)
    whole = oracle.guarded((parts[0] + parts[1] + parts[2])[None])
    for got, want in zip(*(moe.route(x, bias, topk=6, route_scale=1.5)[:2] for x in (parts, whole)), strict=True):
        assert torch.equal(got, want)


def test_route_by_hash():
    logits = oracle.normal(5, 64, seed=3, dtype=torch.float32)
    table = oracle.uniform_int(0, 64, 100, 6, seed=4, dtype=torch.int64)
    ids = oracle.uniform_int(0, 100, 5, seed=5, dtype=torch.int32)
    weights, indices, _ = moe.route(logits[None], None, topk=6, route_scale=2.5, tid2eid=table, ids=ids)
    assert torch.equal(indices.long(), table[ids.long()])
    chosen = scores(logits).gather(1, indices.long())
    torch.testing.assert_close(weights.double(), chosen / chosen.sum(1, keepdim=True) * 2.5, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9])
@pytest.mark.parametrize(("experts", "topk"), [(5, 5), (24, 6), (256, 6), (384, 1)])
def test_few_tokens_are_sorted_by_who_routes_them(tokens, experts, topk):
    logits = oracle.normal(tokens, experts, seed=31, dtype=torch.float32)
    logits[0] = torch.nan  # goes to no expert that there is, or to the last
    _, indices, got = moe.route(logits[None], oracle.guarded(torch.zeros(experts)), topk=topk, route_scale=1.0)
    if tokens > moe.SORTED_TOKENS:
        assert got is None
        return
    for mine, want in zip(got, moe.sort(indices, first_expert=0, n_experts=experts), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "first", "local"),
    [(1, 8, 2, 0, 8), (9, 16, 6, 0, 16), (400, 16, 6, 4, 5), (3, 8, 2, 6, 2)],
)
def test_dispatch_and_combine(tokens, experts, topk, first, local):
    x, weights = oracle.normal(tokens, 200, seed=6), oracle.normal(tokens, topk, seed=7, dtype=torch.float32)
    indices = oracle.guarded(
        torch.stack(
            [torch.randperm(experts, generator=torch.Generator().manual_seed(t))[:topk] for t in range(tokens)]
        ).to(torch.int32)
    )
    rows, row_weights, order, offsets = moe.dispatch(x, weights, indices, first_expert=first, n_experts=local)
    group = indices.flatten().long() - first
    group = torch.where((group >= 0) & (group < local), group, local)
    expected = torch.sort(group, stable=True).indices
    assert torch.equal(order.long(), expected)
    assert torch.equal(offsets.long(), torch.tensor([(group < e).sum() for e in range(local + 1)]))
    assert torch.equal(rows, x[expected // topk])
    assert torch.equal(row_weights, weights.flatten()[expected])
    rows = oracle.guarded(rows)
    rows[int(offsets[-1]) :] = torch.nan  # other ranks' rows hold anything
    shared = oracle.normal(tokens, 200, seed=8)
    copies = torch.zeros(tokens * topk, 200, dtype=torch.float64)
    copies[order[: offsets[-1]].long()] = rows[: offsets[-1]].double()
    exact = copies.view(tokens, topk, 200).sum(1)
    oracle.close(moe.combine(rows, moe.invert(order), offsets, None, topk=topk, out_dtype=torch.float32), exact)
    oracle.close(
        moe.combine(rows, moe.invert(order), offsets, shared, topk=topk, out_dtype=torch.bfloat16),
        exact + shared.double(),
    )


@pytest.mark.parametrize(("rows", "dim"), [(1, 128), (5, 1152), (3, 2048)])
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu(rows, dim, weighted):
    gate, up = (oracle.normal(rows, dim, seed=s, scale=6.0) for s in (9, 10))
    gate[0, 0], gate[0, 1] = -200.0, 300.0
    weights = oracle.normal(rows, seed=11, dtype=torch.float32) if weighted else None
    g, u = gate.double().clamp(max=10), up.double().clamp(-10, 10)
    exact = g / (1 + torch.exp(-g)) * u * (weights.double()[:, None] if weighted else 1)
    got = moe.swiglu(gate, up, weights, limit=10.0)
    oracle.close(got, exact)
    codes, scales = oracle.quantise_fp8(got, 128)
    both = oracle.guarded(torch.cat([gate, up], 1)[None])
    pieces = oracle.guarded(both.float() * torch.tensor([0.25, 0.5, 0.25])[:, None, None])  # their sum is what is above
    order = oracle.guarded(torch.arange(rows, dtype=torch.int32).flip(0))
    for paired in (False, True):
        inside = codes.unflatten(1, (-1, 16, 2)).transpose(2, 3).flatten(1) if paired else codes
        if not weighted:
            for each in (both, pieces):
                made = moe.swiglu_quant(each, limit=10.0, paired=paired)
                assert torch.equal(made[0], inside)
                assert torch.equal(made[1], scales)
            continue
        turned = oracle.guarded(weights.flip(0))
        alone, none = moe.swiglu_experts(both[0], turned, order, None, limit=10.0, paired=paired)
        made, early = moe.swiglu_experts(
            both[0], turned, order, oracle.guarded(pieces[:, :2].contiguous()), limit=10.0, paired=paired
        )
        assert not none[0].numel()
        for got in (alone, made):
            assert torch.equal(got[0], inside)
            assert torch.equal(got[1], scales)
        plain = moe.swiglu_quant(oracle.guarded(both[:, :2].contiguous()), limit=10.0)
        assert torch.equal(early[0], plain[0])
        assert torch.equal(early[1], plain[1])


@pytest.mark.parametrize(("tokens", "out", "k"), [(1, 8, 100), (5, 200, 256), (40, 130, 384), (3, 70, 2100)])
def test_linear_with_bf16_weights(tokens, out, k):
    x, weight = oracle.normal(tokens, k, seed=12), oracle.normal(out, k, seed=13)
    exact = x.double() @ weight.double().T
    oracle.close(dense_matmul.linear(x, weight, out_dtype=torch.float32), exact)
    parts = dense_matmul.products(x, [weight], out_dtype=torch.float32, split=True)
    assert len(parts) == (4 if k >= 1024 else 1)
    oracle.close(dense_matmul.linear(x, weight, out_dtype=torch.bfloat16, split=True), exact)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("tokens", "groups", "out", "k"), [(1, 2, 64, 128), (20, 4, 160, 256)])
def test_grouped_linear(tokens, groups, out, k, native, monkeypatch):
    monkeypatch.setattr(dense_matmul.launch, "native_fp8", lambda _: native)
    x = oracle.normal(tokens, groups, k, seed=14)
    codes, scale = (
        oracle.fp8_codes(groups * out, k, seed=15),
        oracle.uniform_int(115, 122, -(-groups * out // 128), k // 128, seed=16),
    )
    wide = oracle.fp8_weight(codes, scale).view(groups, out, k)
    exact = torch.einsum("tgk,gok->tgo", x.double(), wide).flatten(1)
    oracle.close(dense_matmul.grouped_linear(x, codes, scale), exact)
