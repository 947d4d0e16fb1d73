"""Which tier runs which call: the capability table for dtypes, then a dry run of the cann tier for
shapes.

The dry run is the implementation itself on tensors without data, with each npu call checked against
the documents; so what is planned is what will run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from dsv4_backend_torch.numeric import torch_dtype
from dsv4_backend_torch.weights import StackedExperts

from dsv4_backend_ascend import triton, vendor
from dsv4_backend_ascend.cann import attention, expand, matmul, mhc, moe, norm
from dsv4_backend_ascend.cann.call import RefusedError, dry_run
from dsv4_backend_ascend.capability import Answer, table
from dsv4_backend_ascend.kept import Kept
from dsv4_backend_ascend.weights import MxArray, MxExperts, TiledExperts
from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, WEIGHT_DTYPES, ScaledArray, dtype_name
from dsv4_core.contract.ops import OPS

if TYPE_CHECKING:
    from dsv4_backend_ascend.chip import ChipBackend
    from dsv4_core.contract.dtypes import RowLayout

Implementation = Callable[..., Any]
"""A contract in npu ops; the backend comes first."""


def _hc_pre(backend: ChipBackend, *arrays: torch.Tensor, **scalars: Any) -> Any:
    return (
        mhc.hc_pre(*arrays, **scalars)
        if backend.generation == "950"
        else mhc.hc_pre_by_norms(backend, *arrays, **scalars)
    )


def _linear(backend: ChipBackend, x: torch.Tensor, weight: Any, *, out_dtype: str) -> torch.Tensor:
    if weight.format == "int8":
        return matmul.linear_int8(x, weight, out_dtype=out_dtype)
    return matmul.linear_mx(backend, x, weight.mx, out_dtype=out_dtype)


def _grouped_linear(backend: ChipBackend, x: torch.Tensor, weight: Any) -> torch.Tensor:
    if isinstance(weight, ScaledArray):
        kept = None if backend.planning else backend.matrix((weight,), torch.bfloat16)
        weight = backend.dequantise(weight, torch.bfloat16) if kept is None else kept
    return matmul.grouped_linear(x, weight)


def _expert_linear(backend: ChipBackend, x: torch.Tensor, weight: Any, offsets: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, MxExperts):
        return matmul.expert_linear_mx(backend, x, weight.stack.mx, offsets)
    if isinstance(weight, TiledExperts):
        return matmul.expert_linear_mx(backend, x, weight.mx, offsets)
    if isinstance(weight.stack, ScaledArray) and weight.stack.format == "int8":
        return matmul.expert_linear_int8(backend, x, weight.stack, offsets)
    if isinstance(weight.stack, ScaledArray):
        return expand.expert_linear(backend, x, weight.stack, offsets, expand_bytes=backend.expand_bytes)
    return matmul.expert_linear_bf16(backend, x, weight.stack, offsets)


def _gate(
    backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, topk: int, route_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    op, logits = moe.GATES[backend.generation], moe.router_logits(backend, x, weight)
    return moe.routed(backend, moe.gate(op, logits, bias.float(), topk=topk, route_scale=route_scale), weight)


def _gate_hash(
    backend: ChipBackend, x: torch.Tensor, weight: torch.Tensor, tid2eid: torch.Tensor, ids: torch.Tensor,
    *, route_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    op, logits = moe.GATES[backend.generation], moe.router_logits(backend, x, weight)
    return moe.routed(backend, moe.gate_hash(op, logits, tid2eid, ids, route_scale=route_scale), weight)


def _combine(_backend: ChipBackend, *arrays: Any, topk: int, out_dtype: str) -> torch.Tensor:
    return moe.combine(*arrays, topk=topk, out_dtype=torch_dtype(out_dtype))


def _index_topk(backend: ChipBackend, *arrays: Any, scale: float, topk: int) -> torch.Tensor:
    del scale  # positive: it does not change the order
    return attention.index_topk(backend, *arrays, topk=topk)


def _cached_index_topk(
    backend: ChipBackend, *arrays: torch.Tensor, layout: RowLayout, scale: float, topk: int
) -> torch.Tensor:
    del scale
    return attention.cached_index_topk(backend, *arrays, layout=layout, topk=topk)


def _as_is(function: Implementation) -> Implementation:
    return lambda _backend, *arrays, **scalars: function(*arrays, **scalars)


_CANN: Mapping[str, Implementation] = {
    "rms_norm": norm.rms_norm,
    "apply_rope": norm.apply_rope,
    "linear": _linear,
    "grouped_linear": _grouped_linear,
    "expert_linear": _expert_linear,
    "swiglu": _as_is(moe.swiglu),
    "gate": _gate,
    "gate_hash": _gate_hash,
    "dispatch": moe.dispatch,
    "combine": _combine,
    "index_topk": _index_topk,
    "cached_index_topk": _cached_index_topk,
    "sparse_attn": attention.sparse_attn,
    "hc_pre": _hc_pre,
    "hc_post": _as_is(mhc.hc_post),
}
IMPLEMENTATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "cann": _CANN,
    "vendor": {
        "hc_pre": _as_is(vendor.hc_pre),
        "apply_rope": vendor.apply_rope,
        "gate": _gate,
        "gate_hash": _gate_hash,
    },
    "triton": triton.KERNELS,
}
"""The contracts that each tier of ops implements, and those with kernels of our own."""
WITH_PRODUCT = frozenset({"hc_pre"})
"""Contracts of the vendor tier that one operator makes, products and all: before a kernel."""


def gaps(value: Any) -> tuple[int, ...] | None:
    """Strides of a tensor with gaps between its elements, or in another order; None of any other
    operand.
    """
    return None if not isinstance(value, torch.Tensor) or value.is_contiguous() else value.stride()


def without_data(value: Any, *, mx: bool) -> Any:
    """An operand, or a placeholder of one, as tensors of the meta device, with the same gaps.
    ``mx``: quantised weights get MX scales.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    dtype, shape = dtype_name(value), tuple(value.shape)
    if strides := gaps(value):
        return torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
    if "@" not in dtype:
        return torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
    *lead, out, cols = shape
    if dtype == WEIGHT_DTYPES["int8"]:
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return ScaledArray(codes, torch.empty(shape[:-1], dtype=torch.float32, device="meta"), "int8")
    pairs = dtype.startswith("float4")
    data = torch.empty((*lead, out, cols // 2 if pairs else cols), dtype=torch.uint8, device="meta")
    grid = (out, cols // FP4_GROUP) if pairs else (-(-out // FP8_BLOCK), -(-cols // FP8_BLOCK))
    weight = ScaledArray(
        data, torch.empty((*lead, *grid), dtype=torch.uint8, device="meta"), "e2m1" if pairs else "e4m3"
    )
    return MxArray.of(weight) if mx else weight


def plan(backend: ChipBackend, op: str, operands: Mapping[str, Any]) -> Answer:
    """Answer for one call: operands as arrays or placeholders, scalars by value. Raises nothing."""
    if backend.tier == "composed":
        return Answer("composed", reason="tier=composed was asked for")
    if backend.numerics != "native":
        return Answer("composed", reason=f"numerics {backend.numerics}: exact modes are composed")
    if reason := backend.kept_composed.get(op):
        return Answer("composed", reason=reason)
    dtypes = {name: dtype_name(v) for name, v in operands.items() if hasattr(v, "dtype")}
    refused = ""
    if backend.prefer == "triton" and op in triton.KERNELS and not (backend.tier == "vendor" and op in WITH_PRODUCT):
        tried = _tried(backend, op, operands, Answer("triton"))
        if tried.tier == "triton":
            return tried
        refused = f"{tried.reason}; "
    if backend.tier == "vendor":
        found = table().extension(
            op, backend.generation, dtypes, cann=backend.cann_version, asked=backend.departing(op)
        )
        tried = _tried(backend, op, operands, found) if found.tier == "vendor" else found
        if tried.tier == "vendor":
            return tried
    answer = table().answer(op, backend.generation, dtypes, cann=backend.cann_version, asked=backend.departing(op))
    answer = _tried(backend, op, operands, answer) if answer.tier == "cann" else answer
    return answer if answer.tier == "cann" else answer._replace(reason=f"{refused}{answer.reason}")


def _tried(backend: ChipBackend, op: str, operands: Mapping[str, Any], answer: Answer) -> Answer:
    """An answer of the table after a dry run of its tier: itself, or composed with the reason."""
    if missing := [backend.drift[call.name] for call in answer.calls if call.name in backend.drift]:
        return Answer("composed", reason="; ".join(missing))
    if any(0 in v.shape for v in operands.values() if hasattr(v, "shape")):
        return Answer("composed", reason="an operand is empty")
    mx = backend.generation == "950"
    scalars = {name: operands[name] for name in OPS[op].scalars}
    kept, backend.kept, backend.planning = backend.kept, Kept(), True  # nothing that is kept may be without data
    try:
        with dry_run(backend.generation):
            arrays = [
                _placeholder(operands[name], mx=mx, name=name if op == "expert_linear" else "")
                for name in OPS[op].arrays
            ]
            IMPLEMENTATIONS[answer.tier][op](backend, *arrays, **scalars)
    except RefusedError as refusal:
        return Answer("composed", reason=str(refusal))
    finally:
        backend.kept, backend.planning = kept, False
    return answer


def _placeholder(value: Any, *, mx: bool, name: str) -> Any:
    meta = without_data(value, mx=mx)
    if name != "weight":
        return meta
    if isinstance(meta, MxArray) and meta.format == "e2m1":
        return TiledExperts(matmul.tiled(meta.mx))
    return MxExperts(meta) if isinstance(meta, MxArray) else StackedExperts(meta)
