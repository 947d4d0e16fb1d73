"""RMS norm over rows, alone and with FP8 quantisation of the result."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import parts
from dsv4_backend_cuda.kernels.formats import quantise_e4m3
from dsv4_backend_cuda.kernels.tiles import in_order
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["rows", "pieces"])
def rms_norm_kernel(
    x, weight, y, codes, scales, rows, pieces, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, QUANTISE: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS whole rows, so a row's sum never depends on how many rows there are. ``x`` may come in ``pieces``, whose sum is rounded first."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * DIM + column[None, :]
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    wide = in_order(x, at, inside, tl.cast(rows, tl.int64) * DIM, pieces).to(y.dtype.element_ty).to(tl.float32)
    wide = wide * (1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / DIM + eps))[:, None]
    if WEIGHTED:
        wide = wide * tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    rounded = wide.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=inside)
    if QUANTISE:
        GROUPS: tl.constexpr = BLOCK // 128
        code, exponent = quantise_e4m3(tl.reshape(rounded.to(tl.float32), (ROWS, GROUPS, 128)), NATIVE)
        tl.store(codes + at, tl.reshape(code, (ROWS, BLOCK)), mask=inside)
        group = tl.arange(0, GROUPS)
        tl.store(
            scales + row[:, None] * (DIM // 128) + group[None, :],
            exponent.to(tl.uint8),
            mask=(row < rows)[:, None] & (group < DIM // 128)[None, :],
        )


def _launch(x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, quantise: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, dim = x.shape
    x, y = parts(x), torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    codes = torch.empty((rows, dim) if quantise else (0,), dtype=torch.uint8, device=x.device)
    scales = torch.empty((rows, dim // 128) if quantise else (0,), dtype=torch.uint8, device=x.device)
    options = launch.options("rms_norm", x)
    rms_norm_kernel[(cdiv(rows, options["ROWS"]),)](
        x, x if weight is None else weight, y, codes, scales, rows, x.shape[0], eps, DIM=dim, BLOCK=max(128, next_power_of_2(dim)),
        WEIGHTED=weight is not None, QUANTISE=quantise, NATIVE=launch.native_fp8(x), **options,
    )  # fmt: skip
    return y, codes, scales


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, *, eps: float) -> torch.Tensor:
    """``ops/norm.py: rms_norm`` for ``x`` [tokens, dim]."""
    return _launch(x, weight, eps, quantise=False)[0]


def rms_norm_quant(x: torch.Tensor, weight: torch.Tensor | None, *, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rms_norm``, with ``act_quant`` (block 128) of its result: y, codes, scale bytes. ``dim`` is a multiple of 128."""
    return _launch(x, weight, eps, quantise=True)


SPECS = (
    KernelSpec(
        name="rms_norm",
        kernel=rms_norm_kernel,
        signature={"x": "*bf16", "weight": "*bf16", "y": "*bf16", "codes": "*u8", "scales": "*u8", "rows": "i32", "pieces": "i32", "eps": "fp32"},
        variants={
            "flash": {"DIM": 4096, "BLOCK": 4096, "WEIGHTED": True, "QUANTISE": True},
            "pro": {"DIM": 7168, "BLOCK": 8192, "WEIGHTED": True, "QUANTISE": True},
            "query": {"DIM": 512, "BLOCK": 512, "WEIGHTED": False, "QUANTISE": False},
        },
        per_arch=lambda arch: {"NATIVE": arch >= 89},
        looped=False,
        work=lambda c: Work(bytes=c["ROWS"] * c["DIM"] * (5 if c["QUANTISE"] else 4)),
    ),
)
