"""Cache rows: quantised, packed and scattered in one launch, whatever their layout; plain rows gathered."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Normed, Rotated, awaited, parts
from dsv4_backend_cuda.kernels.formats import e2m1_encode, e8m0_of, e8m0_reciprocal, quantise_e4m3
from dsv4_backend_cuda.kernels.quant import hadamard_signs, turn_within
from dsv4_backend_cuda.kernels.rope import turn
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2
from dsv4_core.contract.dtypes import FP4_GROUP, KV_BLOCK, RowLayout


@triton.jit
def write_kv_kernel(
    rows, index, cache, weight, positions, freqs, eps,
    DIM: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    NORM: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program stores one row at slot index[row], -1 nowhere: E4M3 codes in groups of GROUP, a scale byte each, zeros up to the tail, BF16 channels.

    NORM: after norm and RoPE of the tail, as ``norm_and_turn`` has them.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(index + row).to(tl.int64)
    PLAIN: tl.constexpr = DIM - ROPE
    group, channel = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    at = group[:, None] * GROUP + channel[None, :]
    kept = slot >= 0
    live = kept & (at < PLAIN)
    wide = tl.load(rows + row * DIM + at, mask=live, other=0.0).to(tl.float32)
    if NORM:
        column = tl.arange(0, BLOCK)
        whole = tl.load(rows + row * DIM + column, mask=kept & (column < DIM), other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(whole * whole, axis=0) / DIM + eps)
        gain = tl.load(weight + at, mask=live, other=0.0).to(tl.float32)
        wide = (wide * inverse * gain).to(rows.dtype.element_ty).to(tl.float32)
    code, exponent = quantise_e4m3(tl.reshape(wide, (1, GROUPS, GROUP)), NATIVE)
    out = cache + slot * WIDTH
    tl.store(out + at, tl.reshape(code, (GROUPS, GROUP)), mask=live)
    byte = tl.where(group < PLAIN // GROUP, tl.reshape(exponent, (GROUPS,)), 0)
    tl.store(out + PLAIN + group, byte.to(tl.uint8), mask=kept & (group < WIDTH - PLAIN - 2 * ROPE))
    turned = tl.arange(0, BLOCK_R)
    tail = tl.load(rows + row * DIM + PLAIN + turned, mask=kept & (turned < ROPE), other=0.0)
    if NORM:  # BLOCK_R is ROPE
        tail = tail.to(tl.float32) * inverse * tl.load(weight + PLAIN + turned).to(tl.float32)
        tail = tl.reshape(turn(tail.to(rows.dtype.element_ty)[None, :], positions, freqs, row, ROPE // 2, False).to(rows.dtype.element_ty), (ROPE,))
    target = (out + (WIDTH - 2 * ROPE)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(target + turned, tail, mask=kept & (turned < ROPE))


@triton.jit
def write_key_kernel(rows, index, cache, DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """A program stores one row at slot index[row], -1 nowhere: pairs of E2M1 codes, the even channel in the low half, then a scale byte a group."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(index + row).to(tl.int64)
    group, pair = tl.arange(0, GROUPS), tl.arange(0, GROUP // 2)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    kept = slot >= 0
    wide = tl.load(rows + row * DIM + at, mask=kept & (at < DIM), other=0.0).to(tl.float32)
    exponent = e8m0_of(tl.maximum(tl.max(tl.abs(wide), axis=1), 6 * 2.0**-126), 1.0 / 6.0)
    code = e2m1_encode(wide * e8m0_reciprocal(exponent)[:, None])
    even, odd = tl.split(tl.reshape(code, (GROUPS, GROUP // 2, 2)))
    out = cache + slot * WIDTH
    byte = group[:, None] * (GROUP // 2) + pair[None, :]
    tl.store(out + byte, (even | (odd << 4)).to(tl.uint8), mask=kept & (byte < DIM // 2))
    tl.store(out + DIM // 2 + group, exponent.to(tl.uint8), mask=kept & (group < DIM // GROUP))


@triton.jit(do_not_specialize=["rows"])
def write_turned_key_kernel(
    x, index, cache, weight, positions, freqs, rows, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """As ``write_key_kernel`` of ROWS rows, after norm and RoPE (``norm_and_turn``) and the rotation (``hadamard_kernel``)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    i = tl.arange(0, DIM)
    present, turned = (row < rows)[:, None], (i >= DIM - 2 * HALF)[None, :]
    wide = tl.load(x + row[:, None] * DIM + i[None, :], mask=present, other=0.0).to(tl.float32)
    inverse = (1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / DIM + eps))[:, None]
    value = (wide * inverse * tl.load(weight + i).to(tl.float32)[None, :]).to(x.dtype.element_ty)
    other = tl.load(x + row[:, None] * DIM + (i ^ 1)[None, :], mask=present, other=0.0).to(tl.float32)
    other = (other * inverse * tl.load(weight + (i ^ 1)).to(tl.float32)[None, :]).to(x.dtype.element_ty)
    value = turn_within(value, other, positions, freqs, row, present, turned, DIM, HALF, False)
    rotated = (tl.dot(value, hadamard_signs(DIM)) * FACTOR).to(x.dtype.element_ty)
    GROUPS: tl.constexpr = DIM // GROUP
    grouped = tl.reshape(rotated.to(tl.float32), (ROWS, GROUPS, GROUP))
    exponent = e8m0_of(tl.maximum(tl.max(tl.abs(grouped), axis=2), 6 * 2.0**-126), 1.0 / 6.0)
    code = e2m1_encode(grouped * e8m0_reciprocal(exponent)[:, :, None])
    even, odd = tl.split(tl.reshape(code, (ROWS, DIM // 2, 2)))
    slot = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
    out, kept = cache + slot[:, None] * WIDTH, (slot >= 0)[:, None]
    byte, group = tl.arange(0, DIM // 2), tl.arange(0, GROUPS)
    tl.store(out + byte[None, :], (even | (odd << 4)).to(tl.uint8), mask=kept & (byte < DIM // 2)[None, :])
    tl.store(out + DIM // 2 + group[None, :], exponent.to(tl.uint8), mask=kept & (group < GROUPS)[None, :])


@triton.jit(do_not_specialize=["rows", "pieces"])
def copy_rows_kernel(source, index, target, rows, pieces, DIM: tl.constexpr, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
    """A program copies BLOCK channels of one row. SCATTER: to target[index[row]], -1 nowhere; else from source[index[row]], zeros for -1.

    Of SCATTER the ``rows`` of ``source`` may come in ``pieces``.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(index + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = (slot >= 0) & (column < DIM)
    if SCATTER:
        value = tl.load(source + row * DIM + column, mask=kept)
        for piece in range(1, pieces):
            value += tl.load(source + (piece * tl.cast(rows, tl.int64) + row) * DIM + column, mask=kept)
        tl.store(target + slot * DIM + column, value, mask=kept)
    else:
        tl.store(target + row * DIM + column, tl.load(source + slot * DIM + column, mask=kept, other=0.0), mask=column < DIM)


def cache_write(cache: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, *, layout: RowLayout) -> None:
    """``ops/cache.py: cache_write`` into a contiguous cache of rows whose bytes are a multiple of 4."""
    n, dim = rows.shape
    if not n:
        return
    if layout.kind == "plain":
        options = launch.options("copy_rows", rows)
        given = parts(rows)
        copy_rows_kernel[(n, cdiv(dim, options["BLOCK"]))](given, index, cache, n, given.shape[0], DIM=dim, SCATTER=True, **options)
        return
    if layout.kind == "kv":
        of = awaited(rows, Normed, rows=True)
        if of and (of.weight is None or of.x.shape[1] > 1 or 2 * of.freqs.shape[0] != layout.rope_dim):
            of = None
        x = (rows if of is None else of.x).contiguous()
        groups = next_power_of_2(layout.width - dim - layout.rope_dim)  # the scales' bytes with their padding: at least one for each group
        write_kv_kernel[(n,)](
            x, index, cache, *_how(of, x), DIM=dim, ROPE=layout.rope_dim, WIDTH=layout.width, GROUP=KV_BLOCK, GROUPS=groups, BLOCK=next_power_of_2(dim),
            BLOCK_R=next_power_of_2(layout.rope_dim), NORM=of is not None, NATIVE=launch.native_fp8(x), **launch.options("write_kv", x),
        )  # fmt: skip
    elif (key := awaited(rows, Rotated)) and key.of.waits:
        options = launch.options("write_turned_key", cache)
        x = key.of.x.contiguous()
        weight, positions, freqs, eps = _how(key.of, x)
        write_turned_key_kernel[(cdiv(n, options["ROWS"]),)](
            x, index, cache, weight, positions, freqs, n, eps, DIM=dim, HALF=freqs.shape[0], WIDTH=layout.width, GROUP=FP4_GROUP, FACTOR=dim**-0.5, **options
        )
    else:
        rows = rows.contiguous()
        write_key_kernel[(n,)](
            rows, index, cache, DIM=dim, WIDTH=layout.width, GROUP=FP4_GROUP, GROUPS=next_power_of_2(dim // FP4_GROUP), **launch.options("write_key", rows)
        )


def _how(of: Normed | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Weight, positions, frequencies and epsilon of rows that a norm and RoPE await, or what stands for them."""
    return (x, x, x, 0.0) if of is None or of.weight is None else (of.weight, of.positions, of.freqs, of.eps)


def cache_read(cache: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``ops/cache.py: cache_read`` of plain rows."""
    n, dim = index.shape[0], cache.shape[1]
    rows = torch.empty((n, dim), dtype=cache.dtype, device=cache.device)
    if n:
        options = launch.options("copy_rows", cache)
        copy_rows_kernel[(n, cdiv(dim, options["BLOCK"]))](cache, index, rows, n, 1, DIM=dim, SCATTER=False, **options)
    return rows


SPECS = (
    KernelSpec(
        name="write_kv", kernel=write_kv_kernel, looped=False,
        signature={"rows": "*bf16", "index": "*i32", "cache": "*u8", "weight": "*bf16", "positions": "*i32", "freqs": "*fp32", "eps": "fp32"},
        variants={
            name: {"DIM": 512, "ROPE": 64, "WIDTH": 584, "GROUP": 64, "GROUPS": 8, "BLOCK": 512, "BLOCK_R": 64, "NORM": norm}
            for name, norm in (("flash", False), ("normed", True))
        },
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        work=lambda _: Work(bytes=1024.0 + 584.0),
    ),
    KernelSpec(
        name="write_key", kernel=write_key_kernel, looped=False,
        signature={"rows": "*bf16", "index": "*i32", "cache": "*u8"},
        variants={"index": {"DIM": 128, "WIDTH": 68, "GROUP": 32, "GROUPS": 4}},
        work=lambda _: Work(bytes=256.0 + 68.0),
    ),
    KernelSpec(
        name="write_turned_key", kernel=write_turned_key_kernel, looped=False,
        signature={"x": "*bf16", "index": "*i32", "cache": "*u8", "weight": "*bf16", "positions": "*i32", "freqs": "*fp32", "rows": "i32", "eps": "fp32"},
        variants={"index": {"DIM": 128, "HALF": 32, "WIDTH": 68, "GROUP": 32, "FACTOR": 128**-0.5}},
        mma={80: "HMMA", 89: "HMMA", 90: "HGMMA|HMMA", 100: "UTC.*MMA|HMMA", 120: "HMMA"},
        work=lambda c: Work(bytes=c["ROWS"] * (256.0 + 68.0), flops=2.0 * c["ROWS"] * c["DIM"] ** 2),
    ),
    KernelSpec(
        name="copy_rows", kernel=copy_rows_kernel, looped=False,
        signature={"source": "*fp32", "index": "*i32", "target": "*fp32", "rows": "i32", "pieces": "i32"},
        variants={"write": {"DIM": 2048, "SCATTER": True}, "read": {"DIM": 2048, "SCATTER": False}},
        work=lambda c: Work(bytes=8.0 * c["BLOCK"]),
    ),
)  # fmt: skip
