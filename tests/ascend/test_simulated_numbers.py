"""Simulated kernels against the documents' formulas, written again in NumPy and ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from dsv4_backend_ascend import simulate
from dsv4_backend_ascend.constraints import BFLOAT16, E2M1, E4M3_NPU, E8M0

from dsv4_core.contract import dtypes

OPS = torch.ops.npu


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def _codes(*shape):
    return torch.randn(*shape).mul(50).to(torch.float8_e4m3fn)


def _scales(*shape):
    return torch.randint(100, 140, shape, dtype=torch.uint8)


def _values(codes):
    return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def _mx(scale, k):
    return np.repeat(dtypes.E8M0_VALUES[scale.numpy()].reshape(*scale.shape[:-2], -1).astype(np.float64), 32, axis=-1)[
        ..., :k
    ]


def test_rms_norm_rounds_once():
    simulate.install("910B")
    x, gamma = torch.randn(7, 96).bfloat16(), torch.rand(96).bfloat16()
    got, rstd = OPS.npu_rms_norm(x, gamma, 1e-6)
    wide = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(got, (wide * gamma.double()).to(torch.bfloat16))
    assert rstd.shape == (7, 1)


def test_rotary_turns_interleaved_pairs():
    simulate.install("910C")
    x, angle = torch.randn(4, 2, 16), torch.randn(4, 8)
    cos, sin = (f(angle).repeat_interleave(2, -1).unsqueeze(1) for f in (torch.cos, torch.sin))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(4, 1, 8), angle.unsqueeze(1))
    torch.testing.assert_close(OPS.npu_rotary_mul(x, cos, sin, "interleave"), torch.view_as_real(turned).flatten(-2))


def test_int8_round_trip_stays_within_half_a_step():
    simulate.install("910B")
    x = torch.randn(6, 64).bfloat16()
    x[2] = 0
    codes, scale = OPS.npu_dynamic_quant(x)
    error = (codes.float() * scale.unsqueeze(-1) - x.float()).abs()
    assert bool((error <= scale.unsqueeze(-1) * 0.5 * (1 + 1e-5)).all())
    assert bool((codes[2] == 0).all())
    weight, per_channel, per_token = torch.randint(-127, 128, (8, 64), dtype=torch.int8), torch.rand(8), torch.rand(6)
    got = OPS.npu_quant_matmul(codes, weight.t(), per_channel, pertoken_scale=per_token, output_dtype=BFLOAT16)
    exact = (codes.long() @ weight.long().t()).double() * per_channel.double() * per_token.double().unsqueeze(-1)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("k", [128, 384, 416])  # 416: neither a multiple of 128 nor an even number of blocks
def test_mx_quantisation_rounds_scales_up_as_the_model_does(k):
    simulate.install("950")
    x = (torch.randn(5, k) * torch.logspace(-3, 3, 5).unsqueeze(-1)).bfloat16()
    codes, scale = OPS.npu_dynamic_mx_quant(x, dst_type=E4M3_NPU, block_size=128, scale_alg=1)
    padded = np.pad(x.float().numpy(), ((0, 0), (0, -k % 128))).reshape(5, -1, 128)
    byte = dtypes.power_of_two_scale(np.abs(padded).max(-1), "e4m3")
    want = dtypes.encode(padded / dtypes.E8M0_VALUES[byte][..., None], "e4m3").reshape(5, -1)[:, :k]
    assert np.array_equal(codes.view(torch.uint8).numpy(), want)
    assert np.array_equal(scale.flatten(-2).numpy()[:, : byte.shape[1]], byte)
    assert scale.flatten(-2).shape[1] % 2 == 0


def test_mx_quantisation_by_exponent_saturates():
    simulate.install("950")
    x = torch.zeros(1, 32).bfloat16()
    x[0, 0] = 510  # exponent 8, as 448 has: scale 1, and the value does not fit
    codes, scale = OPS.npu_dynamic_mx_quant(x, dst_type=E4M3_NPU, block_size=32, scale_alg=0)
    assert float(codes[0, 0].float()) == 448
    assert scale.flatten().tolist() == [127, 0]


@pytest.mark.parametrize("pairs", [False, True], ids=["fp8", "fp4"])
def test_mx_products_equal_the_dequantised_ones(pairs):
    simulate.install("950")
    x, xs, ws = _codes(5, 128), _scales(5, 2, 2), _scales(3, 64, 2, 2)
    weight = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) if pairs else _codes(3, 64, 128)
    wide = dtypes.unpack(weight.numpy(), "e2m1").astype(np.float64) if pairs else _values(weight)
    want = np.einsum("tk,enk->etn", _values(x) * _mx(xs, 128), wide * _mx(ws, 128))
    form = {"x2_dtype": E2M1, "group_sizes": [0, 0, 32]} if pairs else {"group_sizes": [1, 1, 32]}
    got = OPS.npu_quant_matmul(
        x,
        weight[0].t(),
        ws[0].transpose(0, 1),
        pertoken_scale=xs,
        scale_dtype=E8M0,
        pertoken_scale_dtype=E8M0,
        output_dtype=BFLOAT16,
        **form,
    )
    tolerance = (
        np.abs(_values(x) * _mx(xs, 128)) @ np.abs(wide[0] * _mx(ws[0], 128)).T * 2**-20 + np.abs(want[0]) * 2**-8
    )
    assert np.all(np.abs(got.double().numpy() - want[0]) <= tolerance)
    scales = (
        {"antiquant_scale": [ws.transpose(1, 2)], "weight_dtype": E2M1}
        if pairs
        else {"scale": [ws.transpose(1, 2)], "scale_dtype": E8M0}
    )
    tiles = OPS.npu_format_cast(weight, 29, customize_dtype=24, input_dtype=E2M1) if pairs else weight
    (grouped,) = OPS.npu_grouped_matmul(
        [x], [tiles.transpose(1, 2)], per_token_scale=[xs], per_token_scale_dtype=E8M0, group_list=torch.tensor([2, 2, 5]),
        split_item=3, group_type=0, output_dtype=BFLOAT16, **scales,
    )  # fmt: skip
    assert torch.equal(grouped[:2], got[:2])
    assert np.all(
        np.abs(grouped[2:].double().numpy() - want[2, 2:])
        <= np.abs(want[2, 2:]) * 2**-7 + np.abs(want[2]).max() * 2**-16
    )


def test_rows_after_the_last_group_are_left_undefined():
    simulate.install("910B")
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
    (y,) = OPS.npu_grouped_matmul([x], [weight], group_list=torch.tensor([1, 4]), split_item=3, group_type=0)
    assert bool(y[:4].isfinite().all())
    assert bool(y[4:].isnan().all())


@pytest.mark.parametrize("group_list", [[3, 2], [-1, 4], [2, 7]], ids=["falling", "negative", "beyond"])
def test_running_totals_are_checked(group_list):
    simulate.install("910B")
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
    with pytest.raises(simulate.CannError, match="running totals"):
        OPS.npu_grouped_matmul([x], [weight], group_list=torch.tensor(group_list), split_item=3, group_type=0)


def test_routing_and_back_is_the_identity():
    simulate.install("910B")
    x, experts = torch.randn(5, 8), torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1], [0, 2]], dtype=torch.int32)
    rows, order, ends, _ = OPS.npu_moe_init_routing_v2(
        x, experts, expert_num=3, expert_tokens_num_flag=True, active_expert_range=[0, 3], row_idx_type=1
    )
    assert ends.tolist() == [3, 6, 10]
    assert order.tolist() == [1, 4, 8, 2, 5, 7, 0, 3, 6, 9]  # stable: of one expert the earlier copy first
    assert torch.equal(rows, x[order // 2])
    position = torch.argsort(order).to(torch.int32)
    back = OPS.npu_moe_token_unpermute(rows, position, torch.full((5, 2), 0.5))
    torch.testing.assert_close(back, x)


def test_indexer_picks_the_best_visible_keys_through_the_block_table():
    simulate.install("910B")
    query, key, weights = (
        torch.randn(3, 1, 8, 128).bfloat16(),
        torch.randn(4, 16, 1, 128).bfloat16(),
        torch.randn(3, 1, 8),
    )
    blocks = torch.tensor(
        [[3, 1, 0], [0, 2, 99], [1, 99, 99]], dtype=torch.int32
    )  # 99: past the row's length, never read
    lengths = torch.tensor([40, 20, 3], dtype=torch.int32)
    picks, _ = OPS.npu_lightning_indexer(
        query,
        key,
        weights,
        actual_seq_lengths_key=lengths,
        block_table=blocks,
        layout_key="PA_BSND",
        sparse_count=5,
        sparse_mode=0,
    )
    for row, length in enumerate(lengths.tolist()):
        flat = torch.cat([key[b, :, 0] for b in blocks[row].tolist() if b != 99])[:length].double()
        scores = (weights[row, 0].double() @ (query[row, 0].double() @ flat.t()).relu()).tolist()
        best = sorted(range(length), key=lambda n: -scores[n])[:5]
        assert picks[row, 0, 0].tolist() == best + [-1] * (5 - len(best))


def _attention(picks, *, rows, mode=0):
    query = torch.randn(len(picks), 2, 512).bfloat16()
    result = OPS.npu_sparse_flash_attention(
        query, rows, rows, torch.tensor(picks, dtype=torch.int32).unsqueeze(1), 512**-0.5,
        actual_seq_lengths_query=torch.tensor([len(picks)], dtype=torch.int32),
        actual_seq_lengths_kv=torch.tensor([len(rows)], dtype=torch.int32),
        query_rope=torch.zeros(len(picks), 2, 64).bfloat16(), key_rope=torch.zeros(len(rows), 1, 64).bfloat16(),
        layout_query="TND", layout_kv="TND", sparse_mode=mode, attention_mode=2, return_softmax_lse=True,
    )  # fmt: skip
    return query, result


def test_sparse_attention_and_a_sink_folded_in_afterwards():
    simulate.install("910B")
    rows, picks = torch.randn(6, 1, 512).bfloat16(), [[5, 0, 2], [1, 1, -1], [4, -1, -1]]
    query, (out, top, total) = _attention(picks, rows=rows)
    sink = torch.tensor([0.3, -1.0])
    folded = out * (total / (total + (sink - top).exp()))[0].unsqueeze(-1)
    for t, chosen in enumerate(picks):
        keys = rows[[i for i in chosen if i >= 0], 0].double()
        scores = query[t].double() @ keys.t() * 512**-0.5
        weights = torch.softmax(torch.cat([scores, sink.double().unsqueeze(-1)], -1), -1)[:, :-1]
        torch.testing.assert_close(folded[t].double(), weights @ keys, rtol=2**-8, atol=1e-3)


def test_sparse_attention_of_no_row_is_undefined():
    simulate.install("910B")
    _, (out, _, _) = _attention([[0, 1], [-1, -1]], rows=torch.randn(2, 1, 512).bfloat16())
    assert bool(out[0].isfinite().all())
    assert bool(out[1].isnan().all())


@pytest.mark.parametrize(
    ("picks", "word"), [([[-1, 0]], "valid ones come first"), ([[2, 0]], "below the sequence's length")]
)
def test_sparse_indices_are_checked(picks, word):
    simulate.install("910B")
    with pytest.raises(simulate.CannError, match=word):
        _attention(picks, rows=torch.randn(2, 1, 512).bfloat16())


def test_right_down_causal_mode_hides_later_rows():
    simulate.install("910B")
    rows = torch.randn(4, 1, 512).bfloat16()
    _, (out, _, _) = _attention([[0, 3], [0, 3], [0, 3], [0, 3]], rows=rows, mode=3)
    torch.testing.assert_close(out[0], rows[0].expand(2, 512))  # token 0 of four sees row 0 only


def test_hyper_connections_as_the_model_writes_them():
    simulate.install("950")
    x, h_res, h_out, h_post = (
        torch.randn(3, 4, 32).bfloat16(),
        torch.rand(3, 4, 4),
        torch.randn(3, 32).bfloat16(),
        torch.rand(3, 4),
    )
    got = OPS.npu_mhc_post(x, h_res, h_out, h_post)
    want = np.einsum("tjn,tjd->tnd", h_res.double(), x.double()) + np.einsum(
        "tn,td->tnd", h_post.double(), h_out.double()
    )
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=2**-7, atol=2**-8)
    phi, alpha, bias = torch.randn(24, 128) * 0.1, torch.rand(3), torch.randn(24)
    h_in, post, res, *training = OPS.npu_mhc_pre(x, phi, alpha, bias, norm_eps=1e-6, hc_eps=1e-6)
    flat = x.double().flatten(1)
    mixes = flat @ phi.double().t() / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    pre = torch.sigmoid(mixes[:, :4] * alpha[0] + bias[:4]) + 1e-6
    torch.testing.assert_close(h_in.double(), torch.einsum("tj,tjd->td", pre, x.double()), rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(
        post.double(), 2 * torch.sigmoid(mixes[:, 4:8] * alpha[1] + bias[4:8]), rtol=1e-5, atol=1e-6
    )
    assert all(bool(t.isnan().all()) for t in training)
    comb, _, _ = OPS.npu_mhc_sinkhorn(res, eps=1e-6, num_iters=20)
    for axis in (-1, -2):
        torch.testing.assert_close(comb.sum(axis), torch.ones(3, 4), rtol=0, atol=1e-3)
