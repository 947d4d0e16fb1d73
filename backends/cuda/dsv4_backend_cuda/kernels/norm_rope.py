"""RMS norm of rows and RoPE on their last channels, in one launch: queries, key/value rows, compressed rows."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["rows", "heads"])
def norm_rope_kernel(
    x, weight, positions, freqs, y, rows, heads, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS whole rows, ``heads`` of them a token. What is turned is the norm's result as it would be handed on, in BF16."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    present = (row < rows)[:, None]
    PLAIN: tl.constexpr = DIM - 2 * HALF
    column = tl.arange(0, BLOCK)
    at = row[:, None] * DIM + column[None, :]
    wide = tl.load(x + at, mask=present & (column < DIM)[None, :], other=0.0).to(tl.float32)
    inverse = (1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=1) / DIM + eps))[:, None]
    wide = wide * inverse
    if WEIGHTED:
        wide = wide * tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, wide.to(y.dtype.element_ty), mask=present & (column < PLAIN)[None, :])
    turned = tl.arange(0, 2 * HALF)
    tail_at = row[:, None] * DIM + PLAIN + turned[None, :]
    tail = tl.load(x + tail_at, mask=present, other=0.0).to(tl.float32) * inverse
    if WEIGHTED:
        tail = tail * tl.load(weight + PLAIN + turned).to(tl.float32)[None, :]
    a, b = tl.split(tl.reshape(tail.to(y.dtype.element_ty).to(tl.float32), (ROWS, HALF, 2)))
    position = tl.load(positions + row // heads, mask=row < rows, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(freqs + tl.arange(0, HALF))[None, :]
    cosine, sine = tl.cos(angle), tl.sin(angle)
    out = tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), (ROWS, 2 * HALF))
    tl.store(y + tail_at, out.to(y.dtype.element_ty), mask=present)


def norm_rope(x: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor, freqs: torch.Tensor, *, eps: float) -> torch.Tensor:
    """``ops/norm.py: rms_norm_rope`` for contiguous ``x`` [tokens, heads, dim]; the number of pairs is a power of two."""
    tokens, heads, dim = x.shape
    y = torch.empty_like(x)
    rows = tokens * heads
    options = launch.options("norm_rope", x)
    norm_rope_kernel[(cdiv(rows, options["ROWS"]),)](
        x, x if weight is None else weight, positions, freqs, y, rows, heads, eps,
        DIM=dim, BLOCK=next_power_of_2(dim), HALF=freqs.shape[0], WEIGHTED=weight is not None, **options,
    )  # fmt: skip
    return y


SPECS = (
    KernelSpec(
        name="norm_rope",
        kernel=norm_rope_kernel,
        signature={"x": "*bf16", "weight": "*bf16", "positions": "*i32", "freqs": "*fp32", "y": "*bf16", "rows": "i32", "heads": "i32", "eps": "fp32"},
        variants={
            "query": {"DIM": 512, "BLOCK": 512, "HALF": 32, "WEIGHTED": False},
            "row": {"DIM": 512, "BLOCK": 512, "HALF": 32, "WEIGHTED": True},
            "index": {"DIM": 128, "BLOCK": 128, "HALF": 32, "WEIGHTED": True},
        },
        looped=False,
        work=lambda c: Work(bytes=4.0 * c["ROWS"] * c["DIM"]),
    ),
)
