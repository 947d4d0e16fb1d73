"""The cann tier's contracts on simulated CANN against the reference backend."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from dsv4_backend_ascend import simulate, vendor
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.cann import attention, matmul, mhc, moe, norm
from dsv4_backend_ascend.capability import GENERATIONS
from dsv4_backend_ascend.kept import Kept
from dsv4_backend_ascend.weights import from_mx, to_mx

from dsv4_core.contract import dtypes, registry
from dsv4_core.contract.dtypes import Experts, ScaledArray

BF16_ULP = 2.0**-7  # relative, at the low end of a binade


@pytest.fixture(scope="module")
def reference():
    return registry.create("reference", numerics="native")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(2)


def _bf16(*shape):
    return torch.randn(*shape).bfloat16()


def keeper():
    """What an op of the cann tier needs of a backend."""
    return SimpleNamespace(kept=Kept())


def host(tensor):
    return (
        tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def close(got, want, ulps=1.0):
    """Within ``ulps`` BF16 units of each element, and of a hundredth of the largest where sums
    cancel.
    """
    got, want = got.double().numpy(), np.asarray(want, np.float64)
    allowed = ulps * BF16_ULP * (np.abs(want) + 0.01 * np.abs(want).max())
    assert got.shape == want.shape
    assert np.all(np.abs(got - want) <= allowed), float(np.max(np.abs(got - want) - allowed))


def _quantised(fmt, out, cols):
    weight = dtypes.quantise_weight(np.random.default_rng(out + cols).standard_normal((out, cols)), fmt)
    return weight, to_mx(torch.from_numpy(weight.data), torch.from_numpy(weight.scale), fmt)


@pytest.mark.parametrize("weight", [None, torch.bfloat16, torch.float32])
def test_rms_norm(reference, weight):
    simulate.install("910B")
    x = _bf16(7, 96)
    gamma = None if weight is None else torch.rand(96).to(weight)
    close(
        norm.rms_norm(keeper(), x, gamma, eps=1e-6),
        reference.rms_norm(host(x), None if gamma is None else host(gamma), eps=1e-6),
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_apply_rope(reference, inverse):
    simulate.install("910C")
    x, positions, freqs = _bf16(5, 3, 48), torch.tensor([0, 1, 77, 4096, 1 << 20], dtype=torch.int32), torch.rand(8)
    got = norm.apply_rope(keeper(), x, positions, freqs, inverse=inverse)
    close(got, reference.apply_rope(host(x), positions.numpy(), freqs.numpy(), inverse=inverse))
    assert torch.equal(got[..., :32], x[..., :32])


@pytest.mark.parametrize("groups", [2, 1024], ids=["transposed_inside", "transposed_outside"])
def test_grouped_linear(reference, groups):
    simulate.install("910B")
    x, weight = _bf16(3, groups, 64), _bf16(groups * 16, 64)
    close(matmul.grouped_linear(x, weight), reference.grouped_linear(host(x), host(weight)))


@pytest.mark.parametrize("fmt", ["e4m3", "e2m1"])
@pytest.mark.parametrize(("out", "cols"), [(48, 256), (272, 384)])
def test_linear_mx(reference, fmt, out, cols):
    simulate.install("950")
    weight, mx = _quantised(fmt, out, cols)
    x = _bf16(6, cols)
    close(
        matmul.linear_mx(keeper(), x, mx, out_dtype="bfloat16"), reference.linear(host(x), weight, out_dtype="bfloat16")
    )


@pytest.mark.parametrize("fmt", ["e4m3", "e2m1"])
@pytest.mark.parametrize(("out", "cols"), [(48, 256), (272, 384), (130, 160)])
def test_mx_repacking_is_reversible(fmt, out, cols):
    weight, mx = _quantised(fmt, out, cols)
    data, scale = from_mx(mx)
    assert np.array_equal(data.numpy(), weight.data)
    assert np.array_equal(scale.numpy(), weight.scale)
    assert mx.shape == weight.shape
    assert mx.scale.shape[-2:] == (-(-cols // 64), 2)


OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)  # the second expert has no row; two rows belong to other ranks


def test_expert_linear_bf16(reference):
    simulate.install("910B")
    x, weight = _bf16(7, 64), _bf16(3, 48, 64)
    want = reference.expert_linear(host(x), Experts([host(w) for w in weight]), OFFSETS.numpy())
    got = matmul.expert_linear_bf16(keeper(), x, weight, OFFSETS)
    close(got, want)
    assert bool((got[5:] == 0).all())


@pytest.mark.parametrize("fmt", ["e4m3", "e2m1"])
def test_expert_linear_mx(reference, fmt):
    simulate.install("950")
    packed = [dtypes.quantise_weight(np.random.default_rng(e).standard_normal((64, 256)), fmt) for e in range(3)]
    stack = [torch.from_numpy(np.stack([getattr(w, part) for w in packed])) for part in ("data", "scale")]
    x = _bf16(7, 256)
    want = reference.expert_linear(host(x), Experts(packed), OFFSETS.numpy())
    mx = to_mx(*stack, fmt)
    close(matmul.expert_linear_mx(keeper(), x, matmul.tiled(mx) if fmt == "e2m1" else mx, OFFSETS), want)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("experts", [256, 384])
def test_gate(reference, experts, generation):
    simulate.install(generation)
    op = moe.GATES[generation]
    logits, bias = torch.randn(7, experts), torch.randn(experts) * 0.1
    one = torch.eye(experts)  # the product's part is not asked here
    weights, picks = moe.gate(op, logits, bias, topk=6, route_scale=1.5)
    theirs = reference.gate(host(logits), host(one), host(bias), topk=6, route_scale=1.5)
    assert np.array_equal(picks.numpy(), theirs[1])
    np.testing.assert_allclose(weights.numpy(), theirs[0], rtol=1e-5)
    table, ids = (
        torch.stack([torch.randperm(experts)[:6] for _ in range(20)]),
        torch.tensor([0, 19, 3, 3, 7, 1, 2], dtype=torch.int32),
    )
    weights, picks = moe.gate_hash(op, logits, table, ids, route_scale=1.5)
    theirs = reference.gate_hash(host(logits), host(one), table.numpy(), ids.numpy(), route_scale=1.5)
    assert np.array_equal(picks.numpy(), theirs[1])
    np.testing.assert_allclose(weights.numpy(), theirs[0], rtol=1e-4)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_of_equal_scores_the_lower_expert_is_picked(generation):
    simulate.install(generation)
    _, picks = moe.gate(moe.GATES[generation], torch.zeros(2, 8), torch.zeros(8), topk=3, route_scale=1.0)
    assert picks.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_fused_gate_loses_low_scores_as_its_kernel_does_and_has_to_be_asked_for(generation):
    """1 + e^x is 1 below -17: scores of 0, which by themselves would be 0 / 0."""
    simulate.install(generation)
    weights, _ = moe.gate(moe.GATES[generation], torch.full((1, 8), -20.0), torch.zeros(8), topk=2, route_scale=1.5)
    assert weights.tolist() == [[0.0, 0.0]]
    for gating in ("exact", "fused"):
        backend = AscendBackend(simulate=generation, tier="vendor", gating=gating)
        x, router = torch.full((1, 8), -1.0).bfloat16(), torch.full((4, 8), 2.5).bfloat16()
        weights, _ = backend.gate(x, router, torch.zeros(4), topk=2, route_scale=1.5)
        assert weights.tolist() == [[0.75, 0.75] if gating == "exact" else [0.0, 0.0]]
        assert (
            (backend.claims_level is None) == (set(backend.departures) == {"gate", "gate_hash"}) == (gating == "fused")
        )


def test_int8_is_as_lossy_as_its_scales_say():
    simulate.install("910B")
    x, weight = _bf16(6, 256), torch.randn(3, 48, 256)
    each = [dtypes.quantise_int8(w.numpy()) for w in weight]
    packed = ScaledArray(
        torch.from_numpy(np.stack([w.data for w in each])), torch.from_numpy(np.stack([w.scale for w in each])), "int8"
    )
    got = matmul.linear_int8(x, packed[0], out_dtype="bfloat16").double()
    exact = x.double() @ weight[0].double().t()
    assert 0.001 < float((got - exact).norm() / exact.norm()) < 0.02
    grouped = matmul.expert_linear_int8(keeper(), x, packed, torch.tensor([0, 6, 6, 6], dtype=torch.int32)).double()
    assert float((grouped - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu(reference, weighted):
    simulate.install("950")
    gate, up = _bf16(6, 32) * 9, _bf16(6, 32) * 9
    weights = torch.rand(6) if weighted else None
    want = reference.swiglu(host(gate), host(up), None if weights is None else weights.numpy(), limit=10.0)
    close(moe.swiglu(gate, up, weights, limit=10.0), want)


@pytest.mark.parametrize(("first", "count"), [(0, 8), (2, 3)], ids=["all_experts", "one_rank_of_several"])
def test_dispatch_and_combine(reference, first, count):
    simulate.install("910B")
    x, weights = _bf16(9, 16), torch.rand(9, 2)
    indices = torch.stack([torch.randperm(8)[:2] for _ in range(9)]).to(torch.int32)
    backend = keeper()
    got = moe.dispatch(backend, x, weights, indices, first_expert=first, n_experts=count)
    backend.kept.of((indices, "routed among"), lambda: 8)  # as a gate of eight experts notes
    known = moe.dispatch(backend, x, weights, indices, first_expert=first, n_experts=count)
    assert all(map(torch.equal, got, known))
    want = reference.dispatch(host(x), weights.numpy(), indices.numpy(), first_expert=first, n_experts=count)
    for ours, theirs in zip(got, want, strict=True):
        assert np.array_equal(host(ours), theirs)
        assert dtypes.dtype_name(ours) == dtypes.dtype_name(theirs)
    rows, shared = _bf16(18, 16), _bf16(9, 16)
    for add in (None, shared):
        y = moe.combine(rows, got[2], got[3], add, topk=2, out_dtype=torch.bfloat16)
        theirs = reference.combine(
            host(rows), want[2], want[3], None if add is None else host(add), topk=2, out_dtype="bfloat16"
        )
        close(y, theirs)


def _picks(tokens, picks, rows):
    chosen = torch.stack([torch.randperm(rows)[:picks] for _ in range(tokens)]).to(torch.int32)
    chosen[0] = -1  # a token without a row
    chosen[1, ::2] = -1  # holes between valid picks
    chosen[2, 1] = chosen[2, 0]  # listed twice
    return chosen


@pytest.mark.parametrize("sink", ["small", "large", "none"])
def test_sparse_attn_carries_the_sink_as_a_row(reference, sink):
    simulate.install("910B")
    q, kv, picks = _bf16(6, 4, 512), _bf16(40, 512), _picks(6, 11, 40)
    sinks = {
        "small": torch.randn(4),
        "large": torch.tensor([30.0, 88.7, -60.0, 7.123456]),
        "none": torch.full((4,), -1e5),
    }[sink]
    got = attention.sparse_attn(keeper(), q, kv, sinks, picks, softmax_scale=512**-0.5)
    want = reference.sparse_attn(host(q), host(kv), sinks.numpy(), picks.numpy(), softmax_scale=512**-0.5)
    close(got, want)
    assert bool((got[0] == 0).all())


@pytest.mark.parametrize(("batch", "seq", "rows"), [(1, 7, 150), (2, 3, 40)])
def test_index_topk(reference, batch, seq, rows):
    simulate.install("910C")
    q, weights, keys = _bf16(batch, seq, 8, 128), torch.randn(batch, seq, 8), _bf16(batch, rows, 128)
    visible = torch.randint(0, rows + 1, (batch, seq), dtype=torch.int32)
    visible[0, 0] = 0
    offset = torch.randint(0, 50, (batch, seq), dtype=torch.int32)
    got = attention.index_topk(keeper(), q, weights, keys, visible, offset, topk=16)
    want = reference.index_topk(
        host(q), weights.numpy(), host(keys), visible.numpy(), offset.numpy(), scale=0.3, topk=16
    )
    assert got.dtype == torch.int32
    assert np.array_equal(np.sort(got.numpy(), -1), np.sort(want, -1))


def test_the_extension_mixes_streams_as_the_model_does(reference):
    simulate.install("910B")
    h, fn, scale, base = _bf16(5, 4, 128), torch.randn(24, 512) * 0.1, torch.rand(3), torch.randn(24)
    form = {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}
    got = vendor.hc_pre(h, fn, scale, base, **form)
    want = reference.hc_pre(host(h), fn.numpy(), scale.numpy(), base.numpy(), **form)
    close(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inverse", [False, True])
def test_the_extension_turns_a_copy(reference, inverse):
    simulate.install("950")
    x, positions, freqs = _bf16(5, 3, 48), torch.tensor([0, 1, 77, 4096, 1 << 20], dtype=torch.int32), torch.rand(8)
    before = x.clone()
    got = vendor.apply_rope(keeper(), x, positions, freqs, inverse=inverse)
    close(got, reference.apply_rope(host(x), positions.numpy(), freqs.numpy(), inverse=inverse))
    assert torch.equal(got[..., :32], x[..., :32])
    assert torch.equal(x, before)


def test_hyper_connections(reference):
    simulate.install("950")
    h, fn, scale, base = _bf16(5, 4, 32), torch.randn(24, 128) * 0.1, torch.rand(3), torch.randn(24)
    form = {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}
    got = mhc.hc_pre(h, fn, scale, base, **form)
    want = reference.hc_pre(host(h), fn.numpy(), scale.numpy(), base.numpy(), **form)
    close(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-6)
    y = _bf16(5, 32)
    close(mhc.hc_post(y, h, got[1], got[2]), reference.hc_post(host(y), host(h), want[1], want[2]))


@pytest.mark.parametrize("spread", [0.1, 5.0, 40.0])
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_hyper_connections_by_norms(reference, iters, spread):
    """Sinkhorn as norms of square roots: logits of every steepness, and fewer iterations than it
    needs to settle.
    """
    simulate.install("910B")
    h, fn, scale, base = _bf16(5, 4, 32), torch.randn(24, 128) * 0.1, torch.rand(3), torch.randn(24) * spread
    form = {"norm_eps": 1e-6, "eps": 1e-6, "iters": iters}
    got = mhc.hc_pre_by_norms(keeper(), h, fn, scale, base, **form)
    want = reference.hc_pre(host(h), fn.numpy(), scale.numpy(), base.numpy(), **form)
    close(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-4, atol=1e-7)
