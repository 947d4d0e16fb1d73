"""Mixture of experts around the grouped products: routing, dispatch by a counting sort without atomics, SwiGLU, combination."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Codes, Mixture, waiting
from dsv4_backend_cuda.kernels.formats import quantise_e4m3
from dsv4_backend_cuda.kernels.tiles import in_order
from dsv4_backend_cuda.kernels.words import paired_place
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit
def sqrt_softplus(x):
    """sqrt(log(1 + exp(x))) in float32, to full relative precision for very negative ``x`` too."""
    z = tl.exp(-tl.abs(x))
    u = 1.0 + z
    tail = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))  # log1p by its well-known correction
    return tl.sqrt_rn(tl.maximum(x, 0.0) + tail)


@triton.jit(do_not_specialize=["tokens", "pieces"])
def route_kernel(
    logits, bias, table, ids, weights, indices, order, place, offsets, tokens, pieces, experts, route_scale,
    TOPK: tl.constexpr, HASH: tl.constexpr, SORT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program routes ROWS tokens, whose logits come in ``pieces``. HASH: to ``table[ids[t]]``; else to the largest biased scores, the lower id of equals.

    SORT: the one program of all tokens also sorts their copies by expert, as ``sort_kernel`` does.
    """
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    live = token < tokens
    inside = live[:, None] & (e < experts)[None, :]
    score = sqrt_softplus(in_order(logits, token[:, None] * experts + e[None, :], inside, tl.cast(tokens, tl.int64) * experts, pieces))
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
    if SORT:
        COPIES: tl.constexpr = ROWS * BLOCK_K
        there = live[:, None] & (k < TOPK)[None, :]
        copy = tl.reshape(tl.where(there, at.to(tl.int32), COPIES * TOPK), (COPIES,))
        expert = tl.reshape(tl.where(there, chosen, BLOCK_E), (COPIES,))
        lower = (expert[None, :] < expert[:, None]) | ((expert[None, :] == expert[:, None]) & (copy[None, :] < copy[:, None]))
        to = tl.sum(lower.to(tl.int32), axis=1)
        tl.store(place + copy, to, mask=expert < BLOCK_E)
        tl.store(order + to, copy, mask=expert < BLOCK_E)
        ends = tl.cumsum(tl.histogram(expert, BLOCK_E, mask=expert < BLOCK_E), axis=0)
        tl.store(offsets, 0)
        tl.store(offsets + 1 + e, ends, mask=e < experts)


@triton.jit(do_not_specialize=["copies", "first_expert", "n_experts"])
def sort_kernel(indices, order, place, offsets, copies, first_expert, n_experts, BLOCK: tl.constexpr):
    """Program e of n_experts + 1 places the copies for expert e (the last: for other ranks) behind those for lower ones: place[order[i]] = i."""
    mine = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, copies, BLOCK):
        expert = tl.load(indices + start + i, mask=start + i < copies, other=-(1 << 30)) - first_expert
        group = tl.where((expert >= 0) & (expert < n_experts), expert, n_experts)
        before += ((group < mine) & (start + i < copies)).to(tl.int32)
    free = tl.sum(before, axis=0)
    tl.store(offsets + mine, free)
    for start in range(0, copies, BLOCK):
        expert = tl.load(indices + start + i, mask=start + i < copies, other=-(1 << 30)) - first_expert
        group = tl.where((expert >= 0) & (expert < n_experts), expert, n_experts)
        hit = ((group == mine) & (start + i < copies)).to(tl.int32)
        at = free + tl.cumsum(hit, axis=0) - 1
        tl.store(order + at, start + i, mask=hit != 0)
        tl.store(place + start + i, at, mask=hit != 0)
        free += tl.sum(hit, axis=0)


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
def combined(rows, place, local, shared, token, column, inside, DIM, TOPK: tl.constexpr, SHARED: tl.constexpr):
    """Channels of tokens: their experts' rows in the router's order, then the shared expert's, added up in float32."""
    count = tl.load(local)
    acc = tl.zeros(inside.shape, tl.float32)
    for j in tl.static_range(TOPK):
        row = tl.load(place + token * TOPK + j)
        acc += tl.load(rows + row.to(tl.int64) * DIM + column, mask=inside & (row < count), other=0.0).to(tl.float32)
    if SHARED:
        acc += tl.load(shared + token * DIM + column, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def combine_kernel(rows, place, local, shared, y, dim, TOPK: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """A program sums BLOCK channels of one token's expert rows in the router's order, then the shared expert's."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = combined(rows, place, local, shared, token, column, column < dim, dim, TOPK, SHARED)
    tl.store(y + token * dim + column, acc.to(y.dtype.element_ty), mask=column < dim)


@triton.jit(do_not_specialize=["rows", "pieces", "early_rows", "early_pieces"])
def swiglu_kernel(
    gate, up, weights, order, y, codes, scales, early, early_codes, early_scales, rows, pieces, early_rows, early_pieces, limit,
    DIM: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, SORTED: tl.constexpr, QUANTISE: tl.constexpr,
    PAIRED: tl.constexpr, EARLY: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK channels of ROWS rows: clamp, silu, product, routing weight; then FP8 in groups of 128, if asked.

    Rows of ``gate`` and ``up`` are STRIDE apart and may come in ``pieces``, whose sum is rounded first. SORTED: row r's weight is weights[order[r]].
    PAIRED: codes as ``words.paired_place``. EARLY: the first programs take ``early_rows`` of a dense layer (gate | up in ``early``), without weights or
    another order.
    """
    program, is_early = tl.program_id(0), False
    if EARLY:
        others = tl.cdiv(early_rows, ROWS)
        is_early = program < others
        program, rows = tl.where(is_early, program, program - others), tl.where(is_early, early_rows, rows)
    row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * DIM + column[None, :]
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    read, stride = row[:, None] * STRIDE + column[None, :], tl.cast(rows, tl.int64) * STRIDE
    if is_early:
        g = in_order(early, read, inside, stride, early_pieces).to(y.dtype.element_ty).to(tl.float32)
        u = in_order(early + DIM, read, inside, stride, early_pieces).to(y.dtype.element_ty).to(tl.float32)
        codes, scales = early_codes, early_scales
    else:
        g = in_order(gate, read, inside, stride, pieces).to(y.dtype.element_ty).to(tl.float32)
        u = in_order(up, read, inside, stride, pieces).to(y.dtype.element_ty).to(tl.float32)
    g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    out = g / (1.0 + tl.exp(-g)) * u
    if WEIGHTED:
        weighted = (row < rows) & (is_early == 0)
        whose = tl.load(order + row, mask=weighted, other=0) if SORTED else row
        out = out * tl.load(weights + whose, mask=weighted, other=1.0)[:, None]
    rounded = out.to(y.dtype.element_ty)
    if QUANTISE:
        GROUPS: tl.constexpr = BLOCK // 128
        code, exponent = quantise_e4m3(tl.reshape(rounded.to(tl.float32), (ROWS, GROUPS, 128)), NATIVE)
        place = tl.where(is_early, column, paired_place(column)) if PAIRED else column
        tl.store(codes + row[:, None] * DIM + place[None, :], tl.reshape(code, (ROWS, BLOCK)), mask=inside)
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        where = row[:, None] * (DIM // 128) + group[None, :]
        tl.store(scales + where, exponent.to(tl.uint8), mask=(row < rows)[:, None] & (group < DIM // 128)[None, :])
    else:
        tl.store(y + at, rounded, mask=inside)


Sorted = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""``order``, where each copy went, and ``offsets``."""
SORTED_TOKENS = 8
"""Tokens up to which the program that routes them sorts their copies too."""


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, *, topk: int, route_scale: float, tid2eid: torch.Tensor | None = None, ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, Sorted | None]:
    """The second half of ``gate`` (with ``bias``) and ``gate_hash`` (with ``tid2eid`` and ``ids``): float32 logits [pieces, tokens, experts] -> weights,
    indices; of few tokens also what ``sort`` makes of the indices where all experts are here.
    """
    pieces, tokens, experts = logits.shape
    weights = torch.empty((tokens, topk), dtype=torch.float32, device=logits.device)
    indices = torch.empty((tokens, topk), dtype=torch.int32, device=logits.device)
    options = launch.options("route", logits)
    few = 0 < tokens <= SORTED_TOKENS
    if few:
        options["ROWS"] = 1 if tokens == 1 else SORTED_TOKENS
    made = _places(indices, experts) if few else None
    order, place, offsets = made or (indices, indices, indices)
    route_kernel[(cdiv(tokens, options["ROWS"]),)](
        logits, logits if bias is None else bias, indices if tid2eid is None else tid2eid, indices if ids is None else ids, weights, indices,
        order, place, offsets, tokens, pieces, experts, route_scale, TOPK=topk, HASH=tid2eid is not None, SORT=few,
        BLOCK_E=next_power_of_2(experts), BLOCK_K=next_power_of_2(topk), **options,
    )  # fmt: skip
    return weights, indices, made


def _places(indices: torch.Tensor, n_experts: int) -> Sorted:
    order, place = (torch.empty(indices.numel(), dtype=torch.int32, device=indices.device) for _ in range(2))
    return order, place, torch.empty(n_experts + 1, dtype=torch.int32, device=indices.device)


def sort(indices: torch.Tensor, *, first_expert: int, n_experts: int) -> Sorted:
    """Copies of tokens by expert: ``order`` and ``offsets`` of ``ops/moe.py: dispatch``, and where each copy went."""
    order, place, offsets = _places(indices, n_experts)
    sort_kernel[(n_experts + 1,)](indices, order, place, offsets, indices.numel(), first_expert, n_experts, **launch.options("sort", indices))
    return order, place, offsets


def dispatch(x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, *, first_expert: int, n_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``ops/moe.py: dispatch``."""
    dim, topk = x.shape[1], indices.shape[1]
    copies = indices.numel()
    order, _, offsets = sort(indices, first_expert=first_expert, n_experts=n_experts)
    rows, row_weights = x.new_empty((copies, dim)), weights.new_empty(copies)
    gather_kernel[(copies,)](x, weights, order, rows, row_weights, dim, TOPK=topk, **launch.options("gather", x))
    return rows, row_weights, order, offsets


def invert(order: torch.Tensor) -> torch.Tensor:
    """Where each copy went: ``place[order[i]] = i``."""
    place, options = torch.empty_like(order), launch.options("invert", order)
    invert_kernel[(cdiv(order.numel(), options["BLOCK"]),)](order, place, order.numel(), **options)
    return place


def _combine(of: Mixture) -> None:
    (tokens, dim), options = of.room.shape, launch.options("combine", of.rows)
    shared = of.rows if of.shared is None else of.shared.contiguous()
    combine_kernel[(tokens, cdiv(dim, options["BLOCK"]))](
        of.rows, of.place, of.local, shared, of.room, dim, TOPK=of.topk, SHARED=of.shared is not None, **options
    )


def combine(rows: torch.Tensor, place: torch.Tensor, offsets: torch.Tensor, shared: torch.Tensor | None, *, topk: int, out_dtype: torch.dtype) -> torch.Tensor:
    """``ops/moe.py: combine``, of copies that went to ``place``; for its reader to make, where that is ``hc_post``."""
    copies, dim = rows.shape
    y = torch.empty((copies // topk, dim), dtype=out_dtype, device=rows.device)
    return waiting(y, Mixture(y, _combine, rows, place, offsets[-1:], shared, topk))


def _codes(rows: int, dim: int, device: torch.device) -> Codes:
    """Room for E4M3 codes [rows, dim] and scale bytes [rows, dim / 128]."""
    return tuple(torch.empty((rows, width), dtype=torch.uint8, device=device) for width in (dim, dim // 128))  # type: ignore[return-value]


def _swiglu(
    gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, order: torch.Tensor | None, limit: float,
    *, quantise: bool, paired: bool = False, early: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Codes, Codes]:  # fmt: skip
    pieces, rows, dim = gate.shape
    y = torch.empty((0,) if quantise else (rows, dim), dtype=torch.bfloat16, device=gate.device)
    early_pieces, early_rows = (0, 0) if early is None else early.shape[:2]
    codes, early_codes = (_codes(count if quantise else 0, dim, gate.device) for count in (rows, early_rows))
    options = launch.options("swiglu", gate)
    swiglu_kernel[(cdiv(rows, options["ROWS"]) + cdiv(early_rows, options["ROWS"]), cdiv(dim, options["BLOCK"]))](
        gate, up, gate if weights is None else weights, codes[1] if order is None else order, y, *codes, gate if early is None else early, *early_codes,
        rows, pieces, early_rows, early_pieces, limit,
        DIM=dim, STRIDE=gate.stride(1), WEIGHTED=weights is not None, SORTED=order is not None, QUANTISE=quantise, PAIRED=paired,
        EARLY=early is not None, NATIVE=launch.native_fp8(gate), **options,
    )  # fmt: skip
    return y, codes, early_codes


def swiglu(gate: torch.Tensor, up: torch.Tensor, weights: torch.Tensor | None, *, limit: float) -> torch.Tensor:
    """``ops/moe.py: swiglu``."""
    return _swiglu(gate[None], up[None], weights, None, limit, quantise=False)[0]


def swiglu_quant(both: torch.Tensor, *, limit: float, paired: bool = False) -> Codes:
    """``swiglu`` of [pieces, rows, gate | up], rounded to BF16, then ``act_quant`` (block 128): what ``w2`` multiplies. Half a row is a multiple of 128."""
    dim = both.shape[2] // 2
    return _swiglu(both[..., :dim], both[..., dim:], None, None, limit, quantise=True, paired=paired)[1]


def swiglu_experts(
    both: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, early: torch.Tensor | None, *, limit: float, paired: bool
) -> tuple[Codes, Codes]:
    """``swiglu_quant`` of experts' rows [rows, gate | up], with ``weights`` of copies in the router's order, where ``order`` says which copy a row is; and,
    where there are such, of the shared expert's [pieces, tokens, gate | up], as wide.
    """
    dim = both.shape[1] // 2
    gate, up = both[None, :, :dim], both[None, :, dim:]
    return _swiglu(gate, up, weights, order, limit, quantise=True, paired=paired, early=early)[1:]


_ROUTE = {"HASH": False, "SORT": False, "TOPK": 6, "BLOCK_K": 8}
_SWIGLU = {"DIM": 2048, "STRIDE": 4096, "QUANTISE": True}
SPECS = (
    KernelSpec(
        name="route", kernel=route_kernel, looped=False,
        signature={"logits": "*fp32", "bias": "*fp32", "table": "*i64", "ids": "*i32", "weights": "*fp32", "indices": "*i32", "order": "*i32", "place": "*i32",
                   "offsets": "*i32", "tokens": "i32", "pieces": "i32", "experts": "i32:16", "route_scale": "fp32"},
        variants={"flash": {**_ROUTE, "BLOCK_E": 256}, "pro": {**_ROUTE, "BLOCK_E": 512}, "hash": {**_ROUTE, "HASH": True, "BLOCK_E": 256},
                  "sorted": {**_ROUTE, "BLOCK_E": 256, "SORT": True}, "sorted8": {**_ROUTE, "BLOCK_E": 256, "SORT": True, "ROWS": SORTED_TOKENS}},
        work=lambda c: Work(bytes=4.0 * c["ROWS"] * c["BLOCK_E"]),
    ),
    KernelSpec(
        name="sort", kernel=sort_kernel,
        signature={"indices": "*i32", "order": "*i32", "place": "*i32", "offsets": "*i32", "copies": "i32", "first_expert": "i32", "n_experts": "i32"},
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
        signature={"gate": "*bf16", "up": "*bf16", "weights": "*fp32", "order": "*i32", "y": "*bf16", "early": "*fp32"}
        | dict.fromkeys(("codes", "scales", "early_codes", "early_scales"), "*u8")
        | {"rows": "i32", "pieces": "i32", "early_rows": "i32", "early_pieces": "i32", "limit": "fp32"},
        variants={
            "experts": {**_SWIGLU, "WEIGHTED": True, "SORTED": True, "PAIRED": True, "EARLY": False},
            "all": {**_SWIGLU, "WEIGHTED": True, "SORTED": True, "PAIRED": True, "EARLY": True},
            "shared": {**_SWIGLU, "WEIGHTED": False, "SORTED": False, "PAIRED": False, "EARLY": False},
        },
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        work=lambda c: Work(bytes=c["ROWS"] * c["BLOCK"] * 5.0),
    ),
)  # fmt: skip
