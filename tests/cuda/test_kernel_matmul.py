"""Quantised linear layers against float64 products of dequantised operands."""

from __future__ import annotations

import oracle
import pytest
import torch
from dsv4_backend_cuda import pieces
from dsv4_backend_cuda.kernels import add_pieces, dense_matmul, input_matmul, moe, moe_matmul, scaled_matmul


def activation(tokens: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scales = oracle.quantise_fp8(oracle.normal(tokens, k, seed=seed), 128)
    return (
        oracle.guarded(codes),
        oracle.guarded(scales),
        oracle.e4m3(codes) * oracle.e8m0(scales).repeat_interleave(128, -1),
    )


def fp8_weight(out: int, k: int, seed: int, *experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = oracle.fp8_codes(*experts, out, k, seed=seed)
    scale = oracle.uniform_int(112, 124, *experts, -(-out // 128), k // 128, seed=seed + 1)
    return codes, scale, oracle.fp8_weight(codes, scale)


def fp4_weight(out: int, k: int, seed: int, *experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = oracle.uniform_int(0, 256, *experts, out, k // 2, seed=seed)
    scale = oracle.uniform_int(112, 130, *experts, out, k // 32, seed=seed + 1)
    return packed, scale, oracle.fp4_weight(packed, scale)


@pytest.fixture(params=["half", "fp8", "scaled"])
def mma(request, monkeypatch):
    """Every way that some architecture multiplies, not only the interpreter's."""
    monkeypatch.setattr(scaled_matmul, "mma_of", lambda _, **__: request.param)


def ordered(codes, *, fp4: bool) -> torch.Tensor:
    """Codes as their quantiser stores them for such a weight: for FP4 ones the even channels of
    every 32 first.
    """
    if not scaled_matmul.paired(codes, fp4=fp4):
        return codes
    return oracle.guarded(codes.unflatten(1, (-1, 16, 2)).transpose(2, 3).flatten(1))


@pytest.mark.parametrize(
    ("tokens", "out", "k"), [(1, 64, 128), (3, 200, 384), (16, 130, 256), (17, 257, 256), (130, 128, 128)]
)
@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
@pytest.mark.usefixtures("mma")
def test_linear(make, tokens, out, k):
    codes, scales, wide = activation(tokens, k, seed=1)
    weight, weight_scale, wide_weight = make(out, k, seed=2)
    codes = ordered(codes, fp4=make is fp4_weight)
    for dtype in (torch.bfloat16, torch.float32):
        y = scaled_matmul.linear(codes, scales, weight, weight_scale, out_dtype=dtype, fp4=make is fp4_weight)
        oracle.close(y, wide @ wide_weight.T)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
@pytest.mark.usefixtures("mma")
def test_two_weights_and_a_sum_in_pieces(make, tokens):
    """Tiles that end inside the first weight's outputs, and a last piece that is shorter than the
    others.
    """
    codes, scales, wide = activation(tokens, 128 * 19, seed=11)
    first, second = make(136, 128 * 19, 12), make(136, 128 * 19, 22)
    fp4 = make is fp4_weight
    codes = ordered(codes, fp4=fp4)
    exact = torch.cat([wide @ first[2].T, wide @ second[2].T], 1)
    weights = [first[:2], second[:2]]
    for split in (False, True):
        parts = scaled_matmul.products(codes, scales, weights, out_dtype=torch.float32, fp4=fp4, split=split)
        assert parts.shape == (4 if split else 1, tokens, 272)
        assert parts.dtype == torch.float32
        oracle.close(add_pieces.total(oracle.guarded(parts), torch.float32), exact)
    y = scaled_matmul.linear(codes, scales, *first[:2], out_dtype=torch.bfloat16, fp4=fp4, split=True)
    oracle.close(y, exact[:, :136])


def test_pieces_fill_the_multiprocessors_and_are_not_too_short():
    """Counts by hand: 132 multiprocessors, at least four steps of 128 a piece."""
    assert pieces.span(64, 64, 90, reader=True) == 32  # two halves, where nobody launches to add them
    assert pieces.span(64, 64, 90) == 64  # wo_b of Flash: two halves save less than a launch
    assert pieces.span(8, 32, 90) == 4  # wkv of Flash: 16 pieces would be too short, 8 are not
    assert pieces.span(67, 64, 90, reader=True) == 64  # a second piece of each would wait for the first ones
    assert pieces.span(1, 7, 90, reader=True) == 7
    assert pieces.span(0, 0, 90) == 0


@pytest.mark.parametrize("counts", [[3, 0, 1, 4], [0, 0, 0, 1], [20, 1, 0, 17], [0, 0, 0, 0], [70, 1, 60, 0]])
@pytest.mark.parametrize("foreign", [0, 5])
@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
@pytest.mark.usefixtures("mma")
def test_expert_linear(make, counts, foreign):
    rows = sum(counts) + foreign
    if rows == 0:
        pytest.skip("no rows at all")
    codes, scales, wide = activation(rows, 256, seed=5)
    weight, weight_scale, wide_weight = make(136, 256, 6, len(counts))
    offsets = oracle.guarded(torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32))
    fp4 = make is fp4_weight
    codes = ordered(codes, fp4=fp4)
    y = scaled_matmul.expert_products(codes, scales, [(weight, weight_scale)], offsets, fp4=fp4)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    exact = torch.einsum("tk,tok->to", wide[: len(expert)], wide_weight[expert])
    assert not y[len(expert) :].any()
    if len(expert):
        oracle.close(y[: len(expert)], exact)


@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
@pytest.mark.usefixtures("mma")
def test_experts_read_tokens_where_they_are(make, tokens):
    """Two weights, rows of tokens in the sort's order, some of them another rank's."""
    codes, scales, wide = activation(tokens, 256, seed=13)
    first, second = make(136, 256, 14, 4), make(136, 256, 24, 4)
    fp4 = make is fp4_weight
    indices = oracle.guarded(
        torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(t))[:3] for t in range(tokens)]).int()
    )
    order, place, offsets = moe.sort(indices, first_expert=1, n_experts=4)
    assert torch.equal(place[order.long()], torch.arange(3 * tokens, dtype=torch.int32))
    y = scaled_matmul.expert_products(
        ordered(codes, fp4=fp4), scales, [first[:2], second[:2]], oracle.guarded(offsets),
        fp4=fp4, order=oracle.guarded(order), topk=3,
    )  # fmt: skip
    mine = int(offsets[-1])
    expert = indices.flatten()[order[:mine].long()].long() - 1
    x = wide[order[:mine].long() // 3]
    exact = torch.cat([torch.einsum("tk,tok->to", x, w[2][expert]) for w in (first, second)], 1)
    assert not y[mine:].any()
    oracle.close(y[:mine], exact)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 19), (16, 2)])
@pytest.mark.parametrize("make", [fp8_weight, fp4_weight])
@pytest.mark.usefixtures("mma")
def test_bits_of_the_shared_expert_and_of_the_others_are_those_that_they_have_alone(make, tokens, steps):
    """Of two weights and of one, in four pieces and whole, some rows another rank's."""
    fp4, k = make is fp4_weight, 128 * steps
    plain, scales, _ = activation(tokens, k, seed=31)
    codes = ordered(plain, fp4=fp4)
    routed, shared = (
        [make(136, k, seed, *experts)[:2] for seed in (32, 42)] for make, experts in ((make, (4,)), (fp8_weight, ()))
    )
    indices = oracle.uniform_int(0, 6, tokens, 3, seed=52, dtype=torch.int32)
    order, _, offsets = (oracle.guarded(t) for t in moe.sort(indices, first_expert=1, n_experts=4))
    for count in (2, 1):
        how = {"fp4": fp4, "order": order, "topk": 3}
        room = torch.empty(tokens, 136, dtype=torch.bfloat16) if count == 1 else None
        rows, parts = moe_matmul.products(
            (codes, scales), routed[:count], offsets, (plain, scales), shared[:count], room=room, **how
        )
        assert len(parts) == (4 if steps == 19 else 1)
        assert torch.equal(rows, scaled_matmul.expert_products(codes, scales, routed[:count], offsets, **how))
        how = {"out_dtype": torch.bfloat16, "fp4": False, "split": True, "reader": room is None}
        assert torch.equal(parts, scaled_matmul.products(plain, scales, shared[:count], **how))


@pytest.mark.parametrize("steps", [19, 2])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.usefixtures("mma")
def test_bits_of_fp8_and_bf16_products_of_an_input_are_those_that_they_have_apart(tokens, steps):
    """A pair and two weights of other sizes beside two FP8 weights; a weight beside a weight."""
    k = 128 * steps
    x, (codes, scales, _) = oracle.normal(tokens, k, seed=61), activation(tokens, k, seed=62)
    scaled = [fp8_weight(out, k, 63 + out)[:2] for out in (136, 64)]
    plain = [[oracle.normal(out, k, seed=64 + i) for i in range(count)] for out, count in ((72, 2), (24, 1), (200, 1))]
    for some, others in ((scaled, plain), (scaled[1:], plain[1:2])):
        rooms = [torch.empty(tokens, w[0].shape[0], dtype=torch.bfloat16) for w in some]
        other_rooms = [torch.empty(tokens, sum(len(w) for w in pair)) for pair in others]
        parts = [part.clone() for part in input_matmul.together((codes, scales), some, rooms, x, others, other_rooms)]
        apart = scaled_matmul.together((codes, scales), some, rooms) + dense_matmul.together(x, others, other_rooms)
        for got, want in zip(parts, apart, strict=True):
            assert len(got) == (4 if steps == 19 else 1)
            assert torch.equal(got, want)


def test_bits_do_not_depend_on_the_batch():
    codes, scales, _ = activation(40, 512, seed=7)
    weight, weight_scale, _ = fp8_weight(128, 512, seed=8)
    whole = scaled_matmul.linear(codes, scales, weight, weight_scale, out_dtype=torch.float32)
    for part in (slice(0, 1), slice(7, 20), slice(3, 40)):
        alone = scaled_matmul.linear(
            codes[part].clone(), scales[part].clone(), weight, weight_scale, out_dtype=torch.float32
        )
        assert torch.equal(alone, whole[part])


def test_a_program_wider_than_a_scale_is_refused():
    """It would scale all but its first 128 outputs by a neighbour's scale."""
    codes, scales, _ = activation(2, 128, 1)
    weight, scale, _ = fp8_weight(256, 128, 2)
    y = torch.empty(1, 2, 256, dtype=torch.bfloat16)
    config = {"BLOCK_N": 256, "BLOCK_T": 16, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    with pytest.raises(Exception, match="one scale of 128 outputs"):
        scaled_matmul._launch(
            (codes, scales), [(weight, scale)], [y], scales, None, experts=0, tiles=1, topk=0, fp4=False, span=1, options=config,
        )  # fmt: skip
