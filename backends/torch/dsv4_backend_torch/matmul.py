"""Linear layers: exact dequantisation, then the library's GEMM with float32 sums.

E4M3 and E2M1 codes times power-of-two scales are exact in BF16, so in native mode a BF16 product of
dequantised operands is what the contract says. On a CPU oneDNN is called through the op that
torch's own compiler uses: it reads a weight in the blocked layout that it prefers, at one and a
half times the speed of ``linear`` for a single row in BF16, and twice in float32 without AVX-512.
Where a torch lacks the op, ``linear`` is used. A few rows are left to ``c/gemv.c`` where that is
built.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dsv4_backend_torch.quant import TorchQuant
from dsv4_backend_torch.weights import StackedExperts, WeightCache
from dsv4_core.contract.dtypes import FP8_BLOCK, Experts, ScaledArray, format_of
from dsv4_core.contract.ops.matmul import MatmulOps

if TYPE_CHECKING:
    from collections.abc import Sequence

Weight = Tensor | ScaledArray
TILE = 1 << 22  # elements of a weight that are dequantised at a time when it is not kept: 8 MB in BF16
NARROW = 128  # outputs below which oneDNN's cost of a call (14 us against 3) outweighs its speed
FEW = 16  # tokens of a decode step: up to here the number of calls counts, not their size
LEAST_SCALE = (
    48  # E8M0: times E4M3's least 2^-9 and an activation's least 2^-31, still 2^7 above the least normal number
)
GATHERED = 1 << 28  # elements of expert weights that are gathered at a time for a few rows on a device: 512 MB in BF16

_PACKED = {torch.bfloat16: "onednn bfloat16", torch.float32: "onednn float32"}  # kinds of weight cache entries


class TorchMatmul(TorchQuant, MatmulOps):
    """Contracts of ``ops/matmul.py``. ``product`` is what a vendor's GEMM replaces."""

    weights: WeightCache
    _well_scaled: dict[int, tuple[ScaledArray, bool]]  # weights are held too, so that their ids stay theirs

    def linear(self, x: Tensor, weight: Weight, *, out_dtype: str) -> Tensor:
        if isinstance(weight, ScaledArray):
            x = self.quantised_activation(x, weight.format)
        return self.product(x, (weight,), wide=out_dtype == self.wide_dtype)

    def grouped_linear(self, x: Tensor, weight: Weight) -> Tensor:
        tokens, groups, cols = x.shape
        out = weight.shape[0]
        if self.compiled and (few := self.compiled.grouped(x, weight, self.act_type)) is not None:
            return few
        dtype = self.operand_type(x, weight)
        matrix = self.matrix((weight,), dtype)
        if matrix is None:
            matrix = self.widened(weight, dtype)
        blocks = matrix.reshape(groups, out // groups, cols)
        if self.on_cpu and tokens == 1 and dtype == torch.bfloat16:  # oneDNN prefers the weight on the left
            return self.rounded(torch.bmm(blocks, x.to(dtype).reshape(groups, cols, 1)).reshape(1, out))
        y = torch.bmm(x.to(dtype).transpose(0, 1), blocks.transpose(1, 2))
        return self.rounded(y.transpose(0, 1).reshape(tokens, out))

    def expert_linear(self, x: Tensor, weight: Experts, offsets: Tensor) -> Tensor:
        if fmt := format_of(weight.dtype):
            x = self.quantised_activation(x, fmt)
        if (
            not self.on_cpu
            and isinstance(weight, StackedExperts)
            and x.shape[0] * weight.shape[1] * weight.shape[2] <= GATHERED
        ):
            return self.gathered_experts(x, weight.stack, offsets)
        y = x.new_zeros((x.shape[0], weight.shape[1]), dtype=self.act_type)
        bounds = offsets.tolist()  # on a device: a synchronisation, in prefill only
        for e in range(weight.shape[0]):
            if bounds[e] < bounds[e + 1]:
                y[bounds[e] : bounds[e + 1]] = self.product(x[bounds[e] : bounds[e + 1]], (weight[e],), wide=False)
        return y

    def gathered_experts(self, x: Tensor, stack: Weight, offsets: Tensor) -> Tensor:
        """Each row's expert is gathered, so that no offset is read on the host: decode on a
        device.
        """
        experts = stack.shape[0]
        row = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
        expert = expert_of_rows(row, offsets, experts)
        x = x.to(self.operand_type(x, stack))
        if isinstance(stack, ScaledArray):
            codes, scale = stack.data.index_select(0, expert), stack.scale.index_select(0, expert)
            picked = self.dequantise(ScaledArray(codes, scale, stack.format), x.dtype)
        else:
            picked = stack.index_select(0, expert).to(x.dtype)
        y = torch.bmm(picked, x[:, :, None])[:, :, 0]
        return self.rounded(
            torch.where((row < offsets[-1])[:, None], y, torch.zeros((), dtype=y.dtype, device=y.device))
        )

    def product(self, x: Tensor, weights: tuple[Weight, ...], *, wide: bool) -> Tensor:
        """``x @ concat(weights).T`` with wide sums, in the wide or the activation dtype."""
        if (few := self.few_rows([(x, weights)], wide=wide)) is not None:
            return few
        dtype = self.wide_type if wide else self.operand_type(x, weights[0])
        if x.dtype != dtype:
            x = x.to(dtype)
        if len(weights) == 1 and x.shape[0] <= FEW and dtype not in self.one_dnn and weights[0].dtype == dtype:
            y = functional.linear(x, weights[0])  # as it is: no second copy of it
        elif (packed := self.packed(weights, dtype)) is not None:
            y = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")  # noqa: SLF001  what torch.compile calls
        elif x.shape[0] <= FEW and all(isinstance(w, Tensor) and w.dtype == dtype for w in weights):
            y = torch.cat([functional.linear(x, w) for w in weights], 1)
        elif (matrix := self.matrix(weights, dtype)) is not None:
            y = functional.linear(x, matrix)
        else:
            y = torch.cat([self.tiled(x, weight, dtype) for weight in weights], 1)
        return y if wide or y.dtype == self.act_type else self.rounded(y)

    def few_rows(self, products: Sequence[tuple[Tensor, tuple[Weight, ...]]], *, wide: bool = False) -> Tensor | None:
        """``x @ concat(weights).T`` of each pair, one below the other, by one call of ``c/gemv.c``;
        None where that is not for them.
        """
        return self.compiled.products(products, self.wide_type if wide else self.act_type) if self.compiled else None

    def operand_type(self, x: Tensor, weight: Weight) -> torch.dtype:
        """The dtype of a product's operands: BF16 where both are exact in it, and where the library
        then sums in float32.
        """
        dtype = weight.dtype if isinstance(weight, Tensor) else x.dtype if self.well_scaled(weight) else self.wide_type
        if dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, dtype)
        return self.wide_type if dtype == torch.bfloat16 and not self.bf16_products else dtype

    def well_scaled(self, weight: ScaledArray) -> bool:
        """Say whether BF16 products can take a weight's values: BF16 instructions flush subnormal
        operands and sums. Noted at loading on a device; else read once a weight, when first used.
        """
        if weight.format == "int8":  # a scale of 8 bits times a code of 7
            return False
        if (known := self._well_scaled.get(id(weight))) is None:
            self._well_scaled[id(weight)] = known = (
                weight,
                bool(weight.scale.numel() == 0 or weight.scale.min() >= LEAST_SCALE),
            )
        return known[1]

    def note_scales(self, weight: ScaledArray, least: int) -> None:
        """Keep what ``well_scaled`` will say of a weight whose least E8M0 byte is known: reading it
        back would stop the device.
        """
        self._well_scaled[id(weight)] = (weight, least >= LEAST_SCALE)

    def tiled(self, x: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
        """A product with a weight that is not kept: it is dequantised tile by tile of its rows."""
        out, cols = weight.shape
        step = max(FP8_BLOCK, TILE // cols // FP8_BLOCK * FP8_BLOCK)
        y = x.new_empty((x.shape[0], out))
        for row in range(0, out, step):
            part = slice(row, min(row + step, out))
            tile = weight.rows(part.start, part.stop) if isinstance(weight, ScaledArray) else weight[part]
            y[:, part] = functional.linear(x, self.widened(tile, dtype))
        return y

    def widened(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """A whole weight in ``dtype``, dequantised if need be."""
        return self.dequantise(weight, dtype) if isinstance(weight, ScaledArray) else weight.to(dtype)

    def matrix(self, weights: tuple[Weight, ...], dtype: torch.dtype) -> Tensor | None:
        """Weights one above the other in ``dtype``: the weight itself, or kept in the weight cache;
        None where that cannot hold it.
        """
        if len(weights) == 1 and not isinstance(weights[0], ScaledArray) and weights[0].dtype == dtype:
            return weights[0]
        key = (dtype, *map(id, weights))
        found = self.weights.find(key)
        return (
            self.weights.keep(key, weights, self.size(weights, dtype), lambda: self.stacked(weights, dtype))
            if found is None
            else found
        )

    def packed(self, weights: tuple[Weight, ...], dtype: torch.dtype) -> Tensor | None:
        """Weights one above the other in oneDNN's layout; None where the device, the dtype or the
        weight cache does not allow it.
        """
        if dtype not in self.one_dnn or weights[0].shape[0] < NARROW:
            return None
        key = (_PACKED[dtype], *map(id, weights))
        if (found := self.weights.find(key)) is not None:
            return found
        reorder = torch.ops.mkldnn._reorder_linear_weight  # noqa: SLF001
        return self.weights.keep(
            key, weights, self.size(weights, dtype), lambda: reorder(self.stacked(weights, dtype), 1)
        )

    def stacked(self, weights: tuple[Weight, ...], dtype: torch.dtype) -> Tensor:
        """Weights one above the other in ``dtype``."""
        parts = [self.widened(weight, dtype) for weight in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def size(weights: tuple[Weight, ...], dtype: torch.dtype) -> int:
        """Bytes of weights in ``dtype``."""
        return sum(w.shape[0] * w.shape[1] for w in weights) * dtype.itemsize

    @cached_property
    def one_dnn(self) -> tuple[torch.dtype, ...]:
        """Dtypes of oneDNN's linear layer: none but on a CPU, in a torch that was built with it.
        BF16 where the CPU has AVX-512: there a row of float32 is faster by ``linear`` (MKL), on
        weights as they are. Elsewhere float32.
        """
        built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        if not (self.on_cpu and built and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
            return ()
        return (torch.bfloat16,) if cpu_multiplies_bf16() else (torch.float32,)

    @cached_property
    def bf16_products(self) -> bool:
        """Whether BF16 operands are multiplied as such. A CPU without the instructions emulates
        them, several times slower than it multiplies float32: there operands are widened, and
        results rounded to BF16 all the same.
        """
        return not self.on_cpu or cpu_multiplies_bf16()


def expert_of_rows(row: Tensor, offsets: Tensor, experts: int) -> Tensor:
    """Expert whose rows ``offsets[e] .. offsets[e + 1] - 1`` hold each row, int32; the last for
    rows of none.

    As ``searchsorted``, by comparing and adding: searching runs on a scalar core of some devices.
    """
    return (row[:, None] >= offsets[1:]).sum(1, dtype=torch.int32).clamp_(max=experts - 1)


def cpu_multiplies_bf16() -> bool:
    """Whether oneDNN has BF16 products for this CPU: AVX-512 on x86."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())
