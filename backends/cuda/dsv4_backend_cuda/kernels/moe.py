"""Mixture of experts around the grouped products: routing, dispatch by a counting sort without atomics, SwiGLU, combination."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels.formats import quantise_e4m3
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit
def sqrt_softplus(x):
    """sqrt(log(1 + exp(x))) in float32, to full relative precision for very negative ``x`` too."""
    z = tl.exp(-tl.abs(x))
    u = 1.0 + z
    tail = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))  # log1p by its well-known correction
    return tl.sqrt_rn(tl.maximum(x, 0.0) + tail)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits, bias, table, ids, weights, indices, tokens, experts, route_scale,
    TOPK: tl.constexpr, HASH: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program routes ROWS tokens. HASH: to ``table[ids[t]]``; else to the largest biased scores, the lower id of equals."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    live = token < tokens
    inside = live[:, None] & (e < experts)[None, :]
    score = sqrt_softplus(tl.load(logits + token[:, None] * experts + e[None, :], mask=inside, other=0.0))
    chosen = tl.zeros((ROWS, BLOCK_K), tl.int32)
    gained = tl.zeros((ROWS, BLOCK_K), tl.float32)
    if not HASH:
        ranked = score + tl.load(bias + e, mask=e < experts, other=0.0)[None, :]
        ranked = tl.where((e < experts)[None, :], ranked, float("-inf"))
    row = tl.load(ids + token, mask=live, other=0).to(tl.int64)
    for j in tl.static_range(TOPK):
        if HASH:
            best = tl.load(table + row * TOPK + j, mask=live, other=0).to(tl.int32)
        else:
            largest = tl.max(ranked, axis=1)
            best = tl.min(tl.where(ranked == largest[:, None], e[None, :], BLOCK_E - 1), axis=1)
            ranked = tl.where(e[None, :] == best[:, None], float("-inf"), ranked)
        value = tl.sum(tl.where(e[None, :] == best[:, None], score, 0.0), axis=1)
        chosen = tl.where(k[None, :] == j, best[:, None], chosen)
        gained = tl.where(k[None, :] == j, value[:, None], gained)
    share = gained / tl.sum(gained, axis=1)[:, None] * route_scale
    at = token[:, None] * TOPK + k[None, :]
    tl.store(weights + at, share, mask=live[:, None] & (k < TOPK)[None, :])
    tl.store(indices + at, chosen, mask=live[:, None] & (k < TOPK)[None, :])


@triton.jit(do_not_specialize=["copies", "first_expert", "n_experts"])
def sort_kernel(indices, order, offsets, copies, first_expert, n_experts, BLOCK: tl.constexpr):
    """Program e of n_experts + 1 places the copies for expert e (the last: for other ranks) behind those for lower ones, in order."""
    mine = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, copies, BLOCK):
        expert = tl.load(indices + start + i, mask=start + i < copies, other=-(1 << 30)) - first_expert
        group = tl.where((expert >= 0) & (expert < n_experts), expert, n_experts)
        before += ((group < mine) & (start + i < copies)).to(tl.int32)
    place = tl.sum(before, axis=0)
    tl.store(offsets + mine, place)
    for start in range(0, copies, BLOCK):
        expert = tl.load(indices + start + i, mask=start + i < copies, other=-(1 << 30)) - first_expert
        group = tl.where((expert >= 0) & (expert < n_experts), expert, n_experts)
        hit = ((group == mine) & (start + i < copies)).to(tl.int32)
        tl.store(order + place + tl.cumsum(hit, axis=0) - 1, start + i, mask=hit != 0)
        place += tl.sum(hit, axis=0)


@triton.jit
def gather_kernel(x, weights, order, rows, row_weights, dim, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """A program copies one token's row, and its routing weight, to their sorted place."""
    i = tl.program_id(0).to(tl.int64)
    copy = tl.load(order + i)
    tl.store(row_weights + i, tl.load(weights + copy))
    source = x + (copy // TOPK).to(tl.int64) * dim
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(rows + i * dim + column, tl.load(source + column, mask=column < dim), mask=column < dim)


@triton.jit(do_not_specialize=["copies"])
def invert_kernel(order, place, copies, BLOCK: tl.constexpr):
    """place[order[i]] = i."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(place + tl.load(order + i, mask=i < copies, other=0), i, mask=i < copies)


@triton.jit
def combine_kernel(rows, place, local, shared, y, dim, TOPK: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """A program sums BLOCK channels of one token's expert rows in the router's order, then the shared expert's."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(local)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOPK):
        row = tl.load(place + token * TOPK + j)
        acc += tl.load(rows + row.to(tl.int64) * dim + column, mask=(column < dim) & (row < count), other=0.0).to(tl.float32)
    if SHARED:
        acc += tl.load(shared + token * dim + column, mask=column < dim, other=0.0).to(tl.float32)
    tl.store(y + token * dim + column, acc.to(y.dtype.element_ty), mask=column < dim)


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(
    gate, up, weights, y, codes, scales, rows, limit,
    DIM: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, QUANTISE: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK channels of ROWS rows: clamp, silu, product, routing weight; then FP8 in groups of 128, if asked."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * DIM + column[None, :]
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    g = tl.minimum(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), limit, propagate_nan=tl.PropagateNan.ALL)
    u = tl.clamp(tl.load(up + at, mask=inside, other=0.0).to(tl.float32), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    out = g / (1.0 + tl.exp(-g)) * u
    if WEIGHTED:
        out = out * tl.load(weights + row, mask=row < rows, other=0.0)[:, None]
    rounded = out.to(gate.dtype.element_ty)
    if QUANTISE:
        GROUPS: tl.constexpr = BLOCK // 128
        code, exponent = quantise_e4m3(tl.reshape(rounded.to(tl.float32), (ROWS, GROUPS, 128)), NATIVE)
        tl.store(codes + at, tl.reshape(code, (ROWS, BLOCK)), mask=inside)
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        where = row[:, None] * (DIM // 128) + group[None, :]
        tl.store(scales + where, exponent.to(tl.uint8), mask=(row < rows)[:, None] & (group < DIM // 128)[None, :])
    else:
        tl.store(y + at, rounded, mask=inside)


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, *, topk: int, route_scale: float, tid2eid: torch.Tensor | None = None, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second half of ``gate`` (with ``bias``) and ``gate_hash`` (with ``tid2eid`` and ``ids``): float32 logits [tokens, experts] -> weights, indices."""
    tokens, experts = logits.shape
    weights = torch.empty((tokens, topk), dtype=torch.float32, device=logits.device)
    indices = torch.empty((tokens, topk), dtype=torch.int32, device=logits.device)
    options = launch.options("route", logits)
    route_kernel[(cdiv(tokens, options["ROWS"]),)](
        logits, logits if bias is None else bias, indices if tid2eid is None else tid2eid, indices if ids is None else ids, weights, indices,
        tokens, experts, route_scale, TOPK=topk, HASH=tid2eid is not None,
        BLOCK_E=next_power_of_2(experts), BLOCK_K=next_power_of_2(topk), **options,
    )  # fmt: skip
    return weights, indices


def dispatch(x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, *, first_expert: int, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``ops/moe.py: dispatch``."""
    dim, topk = x.shape[1], indices.shape[1]
    copies = indices.numel()
    order = torch.empty(copies, dtype=torch.int32, device=x.device)
    offsets = torch.empty(n_experts + 1, dtype=torch.int32, device=x.device)
    rows, row_weights = x.new_empty((copies, dim)), weights.new_empty(copies)
    sort_kernel[(n_experts + 1,)](indices, order, offsets, copies, first_expert, n_experts, **launch.options("sort", x))
    gather_kernel[(copies,)](x, weights, order, rows, row_weights, dim, TOPK=topk, **launch.options("gather", x))
    return rows, row_weights, order, offsets


def combine(rows: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, shared: torch.Tensor | None, *, topk: int, out_dtype: torch.dtype) -> torch.Tensor:
    """``ops/moe.py: combine``."""
    copies, dim = rows.shape
    place = torch.empty_like(order)
    y = torch.empty((copies // topk, dim), dtype=out_dtype, device=rows.device)
    options = launch.options("invert", rows)
    invert_kernel[(cdiv(copies, options["BLOCK"]),)](order, place, copies, **options)
    options = launch.options("combine", rows)
    combine_kernel[(copies // topk, cdiv(dim, options["BLOCK"]))](
        rows, place, offsets[-1:], rows if shared is None else shared, y, dim, TOPK=topk, SHARED=shared is not None, **options
    )
    return y


def _swiglu(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, limit: float, *, quantise: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, dim = gate.shape
    y = gate.new_empty((0,) if quantise else (rows, dim))
    codes = torch.empty((rows, dim) if quantise else (0,), dtype=torch.uint8, device=gate.device)
    scales = torch.empty((rows, dim // 128) if quantise else (0,), dtype=torch.uint8, device=gate.device)
    options = launch.options("swiglu", gate)
    swiglu_kernel[(cdiv(rows, options["ROWS"]), cdiv(dim, options["BLOCK"]))](
        gate, up, gate if weights is None else weights, y, codes, scales, rows, limit,
        DIM=dim, WEIGHTED=weights is not None, QUANTISE=quantise, NATIVE=launch.native_fp8(gate), **options,
    )  # fmt: skip
    return y, codes, scales


def swiglu(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, *, limit: float) -> torch.Tensor:
    """``ops/moe.py: swiglu``."""
    return _swiglu(gate, up, weights, limit, quantise=False)[0]


def swiglu_quant(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, *, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``swiglu``, rounded to BF16, then ``act_quant`` (block 128): what ``w2`` multiplies. ``inter`` is a multiple of 128."""
    return _swiglu(gate, up, weights, limit, quantise=True)[1:]


_ROUTE = {"TOPK": 6, "BLOCK_K": 8}
SPECS = (
    KernelSpec(
        name="route", kernel=route_kernel, looped=False,
        signature={"logits": "*fp32", "bias": "*fp32", "table": "*i64", "ids": "*i32", "weights": "*fp32", "indices": "*i32", "tokens": "i32", "experts": "i32:16", "route_scale": "fp32"},
        variants={"flash": {**_ROUTE, "HASH": False, "BLOCK_E": 256}, "pro": {**_ROUTE, "HASH": False, "BLOCK_E": 512}, "hash": {**_ROUTE, "HASH": True, "BLOCK_E": 256}},
        work=lambda c: Work(bytes=4.0 * c["ROWS"] * c["BLOCK_E"]),
    ),
    KernelSpec(
        name="sort", kernel=sort_kernel,
        signature={"indices": "*i32", "order": "*i32", "offsets": "*i32", "copies": "i32", "first_expert": "i32", "n_experts": "i32"},
        variants={"all": {}}, work=lambda c: Work(bytes=4.0 * c["BLOCK"] / 257),  # read once from memory, by the other experts' programs from cache
    ),
    KernelSpec(
        name="gather", kernel=gather_kernel,
        signature={"x": "*bf16", "weights": "*fp32", "order": "*i32", "rows": "*bf16", "row_weights": "*fp32", "dim": "i32:16"},
        variants={"all": {"TOPK": 6}}, work=lambda c: Work(bytes=4.0 * c["BLOCK"]),
    ),
    KernelSpec(
        name="invert", kernel=invert_kernel, looped=False,
        signature={"order": "*i32", "place": "*i32", "copies": "i32"}, variants={"all": {}}, work=lambda c: Work(bytes=8.0 * c["BLOCK"]),
    ),
    KernelSpec(
        name="combine", kernel=combine_kernel, looped=False,
        signature={"rows": "*bf16", "place": "*i32", "local": "*i32", "shared": "*bf16", "y": "*bf16", "dim": "i32:16"},
        variants={"all": {"TOPK": 6, "SHARED": True}}, work=lambda c: Work(bytes=16.0 * c["BLOCK"]),
    ),
    KernelSpec(
        name="swiglu", kernel=swiglu_kernel, looped=False,
        signature={"gate": "*bf16", "up": "*bf16", "weights": "*fp32", "y": "*bf16", "codes": "*u8", "scales": "*u8", "rows": "i32", "limit": "fp32"},
        variants={"experts": {"DIM": 2048, "WEIGHTED": True, "QUANTISE": True}, "shared": {"DIM": 2048, "WEIGHTED": False, "QUANTISE": True}},
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        work=lambda c: Work(bytes=c["ROWS"] * c["BLOCK"] * 5.0),
    ),
)  # fmt: skip
