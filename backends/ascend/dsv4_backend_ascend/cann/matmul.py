"""linear, grouped_linear and expert_linear in npu ops.

Rows after the last expert's belong to other ranks and come out of npu_grouped_matmul undefined; the
contract wants zeros.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from dsv4_backend_ascend.cann.call import call
from dsv4_backend_ascend.constraints import BFLOAT16, E2M1, E4M3, E4M3_NPU, E8M0, FLOAT32
from dsv4_backend_ascend.formats import NZ
from dsv4_backend_ascend.weights import MxWeight, spread
from dsv4_core.contract.dtypes import AMAX_FLOOR, FP4_GROUP, FP8_BLOCK

if TYPE_CHECKING:
    from dsv4_backend_ascend.chip import ChipBackend
    from dsv4_core.contract.dtypes import ScaledArray

_NUMBERS = {"bfloat16": BFLOAT16, "float32": FLOAT32}
_GROUPED = {"split_item": 3, "group_type": 0, "group_list_type": 0, "output_dtype": BFLOAT16}
TRANSPOSED_LIMIT = 65536  # npu_transpose_batchmatmul: k * batch stays below it where the input is transposed inside


def mx_activation(backend: ChipBackend, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise per 128 channels as the model does, and spread the scales over MX's groups of 32:
    codes, [tokens, in / 64, 2]. Rows that several weights multiply are quantised once.
    """
    return backend.kept.once((x, "mx"), functools.partial(_mx, x))  # type: ignore[no-any-return]


def _mx(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block gets 32 channels of the least magnitude that the model allows a block, which the
    operator does not know; their codes are left out.

    ``max_low_bound`` is not in every wheel, and torch-npu drops it in silence where CANN has no
    aclnnDynamicMxQuantV3.
    """
    tokens, channels = x.shape
    blocks = torch.nn.functional.pad(x, (0, -channels % FP8_BLOCK)) if channels % FP8_BLOCK else x
    floored = torch.nn.functional.pad(blocks.unflatten(1, (-1, FP8_BLOCK)), (0, FP4_GROUP), value=AMAX_FLOOR["e4m3"])
    codes, scale = call(
        "npu_dynamic_mx_quant", input=floored, dst_type=E4M3_NPU, block_size=FP8_BLOCK + FP4_GROUP, scale_alg=1
    )
    own = codes.view(torch.uint8)[..., :FP8_BLOCK].reshape(tokens, -1)[:, :channels].contiguous()
    groups = spread(scale[..., 0, 0], FP8_BLOCK // FP4_GROUP)[:, : -(-channels // 64) * 2]
    return own.view(codes.dtype), groups.unflatten(1, (-1, 2)).contiguous()


def linear_mx(backend: ChipBackend, x: torch.Tensor, weight: MxWeight, *, out_dtype: str) -> torch.Tensor:
    """Contract ``linear`` on 950: FP8 activations, FP8 or FP4 weights."""
    codes, scale = mx_activation(backend, x)
    form = {"x2_dtype": E2M1, "group_sizes": [0, 0, 32]} if weight.format == "e2m1" else {"group_sizes": [1, 1, 32]}
    return call(  # type: ignore[no-any-return]
        "npu_quant_matmul",
        x1=codes,
        x2=weight.data.t(),
        scale=weight.scale.transpose(0, 1),
        pertoken_scale=scale,
        scale_dtype=E8M0,
        pertoken_scale_dtype=E8M0,
        output_dtype=_NUMBERS[out_dtype],
        **form,
    )


def linear_int8(x: torch.Tensor, weight: ScaledArray, *, out_dtype: str) -> torch.Tensor:
    """W8A8 on 910B and 910C."""
    codes, scale = call("npu_dynamic_quant", input=x)
    return call(  # type: ignore[no-any-return]
        "npu_quant_matmul",
        x1=codes,
        x2=weight.data.t(),
        scale=weight.scale,
        pertoken_scale=scale,
        output_dtype=_NUMBERS[out_dtype],
    )


def grouped_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Contract ``grouped_linear`` with a BF16 weight [out, in]: one batch per group."""
    groups, channels = x.shape[1:]
    blocks = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    inside = groups * channels < TRANSPOSED_LIMIT
    y = call(
        "npu_transpose_batchmatmul",
        input=x if inside else x.transpose(0, 1),
        weight=blocks,
        perm_x1=[1, 0, 2] if inside else [0, 1, 2],
        perm_x2=[0, 1, 2],
        perm_y=[1, 0, 2],
    )
    return y.flatten(1)  # type: ignore[no-any-return]


def ends(backend: ChipBackend, offsets: torch.Tensor) -> torch.Tensor:
    """Where each expert's rows end, int64; the three projections ask for it."""
    return backend.kept.once((offsets, "ends"), offsets[1:].long)  # type: ignore[no-any-return]


def _own_rows(backend: ChipBackend, y: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Zero the rows after the last expert's."""
    others = backend.kept.once(
        (offsets, "others", y.shape[0]),
        lambda: (torch.arange(y.shape[0], device=y.device) >= offsets[-1]).unsqueeze(-1),
    )
    return y.masked_fill(others, 0)


def expert_linear_bf16(
    backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Contract ``expert_linear`` with BF16 weights [experts, out, in]."""
    (y,) = call(
        "npu_grouped_matmul", x=[x], weight=[weight.transpose(1, 2)], group_list=ends(backend, offsets), **_GROUPED
    )
    return _own_rows(backend, y, offsets)


def tiled(weight: MxWeight) -> MxWeight:
    """An E2M1 stack with its bytes in NZ order, made once at loading: the grouped product takes FP8
    x FP4 from it alone.
    """
    data = call("npu_format_cast", input=weight.data, acl_format=NZ, customize_dtype=E4M3, input_dtype=E2M1)
    return MxWeight(data, weight.scale, weight.format)


def expert_linear_mx(backend: ChipBackend, x: torch.Tensor, weight: MxWeight, offsets: torch.Tensor) -> torch.Tensor:
    """Contract ``expert_linear`` on 950; E2M1 weights come in tiles, see ``tiled``."""
    codes, scale = mx_activation(backend, x)
    scale_of_weight = [weight.scale.transpose(1, 2)]
    scales = (
        {"antiquant_scale": scale_of_weight, "weight_dtype": E2M1}
        if weight.format == "e2m1"
        else {"scale": scale_of_weight, "scale_dtype": E8M0}
    )
    (y,) = call(
        "npu_grouped_matmul",
        x=[codes],
        weight=[weight.data.transpose(1, 2)],
        per_token_scale=[scale],
        per_token_scale_dtype=E8M0,
        group_list=ends(backend, offsets),
        **scales,
        **_GROUPED,
    )
    return _own_rows(backend, y, offsets)


def expert_linear_int8(
    backend: ChipBackend, x: torch.Tensor, weight: ScaledArray, offsets: torch.Tensor
) -> torch.Tensor:
    """W8A8 on 910B and 910C; BF16 results need the weight's scales in BF16, which is the precision
    that they have.
    """
    codes, scale = call("npu_dynamic_quant", input=x)
    (y,) = call(
        "npu_grouped_matmul",
        x=[codes],
        weight=[weight.data.transpose(1, 2)],
        scale=[weight.scale.bfloat16()],
        per_token_scale=[scale],
        group_list=ends(backend, offsets),
        **_GROUPED,
    )
    return _own_rows(backend, y, offsets)
