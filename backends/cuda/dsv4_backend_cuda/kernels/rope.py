"""Rotary embedding on the last channels of each head, in interleaved pairs, forwards and back."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["heads"])
def rope_kernel(
    x, positions, freqs, y, heads,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program takes HEADS heads of one token: copies the plain channels, rotates the others."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row = (token * heads + head) * DIM
    present = (head < heads)[:, None]
    column = tl.arange(0, BLOCK)
    plain = present & (column < DIM - 2 * HALF)[None, :]
    tl.store(y + row[:, None] + column[None, :], tl.load(x + row[:, None] + column[None, :], mask=plain), mask=plain)
    pair = tl.arange(0, HALF)
    angle = tl.load(positions + token).to(tl.float32) * tl.load(freqs + pair)
    if INVERSE:
        angle = -angle
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    turned = tl.arange(0, 2 * HALF)
    at = row[:, None] + (DIM - 2 * HALF) + turned[None, :]
    a, b = tl.split(tl.reshape(tl.load(x + at, mask=present, other=0.0).to(tl.float32), (HEADS, HALF, 2)))
    out = tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), (HEADS, 2 * HALF))
    tl.store(y + at, out.to(y.dtype.element_ty), mask=present)


def apply_rope(x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    """``ops/norm.py: apply_rope`` for contiguous ``x`` [tokens, heads, dim]; the number of pairs is a power of two."""
    tokens, heads, dim = x.shape
    y = torch.empty_like(x)
    options = launch.options("rope", x)
    rope_kernel[(tokens, cdiv(heads, options["HEADS"]))](
        x, positions, freqs, y, heads, DIM=dim, BLOCK=next_power_of_2(dim), HALF=freqs.shape[0], INVERSE=inverse, **options
    )
    return y


SPECS = (
    KernelSpec(
        name="rope",
        kernel=rope_kernel,
        signature={"x": "*bf16", "positions": "*i32", "freqs": "*fp32", "y": "*bf16", "heads": "i32"},
        variants={"query": {"DIM": 512, "BLOCK": 512, "HALF": 32, "INVERSE": False}, "output": {"DIM": 512, "BLOCK": 512, "HALF": 32, "INVERSE": True}},
        looped=False,
        work=lambda c: Work(bytes=4.0 * c["HEADS"] * c["DIM"]),
    ),
)
