"""Rotary embedding on the last channels of each head, in interleaved pairs, forwards and back."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Turned, waiting
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv, next_power_of_2


@triton.jit
def turn(x, positions, freqs, token, HALF: tl.constexpr, INVERSE: tl.constexpr):
    """Interleaved pairs of heads [heads, 2 HALF] of one token, rotated by its position; float32."""
    angle = tl.load(positions + token).to(tl.float32) * tl.load(freqs + tl.arange(0, HALF))
    if INVERSE:
        angle = -angle
    cosine, sine = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    a, b = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], HALF, 2)))
    return tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), (x.shape[0], 2 * HALF))


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
    at = row[:, None] + (DIM - 2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    out = turn(tl.load(x + at, mask=present, other=0.0), positions, freqs, token, HALF, INVERSE)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=present)


def apply_rope(x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor, *, inverse: bool) -> torch.Tensor:
    """``ops/norm.py: apply_rope`` for contiguous ``x`` [tokens, heads, dim]; the number of pairs is a power of two; for its reader to make, where that is
    ``hadamard``.
    """
    y = torch.empty_like(x)
    return waiting(y, Turned(y, _turn, x, positions, freqs, inverse))


def _turn(of: Turned) -> None:
    (tokens, heads, dim), options = of.x.shape, launch.options("rope", of.x)
    rope_kernel[(tokens, cdiv(heads, options["HEADS"]))](
        of.x, of.positions, of.freqs, of.room, heads, DIM=dim, BLOCK=next_power_of_2(dim), HALF=of.freqs.shape[0], INVERSE=of.inverse, **options
    )


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
