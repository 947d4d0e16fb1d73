"""FP8 and BF16 products of one input in one launch: each program computes a tile of one or of the other.

Tiles, their sums and their pieces are those of ``scaled_matmul`` and ``dense_matmul``, and so are all bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from dsv4_backend_cuda import launch
from dsv4_backend_cuda.kernels import dense_matmul, scaled_matmul
from dsv4_backend_cuda.kernels.add_pieces import in_pieces
from dsv4_backend_cuda.kernels.dense_matmul import columns, dense_tile, filled
from dsv4_backend_cuda.kernels.scaled_matmul import Weight, scaled_tile
from dsv4_backend_cuda.launch import KernelSpec, cdiv


@triton.jit(do_not_specialize=["rows", "tiles", "pieces", "span", "scaled_tiles", "scaled_span"])
def input_matmul_kernel(
    codes, scales, scaled_w, scaled_ws, scaled_w2, scaled_ws2, scaled_y, scaled_y2, scaled_N, scaled_N2, scaled_stride, scaled_stride2,
    scaled_tiles, scaled_span,
    x, w, w2, w3, w4, w5, y, y2, y3, y4, y5, N, N2, N3, N4, N5, stride, stride2, stride3, stride4, stride5, tiles, pieces, span, rows, K,
    MMA: tl.constexpr, TWO: tl.constexpr, SCALED_SPLIT: tl.constexpr, BLOCK_SCALED: tl.constexpr,
    WEIGHTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The first programs take ``pieces`` of ``tiles`` of so many BF16 WEIGHTS, the others those of ``scaled_tiles`` of one FP8 weight or (TWO) of two."""
    program = tl.program_id(0)
    plain = tiles * pieces
    if program < plain:
        dense_tile(
            program % tiles, 0, 0, program // tiles, x, w, w2, w3, w4, w5, scales, y, y2, y3, y4, y5, rows, N, N2, N3, N4, N5,
            stride, stride2, stride3, stride4, stride5, K, span, 1, False, WEIGHTS, SPLIT, BLOCK_N, BLOCK_T, WORDS,
        )  # fmt: skip
    else:
        program -= plain
        scaled_tile(
            program % scaled_tiles, 0, program // scaled_tiles, codes, scales, scaled_w, scaled_ws, scaled_w2, scaled_ws2, scaled_y, scaled_y2, scales, scales,
            rows, scaled_N, scaled_N2, scaled_stride, scaled_stride2, K, scaled_span, 0, 1, False, MMA, TWO, 0, SCALED_SPLIT, BLOCK_SCALED, BLOCK_T,
        )  # fmt: skip


def together(
    quantised: Weight, scaled: Sequence[Weight], scaled_rooms: Sequence[torch.Tensor],
    x: torch.Tensor, plain: Sequence[Sequence[torch.Tensor]], rooms: Sequence[torch.Tensor],
) -> list[torch.Tensor]:  # fmt: skip
    """``scaled_matmul.together`` and ``dense_matmul.together`` of one input, codes and rows, of up to 16 tokens."""
    codes, scales = quantised
    outputs, weights = [w[0].shape[0] for w in scaled], [w for pair in plain for w in pair]
    scaled_options, _, scaled_span, scaled_pieces = scaled_matmul.shared_out(codes, outputs, fp4=False, split=True)
    options, span, pieces = dense_matmul.shared_out("bf16_linear", x, [w.shape[0] for w in weights], split=True)
    scaled_ys, ys = in_pieces(scaled_rooms, scaled_pieces), in_pieces(rooms, pieces)
    scaled_tiles, tiles = sum(cdiv(n, scaled_options["BLOCK_N"]) for n in outputs), sum(cdiv(w.shape[0], options["BLOCK_N"]) for w in weights)
    parts = columns(plain, ys)
    input_matmul_kernel[(scaled_tiles * scaled_pieces + tiles * pieces,)](
        codes, scales, *scaled[0], *scaled[-1], scaled_ys[0], scaled_ys[-1], outputs[0], outputs[-1], scaled_ys[0].stride(1), scaled_ys[-1].stride(1),
        scaled_tiles, scaled_span,
        x, *filled(weights), *filled(parts), *filled([w.shape[0] for w in weights]), *filled([y.stride(1) for y in parts]), tiles, pieces, span, *x.shape,
        MMA=scaled_matmul.mma_of(launch.architecture(str(x.device)), fp4=False), TWO=len(scaled) == 2, SCALED_SPLIT=scaled_pieces > 1,
        BLOCK_SCALED=scaled_options["BLOCK_N"], WEIGHTS=len(weights), SPLIT=pieces > 1, **options,
    )  # fmt: skip
    return [*scaled_ys, *ys]


def _specs() -> Iterator[KernelSpec]:
    """The BF16 products' own, of which these launches take the tile, with FP8 products beside."""
    spec = next(s for s in dense_matmul.SPECS if s.name == "bf16_linear_decode")
    scaled = dict.fromkeys(("codes", "scales", "scaled_w", "scaled_ws", "scaled_w2", "scaled_ws2"), "*u8")
    own = {name: kind for name, kind in spec.signature.items() if name != "ws"}
    yield replace(
        spec, kernel=input_matmul_kernel,
        signature=own | scaled | dict.fromkeys(("scaled_y", "scaled_y2"), "*fp32")
        | dict.fromkeys(("scaled_tiles", "scaled_span", "tiles", "pieces"), "i32")
        | dict.fromkeys(("scaled_N", "scaled_N2", "scaled_stride", "scaled_stride2"), "i32:16"),
        variants={f"scaled_{name}": {"WEIGHTS": count, "SPLIT": True, "TWO": True, "SCALED_SPLIT": True} for name, count in (("pair", 2), ("five", 5))},
        per_arch=lambda arch: {"MMA": scaled_matmul.mma_of(arch, fp4=False), "BLOCK_SCALED": launch.config("linear_decode", arch)["BLOCK_N"]},
    )  # fmt: skip


SPECS = tuple(_specs())
