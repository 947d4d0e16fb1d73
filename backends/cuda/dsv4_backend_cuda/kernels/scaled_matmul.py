"""Linear layers with quantised weights: FP8 activations x FP8 (128 x 128 blocks) or FP4 (1 x 32) weights, dense and per expert.

Weights are the tall operand of the tensor-core product and tokens the wide one, so that one token wastes no more than 15 columns and a token's sum is
taken in the same order in every tile: the result's bits do not depend on the batch. K is walked in steps of 128, an activation's scale block.
"""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels.formats import e4m3_half, e8m0_value
from dsv4_backend_cuda.launch import KernelSpec, Work

DECODE_TOKENS = 16  # up to here one narrow tile holds all tokens (of an expert)


@triton.jit
def bf16_of_e2m1(code, scale):
    """E2M1 codes [rows, n] (uint16, four bits) times E8M0 scales [rows, n] (uint8) -> BF16, exactly: code bits, 2^126, 2^(scale - 127)."""
    bits = ((code & 8) << 12) | ((code & 7) << 6)
    s = scale.to(tl.uint16)
    factor = tl.where(s == 0, 0x40, s << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return (bits.to(tl.bfloat16, bitcast=True) * 8.507059173023462e37).to(tl.bfloat16) * factor


@triton.jit
def e4m3_of_e2m1(code):
    """E2M1 code (low four bits of a byte) -> E4M3 code of the same value: exponent and mantissa shifted, bias 1 to 7, and the subnormal 0.5."""
    c = code & 7
    magnitude = tl.where(c == 0, 0, tl.where(c == 1, 0x30, (c << 2) + 0x30))
    return (magnitude | ((code & 8) << 4)).to(tl.uint8)


@triton.jit
def locate(pid, offsets, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tile ``pid`` of rows sorted by expert -> (expert, first row, end row); rows of other ranks are one more group, expert EXPERTS."""
    e = tl.arange(0, SLOTS)
    start = tl.load(offsets + e, mask=e <= EXPERTS, other=0)
    stop = tl.load(offsets + e + 1, mask=e <= EXPERTS, other=0)
    tiles = tl.where(e <= EXPERTS, (stop - start + BLOCK_T - 1) // BLOCK_T, 0)
    after = tl.cumsum(tiles, axis=0)
    expert = tl.sum((after <= pid).to(tl.int32), axis=0)
    mine = e == expert
    row = tl.sum(tl.where(mine, start + (pid - (after - tiles)) * BLOCK_T, 0), axis=0)
    return expert, row, tl.sum(tl.where(mine, stop, 0), axis=0)


@triton.jit
def scaled_matmul_kernel(
    x, xs, w, ws, y, offsets, rows, N, K,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, FP4: tl.constexpr, MMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_N outputs of BLOCK_T rows. EXPERTS 0: one dense weight. MMA: "bf16", "fp8", "scaled" (block-scaled instructions) or "scaled_e4m3" (the same, FP4 widened)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, first, end = 0, tl.program_id(1) * BLOCK_T, rows
    if EXPERTS > 0:
        expert, first, end = locate(tl.program_id(1), offsets, EXPERTS, SLOTS, BLOCK_T)
    t = first + tl.arange(0, BLOCK_T)
    live_t, live_n = t < end, n < N
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    row, column = t.to(tl.int64), n.to(tl.int64)
    blocks = K // 128
    if expert < EXPERTS or EXPERTS == 0:
        PACK: tl.constexpr = 2 if FP4 else 1
        WIDEN: tl.constexpr = MMA == "scaled_e4m3"
        w += tl.cast(expert, tl.int64) * N * (K // PACK)
        ws += tl.cast(expert, tl.int64) * (N * (K // 32) if FP4 else ((N + 127) // 128) * blocks)
        inner, packed, group = tl.arange(0, 128), tl.arange(0, 128 // PACK), tl.arange(0, 4)
        for block in range(blocks):
            wide = tl.load(w + column[:, None] * (K // PACK) + block * (128 // PACK) + packed[None, :], mask=live_n[:, None], other=0)
            if MMA == "scaled" or MMA == "scaled_e4m3":
                narrow = tl.load(x + row[None, :] * K + block * 128 + inner[:, None], mask=live_t[None, :], other=0)
                scale_x = tl.load(xs + row[:, None] * blocks + block + 0 * group[None, :], mask=live_t[:, None], other=127)
                if FP4:
                    scale_w = tl.load(ws + column[:, None] * (K // 32) + block * 4 + group[None, :], mask=live_n[:, None], other=127)
                    if WIDEN:  # sm_120 has no product of mixed formats in Triton
                        wide = tl.reshape(tl.join(e4m3_of_e2m1(wide), e4m3_of_e2m1(wide >> 4)), (BLOCK_N, 128))
                        acc = tl.dot_scaled(wide, scale_w, "e4m3", narrow, scale_x, "e4m3", acc)
                    else:
                        acc = tl.dot_scaled(wide, scale_w, "e2m1", narrow, scale_x, "e4m3", acc)
                else:
                    scale_w = tl.load(ws + (column // 128)[:, None] * blocks + block + 0 * group[None, :], mask=live_n[:, None], other=127)
                    acc = tl.dot_scaled(wide, scale_w, "e4m3", narrow, scale_x, "e4m3", acc)
            else:
                scale = e8m0_value(tl.load(xs + row * blocks + block, mask=live_t, other=127))
                if FP4:
                    byte = tl.arange(0, 64)
                    even = tl.load(x + row[None, :] * K + block * 128 + 2 * byte[:, None], mask=live_t[None, :], other=0)
                    odd = tl.load(x + row[None, :] * K + block * 128 + 2 * byte[:, None] + 1, mask=live_t[None, :], other=0)
                    scale_w = tl.load(ws + column[:, None] * (K // 32) + block * 4 + (byte // 16)[None, :], mask=live_n[:, None], other=127)
                    code = wide.to(tl.uint16)
                    part = tl.dot(bf16_of_e2m1(code, scale_w), e4m3_half(even).to(tl.bfloat16))
                    part = tl.dot(bf16_of_e2m1(code >> 4, scale_w), e4m3_half(odd).to(tl.bfloat16), part)
                    acc += part * scale[None, :]
                else:
                    narrow = tl.load(x + row[None, :] * K + block * 128 + inner[:, None], mask=live_t[None, :], other=0)
                    scale_w = e8m0_value(tl.load(ws + (tl.program_id(0) * BLOCK_N // 128) * blocks + block))
                    if MMA == "fp8":
                        part = tl.dot(wide.to(tl.float8e4nv, bitcast=True), narrow.to(tl.float8e4nv, bitcast=True))
                    else:
                        part = tl.dot(e4m3_half(wide).to(tl.bfloat16), e4m3_half(narrow).to(tl.bfloat16))
                    acc += part * (scale * scale_w)[None, :]
    out = tl.trans(acc).to(y.dtype.element_ty)
    tl.store(y + row[:, None] * N + column[None, :], out, mask=live_t[:, None] & live_n[None, :])


def mma_of(arch: int, *, fp4: bool) -> str:
    """Kind of product on an architecture: block-scaled where the tensor cores have it; FP4 needs BF16 elsewhere, its 1 x 32 scales do not factor out."""
    if arch >= 100:
        return "scaled_e4m3" if fp4 and arch >= 120 else "scaled"
    return "bf16" if fp4 or arch < 89 else "fp8"


def linear(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, *, out_dtype: torch.dtype, fp4: bool = False) -> torch.Tensor:
    """Quantised activation [tokens, in] x weight [out, in]: ``ops/matmul.py: linear`` after ``act_quant``. All four operands uint8; in % 128 = 0."""
    rows, k = codes.shape
    n = weight.shape[0]
    y = torch.empty((rows, n), dtype=out_dtype, device=codes.device)
    options = launch.options(f"{'fp4_' if fp4 else ''}linear_{'decode' if rows <= DECODE_TOKENS else 'prefill'}", codes)
    scaled_matmul_kernel[(triton.cdiv(n, options["BLOCK_N"]), triton.cdiv(rows, options["BLOCK_T"]))](
        codes, scales, weight, weight_scale, y, scales, rows, n, k,
        EXPERTS=0, SLOTS=1, FP4=fp4, MMA=mma_of(launch.architecture(str(codes.device)), fp4=fp4), **options,
    )  # fmt: skip
    return y


def expert_linear(codes: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offsets: torch.Tensor, *, fp4: bool) -> torch.Tensor:
    """``ops/matmul.py: expert_linear`` after ``act_quant``: weight [experts, out, in or in / 2], offsets [experts + 1] int32.

    The grid is the largest number of tiles that any distribution of rows over experts needs, so nothing is read back from the device.
    """
    rows, k = codes.shape
    experts, n = weight.shape[:2]
    y = torch.empty((rows, n), dtype=torch.bfloat16, device=codes.device)
    ends = torch.cat([offsets, offsets.new_full((1,), rows)])
    options = launch.options(f"{'fp4' if fp4 else 'fp8'}_experts_{'decode' if rows <= DECODE_TOKENS * experts else 'prefill'}", codes)
    tiles = min(rows, experts + 1 + rows // options["BLOCK_T"])
    scaled_matmul_kernel[(triton.cdiv(n, options["BLOCK_N"]), tiles)](
        codes, scales, weight, weight_scale, y, ends, rows, n, k,
        EXPERTS=experts, SLOTS=triton.next_power_of_2(experts + 2), FP4=fp4, MMA=mma_of(launch.architecture(str(codes.device)), fp4=fp4), **options,
    )  # fmt: skip
    return y


def _specs(name: str, *, fp4: bool, experts: int) -> KernelSpec:
    families = {80: "HMMA", 89: "QMMA", 90: "QGMMA", 100: "UTC.*MMA", 120: "QMMA|OMMA"}
    if fp4:
        families |= {89: "HMMA", 90: "HGMMA"}

    def work(c: dict[str, object]) -> Work:
        n, t, k = int(c["BLOCK_N"]), int(c["BLOCK_T"]), 128  # type: ignore[call-overload]
        weight = n * k / 2 + n * k / 32 if fp4 else n * k + 1
        # A decode tile's activations come from the second-level cache; a prefill tile's weights and activations are shared by the tiles of a wave.
        share = 1.0 if t <= DECODE_TOKENS else 1 / 8
        return Work(bytes=weight * share, flops=2.0 * n * t * k, rate="bf16" if c["MMA"] == "bf16" else "fp8")

    return KernelSpec(
        name=name,
        kernel=scaled_matmul_kernel,
        signature={"x": "*u8", "xs": "*u8", "w": "*u8", "ws": "*u8", "y": "*bf16", "offsets": "*i32", "rows": "i32", "N": "i32:16", "K": "i32:16"},
        variants={"flash": {"EXPERTS": experts, "SLOTS": 512 if experts else 1, "FP4": fp4}},
        per_arch=lambda arch: {"MMA": mma_of(arch, fp4=fp4)},
        mma=families,
        work=work,
    )


SPECS = tuple(
    _specs(f"{base}_{phase}", fp4=base.startswith("fp4"), experts=256 if "experts" in base else 0)
    for base in ("linear", "fp4_linear", "fp8_experts", "fp4_experts")
    for phase in ("decode", "prefill")
)
