"""Second stage of a product that was split over its inputs: the pieces, in order."""

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels.tiles import in_order
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv


@triton.jit(do_not_specialize=["size", "pieces"])
def add_pieces_kernel(partial, y, size, pieces, BLOCK: tl.constexpr):
    """A program adds up BLOCK elements of all pieces, first to last, and rounds once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = in_order(partial, at, at < size, tl.cast(size, tl.int64), pieces)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < size)


def total(partial: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Sum of [pieces, rows, outputs] over the pieces; one piece is the result already."""
    pieces, rows, outputs = partial.shape
    if pieces == 1:
        return partial[0]
    y = torch.empty((rows, outputs), dtype=out_dtype, device=partial.device)
    options = launch.options("add_pieces", partial)
    add_pieces_kernel[(cdiv(y.numel(), options["BLOCK"]),)](partial, y, y.numel(), pieces, **options)
    return y


SPECS = (
    KernelSpec(
        name="add_pieces", kernel=add_pieces_kernel,
        signature={"partial": "*fp32", "y": "*bf16", "size": "i32", "pieces": "i32"},
        variants={"any": {}},
        work=lambda c: Work(bytes=4.0 * c["BLOCK"]),
    ),
)  # fmt: skip
