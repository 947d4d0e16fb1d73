"""Calls as the backend makes them, for each way of calling an op, and some that it must not make.

``opcheck``, the comparison with the real wheel's shape functions and the tests of the constraints
all read these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dsv4_backend_ascend.constraints import BFLOAT16, E2M1, E4M3, E4M3_NPU, E8M0
from dsv4_backend_ascend.formats import ND, NZ, mark
from dsv4_backend_ascend.simulate.format_cast import to_tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dsv4_backend_ascend.capability import Generation

Arguments = dict[str, Any]


class Sample(NamedTuple):
    """One call: the row of the capability table that it belongs to, the op and its arguments by
    name.
    """

    call: str
    op: str
    arguments: Arguments


class Violation(NamedTuple):
    """One call that the documents do not allow: which call it varies, how, and a word of the
    refusal.
    """

    call: str
    change: Callable[[Arguments], Arguments]
    word: str


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def _scales(*shape: int) -> torch.Tensor:
    return torch.randint(118, 130, shape, dtype=torch.uint8)


def _codes(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.float8_e4m3fn)


def _bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _common() -> Iterator[Sample]:
    """Yield calls that every generation takes."""
    for gamma in (torch.bfloat16, torch.float32):
        yield Sample(
            "rms_norm", "npu_rms_norm", {"input": _bf16(5, 48), "gamma": torch.rand(48).to(gamma), "epsilon": 1e-6}
        )
    yield Sample(
        "grouped_projection",
        "npu_transpose_batchmatmul",
        {
            "input": _bf16(5, 3, 32),
            "weight": _bf16(3, 32, 16),
            "perm_x1": [1, 0, 2],
            "perm_x2": [0, 1, 2],
            "perm_y": [1, 0, 2],
        },
    )
    yield Sample(
        "grouped_projection",
        "npu_transpose_batchmatmul",
        {
            "input": _bf16(3, 5, 32),
            "weight": _bf16(3, 16, 32).transpose(1, 2),
            "perm_x1": [0, 1, 2],
            "perm_x2": [0, 1, 2],
            "perm_y": [1, 0, 2],
        },
    )
    for counts in (0, 1):
        yield Sample(
            "experts_bf16",
            "npu_grouped_matmul",
            {
                "x": [_bf16(7, 32)],
                "weight": [_bf16(3, 16, 32).transpose(1, 2)],
                "group_list": torch.tensor([2, 0, 4] if counts else [2, 2, 6]),
                "split_item": 3,
                "group_type": 0,
                "group_list_type": counts,
                "output_dtype": BFLOAT16,
            },
        )
    yield Sample(
        "swiglu",
        "npu_clipped_swiglu",
        {"x": torch.randn(5, 32) * 12, "dim": -1, "alpha": 1.0, "limit": 10.0, "bias": 0.0, "interleaved": False},
    )
    yield Sample(
        "init_routing",
        "npu_moe_init_routing_v2",
        {
            "x": _bf16(6, 16),
            "expert_idx": torch.randint(0, 5, (6, 2), dtype=torch.int32),
            "expert_num": 5,
            "expert_tokens_num_type": 0,
            "expert_tokens_num_flag": True,
            "active_expert_range": [0, 5],
            "row_idx_type": 1,
        },
    )
    yield Sample(
        "unpermute",
        "npu_moe_token_unpermute",
        {
            "permuted_tokens": torch.randn(12, 16),
            "sorted_indices": torch.randperm(12).to(torch.int32),
            "probs": torch.ones(6, 2),
        },
    )
    yield Sample(
        "mhc_post",
        "npu_mhc_post",
        {"x": _bf16(5, 4, 128), "h_res": torch.rand(5, 4, 4), "h_out": _bf16(5, 128), "h_post": torch.rand(5, 4)},
    )
    angle = torch.randn(1, 5, 1, 16).repeat_interleave(2, -1)
    yield Sample(
        "partial_rotary",
        "inplace_partial_rotary_mul",
        {
            "x": _bf16(1, 5, 3, 48),
            "r1": angle.cos(),
            "r2": angle.sin(),
            "rotary_mode": "interleave",
            "partial_slice": [16, 48],
        },
    )
    rows = _bf16(9, 1, 512)
    yield Sample(
        "sparse_attention",
        "npu_sparse_flash_attention",
        {
            "query": _bf16(3, 4, 512),
            "key": rows,
            "value": rows.clone(),
            "sparse_indices": torch.tensor([[[0, -1, -1]], [[8, 1, -1]], [[3, 3, 5]]], dtype=torch.int32),
            "scale_value": 512**-0.5,
            "actual_seq_lengths_query": torch.tensor([3], dtype=torch.int32),
            "actual_seq_lengths_kv": torch.tensor([9], dtype=torch.int32),
            "query_rope": torch.zeros(3, 4, 64).bfloat16(),
            "key_rope": torch.zeros(9, 1, 64).bfloat16(),
            "layout_query": "TND",
            "layout_kv": "TND",
            "sparse_mode": 0,
            "attention_mode": 2,
        },
    )


def _mhc(dim: int) -> Sample:
    arguments = {
        "x": _bf16(1, 5, 4, dim),
        "phi": torch.randn(24, 4 * dim) * 0.02,
        "alpha": torch.rand(3),
        "bias": torch.randn(24),
        "hcMult": 4,
        "numIters": 20,
        "hcEps": 1e-6,
        "normEps": 1e-6,
        "outFlag": False,
    }
    return Sample("mhc_pre_sinkhorn", "mhc_pre_sinkhorn", arguments)


def _gates(op: str, suffix: str) -> Iterator[Sample]:
    scores = {"x": torch.randn(5, 16), "k": 3, "norm_type": 2, "routed_scaling_factor": 1.5, "eps": 1e-20}
    yield Sample(f"gating{suffix}", op, {**scores, "bias": torch.randn(16)})
    ids, table = torch.randint(0, 7, (5,), dtype=torch.int32), torch.stack([torch.randperm(16)[:3] for _ in range(7)])
    yield Sample(f"gating_hash{suffix}", op, {**scores, "input_ids": ids, "tid2eid": table})


def _a2_a3() -> Iterator[Sample]:
    """910B and 910C: rotary, indexer, int8."""
    yield _mhc(128)
    yield from _gates("moe_gating_top_k_hash", "_vllm")
    columns = torch.rand(5, 4, 4).transpose(1, 2)
    yield Sample("mhc_by_norms", "npu_rms_norm", {"input": columns, "gamma": torch.full((4,), 0.5), "epsilon": 2.5e-7})
    angle = torch.randn(5, 1, 16).repeat_interleave(2, -1)
    yield Sample(
        "rotary",
        "npu_rotary_mul",
        {"input": torch.randn(5, 3, 32), "r1": angle.cos(), "r2": angle.sin(), "rotary_mode": "interleave"},
    )
    yield Sample(
        "lightning_indexer",
        "npu_lightning_indexer",
        {
            "query": _bf16(5, 1, 8, 128),
            "key": _bf16(4, 16, 1, 128),
            "weights": _bf16(5, 1, 8),
            "actual_seq_lengths_query": torch.ones(5, dtype=torch.int32),
            "actual_seq_lengths_key": torch.tensor([0, 1, 9, 17, 64], dtype=torch.int32),
            "block_table": torch.tensor([[2, 0, 3, 1]] * 5, dtype=torch.int32),
            "layout_query": "BSND",
            "layout_key": "PA_BSND",
            "sparse_count": 12,
            "sparse_mode": 0,
        },
    )
    yield Sample("quantise_int8", "npu_dynamic_quant", {"input": _bf16(5, 64)})
    yield Sample(
        "matmul_int8",
        "npu_quant_matmul",
        {
            "x1": _int8(5, 64),
            "x2": _int8(16, 64).t(),
            "scale": torch.rand(16),
            "pertoken_scale": torch.rand(5),
            "output_dtype": BFLOAT16,
        },
    )
    yield Sample(
        "experts_int8",
        "npu_grouped_matmul",
        {
            "x": [_int8(7, 32)],
            "weight": [_int8(3, 16, 32).transpose(1, 2)],
            "scale": [torch.rand(3, 16).bfloat16()],
            "per_token_scale": [torch.rand(7)],
            "group_list": torch.tensor([2, 2, 7]),
            "split_item": 3,
            "group_type": 0,
            "group_list_type": 0,
            "output_dtype": BFLOAT16,
        },
    )


def _a5() -> Iterator[Sample]:
    """950: MX operands and hyper-connections."""
    yield _mhc(4096)
    for shape, block, algorithm in (((5, 256), 32, 0), ((5, 256), 128, 1), ((5, 2, 160), 160, 1)):
        yield Sample(
            "quantise_mx",
            "npu_dynamic_mx_quant",
            {
                "input": _bf16(*shape),
                "axis": -1,
                "round_mode": "rint",
                "dst_type": E4M3_NPU,
                "block_size": block,
                "scale_alg": algorithm,
            },
        )
    mx = {"scale_dtype": E8M0, "pertoken_scale_dtype": E8M0, "output_dtype": BFLOAT16}
    x = {"x1": _codes(5, 128), "scale": _scales(16, 2, 2).transpose(0, 1), "pertoken_scale": _scales(5, 2, 2)}
    yield Sample("matmul_mx", "npu_quant_matmul", {**x, **mx, "x2": _codes(16, 128).t(), "group_sizes": [1, 1, 32]})
    yield Sample(
        "matmul_mx",
        "npu_quant_matmul",
        {**x, **mx, "x2": _bytes(16, 64).t(), "x2_dtype": E2M1, "group_sizes": [0, 0, 32]},
    )
    grouped = {
        "x": [_codes(7, 128)],
        "per_token_scale": [_scales(7, 2, 2)],
        "group_list": torch.tensor([2, 2, 7]),
        "split_item": 3,
        "group_type": 0,
        "group_list_type": 0,
        "output_dtype": BFLOAT16,
        "per_token_scale_dtype": E8M0,
    }
    yield Sample(
        "experts_mx",
        "npu_grouped_matmul",
        {
            **grouped,
            "weight": [_codes(3, 16, 128).transpose(1, 2)],
            "scale": [_scales(3, 16, 2, 2).transpose(1, 2)],
            "scale_dtype": E8M0,
        },
    )
    packed = _bytes(3, 64, 64)
    yield Sample(
        "weights_nz",
        "npu_format_cast",
        {"input": packed, "acl_format": NZ, "customize_dtype": E4M3, "input_dtype": E2M1},
    )
    yield Sample(
        "experts_mxfp4",
        "npu_grouped_matmul",
        {
            **grouped,
            "weight": [mark(to_tiles(packed), NZ).transpose(1, 2)],
            "antiquant_scale": [_scales(3, 64, 2, 2).transpose(1, 2)],
            "weight_dtype": E2M1,
        },
    )
    yield from _gates("npu_moe_gating_top_k", "")
    yield Sample(
        "mhc_pre",
        "npu_mhc_pre",
        {
            "x": _bf16(5, 4, 32),
            "phi": torch.randn(24, 128),
            "alpha": torch.rand(3),
            "bias": torch.randn(24),
            "norm_eps": 1e-6,
            "hc_eps": 1e-6,
        },
    )
    yield Sample("mhc_sinkhorn", "npu_mhc_sinkhorn", {"x": torch.randn(5, 4, 4), "eps": 1e-6, "num_iters": 20})


def samples(generation: Generation) -> list[Sample]:
    """Every way of calling an op on a generation."""
    return [*_common(), *(_a5() if generation == "950" else _a2_a3())]


def _with(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


def _cast(name: str, dtype: torch.dtype) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, name: arguments[name].to(dtype)}


VIOLATIONS: tuple[Violation, ...] = (
    Violation("rms_norm", _cast("gamma", torch.float16), "gamma"),
    Violation("rotary", _with(rotary_mode="half"), "interleave"),
    Violation("rotary", _cast("r1", torch.bfloat16), "r1"),
    Violation("rotary", lambda a: {**a, "r1": a["r1"].expand(5, 3, 32)}, "r1"),
    Violation(
        "grouped_projection",
        lambda a: {**a, "input": _bf16(*a["input"].shape[:2], 24), "weight": _bf16(3, 24, 16)},
        "multiples of 16",
    ),
    Violation("grouped_projection", _with(perm_y=[0, 1, 2]), "perm"),
    Violation(
        "grouped_projection", lambda a: {**a, "input": a["input"].float(), "weight": a["weight"].float()}, "HF32"
    ),
    Violation("quantise_int8", _cast("input", torch.float32), "float16 or bfloat16"),
    Violation("matmul_int8", _with(output_dtype=None), "output_dtype"),
    Violation("matmul_int8", _with(pertoken_scale=None), "pertoken_scale"),
    Violation("experts_bf16", _with(group_type=2), "group_type"),
    Violation("experts_bf16", _with(group_list_type=2), "group_list_type"),
    Violation("experts_bf16", lambda a: {**a, "group_list": a["group_list"].to(torch.int32)}, "int64"),
    Violation("experts_int8", lambda a: {**a, "scale": [a["scale"][0].float()]}, "BF16 scales"),
    Violation("quantise_mx", _with(block_size=48), "multiple of 32"),
    Violation("quantise_mx", _with(scale_alg=2), "scale_alg"),
    Violation("matmul_mx", _with(group_sizes=[1, 1, 128]), "group_sizes"),
    Violation("matmul_mx", lambda a: {**a, "scale": a["scale"].transpose(0, 1)}, "scale has shape"),
    Violation("experts_mx", _with(per_token_scale_dtype=None), "E8M0"),
    Violation("weights_nz", _with(customize_dtype=None), "customize_dtype"),
    Violation("weights_nz", lambda a: {**a, "input": _bytes(3, 32, 64)}, "multiples of 64"),
    Violation(
        "experts_mxfp4", lambda a: {**a, "weight": [mark(_bytes(3, 64, 64), ND).transpose(1, 2)]}, "format 2; NZ"
    ),
    Violation(
        "experts_mxfp4",
        lambda a: {**a, "antiquant_scale": [a["antiquant_scale"][0].transpose(1, 2)]},
        "antiquant_scale is missing or not bytes of shape",
    ),
    Violation("mhc_pre_sinkhorn", _with(numIters=10), "numIters"),
    Violation("mhc_pre_sinkhorn", lambda a: {**a, "x": _bf16(1, 5, 4, 96), "phi": torch.randn(24, 384)}, "channels"),
    Violation("partial_rotary", _with(partial_slice=[17, 48]), "even number"),
    Violation("partial_rotary", lambda a: {**a, "r2": a["r2"].bfloat16()}, "r2 is bfloat16"),
    Violation("gating", _with(norm_type=1), "sqrt"),
    Violation("gating", _cast("bias", torch.bfloat16), "bias is bfloat16"),
    Violation("gating_hash", _with(tid2eid=None), "come together"),
    Violation("gating_vllm", _with(renorm=1), "renorm"),
    Violation("gating_vllm", _with(eps=0.0), "more than 0"),
    Violation("gating_hash_vllm", _with(input_ids=None), "come together"),
    Violation("swiglu", _with(interleaved=True), "interleaved"),
    Violation("init_routing", _with(active_expert_range=[1, 4]), "undefined"),
    Violation("init_routing", lambda a: {**a, "expert_idx": a["expert_idx"].long()}, "int32"),
    Violation("unpermute", lambda a: {**a, "sorted_indices": a["sorted_indices"].long()}, "int32"),
    Violation("lightning_indexer", lambda a: {**a, "query": _bf16(5, 1, 8, 64), "key": _bf16(4, 16, 1, 64)}, "128"),
    Violation("lightning_indexer", _with(sparse_count=2500), "sparse_count"),
    Violation("lightning_indexer", lambda a: {**a, "key": _bf16(4, 24, 1, 128)}, "multiple of 16"),
    Violation("sparse_attention", _with(attention_mode=0), "attention_mode"),
    Violation("sparse_attention", _with(sparse_mode=1), "sparse_mode"),
    Violation("sparse_attention", _with(query_rope=None), "rope"),
    Violation("sparse_attention", lambda a: {**a, "sinks": torch.zeros(4)}, "sinks"),
    Violation("sparse_attention", lambda a: {**a, "sparse_indices": a["sparse_indices"].long()}, "sparse_indices"),
    Violation("mhc_pre", lambda a: {**a, "x": _bf16(5, 4, 24), "phi": torch.randn(24, 96)}, "multiple of 16"),
    Violation("mhc_sinkhorn", lambda _: {"x": torch.randn(5, 5, 5)}, "streams"),
    Violation("mhc_sinkhorn", _with(num_iters=0), "num_iters"),
    Violation("mhc_post", _with(h_res=None), "h_res"),
)
