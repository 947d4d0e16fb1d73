"""Products of the routed experts' weights and of the shared expert's, which are as large, in one launch: each program computes a tile of one or of the other.

Tiles, their sums and the shared expert's pieces are those of ``scaled_matmul`` and ``fp4_matmul``, and so are all bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels import scaled_matmul
from dsv4_backend_cuda.kernels.fp4_matmul import fp4_tile
from dsv4_backend_cuda.kernels.scaled_matmul import Weight, scaled_tile, side_by_side
from dsv4_backend_cuda.launch import KernelSpec, cdiv, next_power_of_2


@triton.jit(do_not_specialize=["rows", "tiles", "tokens", "span"])
def moe_matmul_kernel(
    x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, tiles,
    shared_x, shared_xs, shared_w, shared_ws, shared_w2, shared_ws2, shared_y, shared_y2, tokens, span, N, stride, K,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, FP4: tl.constexpr, MMA: tl.constexpr, SHARED_MMA: tl.constexpr, TWO: tl.constexpr, TOPK: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SHARED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The first programs take the experts' ``tiles`` of rows, N outputs each; the others the shared expert's pieces, of all ``tokens``.

    TWO: of two weights, N outputs each. MMA, SHARED_MMA: the products, as in ``scaled_tile``.
    """
    program, weights = tl.program_id(0), 2 if TWO else 1
    across = tl.cdiv(N, BLOCK_N) * weights
    routed = tiles * across
    if program < routed:
        if FP4 and MMA != "scaled":
            fp4_tile(
                program % across, program // across, 0, x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N, stride, stride, K, 0,
                EXPERTS, SLOTS, MMA == "fp8", TWO, TOPK, False, BLOCK_N, BLOCK_T,
            )  # fmt: skip
        else:
            scaled_tile(
                program % across, program // across, 0, x, xs, w, ws, w2, ws2, y, y2, order, offsets, rows, N, N, stride, stride, K, 0,
                EXPERTS, SLOTS, FP4, MMA, TWO, TOPK, False, BLOCK_N, BLOCK_T,
            )  # fmt: skip
    else:
        across = tl.cdiv(N, BLOCK_SHARED) * weights
        scaled_tile(
            (program - routed) % across, 0, (program - routed) // across, shared_x, shared_xs, shared_w, shared_ws, shared_w2, shared_ws2, shared_y, shared_y2,
            order, offsets, tokens, N, N, stride, stride, K, span, 0, 1, False, SHARED_MMA, TWO, 0, SPLIT, BLOCK_SHARED, BLOCK_T,
        )  # fmt: skip


def products(
    x: Weight, weights: Sequence[Weight], offsets: torch.Tensor, shared_x: Weight, shared_weights: Sequence[Weight],
    *, fp4: bool, order: torch.Tensor | None = None, topk: int = 0, room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``scaled_matmul.expert_products``, and ``scaled_matmul.products`` (into ``room``; without one for a reader that adds up) of up to 16 tokens with as many
    FP8 weights, each of the same shape.
    """
    (codes, scales), first, last, few = x, weights[0], weights[-1], shared_x[0]
    rows, (experts, n, _), (tokens, k) = (codes if order is None else order).shape[0], first[0].shape, few.shape
    outputs, arch = n * len(weights), launch.architecture(str(codes.device))
    shared, _, span, pieces = scaled_matmul.shared_out(few, [n] * len(weights), fp4=False, split=True, reader=room is None)
    y = torch.empty((1, rows, outputs), dtype=torch.bfloat16, device=codes.device)
    shared_y = torch.empty((pieces, tokens, outputs), dtype=torch.bfloat16 if pieces == 1 else torch.float32, device=codes.device)
    if room is not None and pieces == 1:
        shared_y = room[None]
    options = launch.options(f"{'fp4' if fp4 else 'fp8'}_experts_decode", codes)
    tiles = min(rows, experts + 1 + rows // options["BLOCK_T"])
    programs = len(weights) * (tiles * cdiv(n, options["BLOCK_N"]) + pieces * cdiv(n, shared["BLOCK_N"]))
    ys, shared_ys = side_by_side(y, len(weights)), side_by_side(shared_y, len(weights))
    moe_matmul_kernel[(programs,)](
        codes, scales, *first, *last, ys[0], ys[-1], offsets if order is None else order, offsets, rows, tiles,
        *shared_x, *shared_weights[0], *shared_weights[-1], shared_ys[0], shared_ys[-1], tokens, span, n, outputs, k,
        EXPERTS=experts, SLOTS=next_power_of_2(experts + 2), FP4=fp4, MMA=scaled_matmul.mma_of(arch, fp4=fp4), SHARED_MMA=scaled_matmul.mma_of(arch, fp4=False),
        TWO=len(weights) == 2, TOPK=topk, SPLIT=pieces > 1, BLOCK_SHARED=shared["BLOCK_N"], **options,
    )  # fmt: skip
    return y[0], shared_y


def _specs() -> Iterator[KernelSpec]:
    """The experts' own, of which these launches take the tile, with the shared expert beside."""
    for spec in scaled_matmul.SPECS:
        if not spec.name.endswith("_experts_decode"):
            continue
        fp4 = spec.name.startswith("fp4")
        arrays = dict.fromkeys(("x", "xs", "w", "ws", "w2", "ws2"), "*u8")
        shape = {"EXPERTS": 256, "SLOTS": 512, "FP4": fp4, "TWO": True, "TOPK": 6, "SPLIT": True}
        yield replace(
            spec, kernel=moe_matmul_kernel,
            signature=arrays | {f"shared_{name}": kind for name, kind in arrays.items()} | dict.fromkeys(("y", "y2"), "*bf16")
            | dict.fromkeys(("order", "offsets"), "*i32") | dict.fromkeys(("rows", "tiles", "tokens", "span"), "i32")
            | dict.fromkeys(("shared_y", "shared_y2"), "*fp32") | dict.fromkeys(("N", "stride", "K"), "i32:16"),
            variants={"shared_up": shape, "shared_down": shape | {"TWO": False, "TOPK": 0}},
            per_arch=lambda arch, fp4=fp4: {
                "MMA": scaled_matmul.mma_of(arch, fp4=fp4), "SHARED_MMA": scaled_matmul.mma_of(arch, fp4=False),
                "BLOCK_SHARED": launch.config("linear_decode", arch)["BLOCK_N"],
            },
        )  # fmt: skip


SPECS = tuple(_specs())
