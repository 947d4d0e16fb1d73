"""Second stage of a product that was split over its inputs: the pieces, in order."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.carried import Sum, waiting
from dsv4_backend_cuda.kernels.tiles import in_order
from dsv4_backend_cuda.launch import KernelSpec, Work, cdiv


@triton.jit(do_not_specialize=["size", "pieces"])
def add_pieces_kernel(partial, y, size, pieces, BLOCK: tl.constexpr):
    """A program adds up BLOCK elements of all pieces, first to last, and rounds once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = in_order(partial, at, at < size, tl.cast(size, tl.int64), pieces)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < size)


def add_up(of: Sum) -> None:
    """Put the sum of [pieces, ...] over the pieces into its room."""
    of.begun()
    if not of.waits or of.pieces is None:
        return  # of one piece
    y, options = of.room, launch.options("add_pieces", of.pieces)
    add_pieces_kernel[(cdiv(y.numel(), options["BLOCK"]),)](of.pieces, y, y.numel(), of.pieces.shape[0], **options)


def in_pieces(rooms: Sequence[torch.Tensor], pieces: int) -> list[torch.Tensor]:
    """Where products of these rooms go as [pieces, tokens, outputs]: one piece into its room, several in float32 to be added up."""
    return [room[None] if pieces == 1 else torch.empty((pieces, *room.shape), dtype=torch.float32, device=room.device) for room in rooms]


def total(partial: torch.Tensor, out_dtype: torch.dtype, room: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of [pieces, rows, outputs] over the pieces, for its reader to make or to wait for, in ``room``, if given; one piece is the result already."""
    if partial.shape[0] == 1:
        return partial[0]
    y = torch.empty(partial.shape[1:], dtype=out_dtype, device=partial.device) if room is None else room
    return waiting(y, Sum(y, add_up, partial))


SPECS = (
    KernelSpec(
        name="add_pieces", kernel=add_pieces_kernel,
        signature={"partial": "*fp32", "y": "*bf16", "size": "i32", "pieces": "i32"},
        variants={"any": {}},
        work=lambda c: Work(bytes=4.0 * c["BLOCK"]),
    ),
)  # fmt: skip
