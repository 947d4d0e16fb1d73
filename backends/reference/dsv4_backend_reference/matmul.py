"""Linear layers in NumPy: exact dequantisation, then BLAS.

Codes times power-of-two scales are exact in float32, so multiplying dequantised operands computes
what the contract says.
"""

from __future__ import annotations

import numpy as np

from dsv4_backend_reference.quant import ReferenceQuant
from dsv4_core.contract.dtypes import FP8_BLOCK, Experts, Host, ScaledArray, format_of
from dsv4_core.contract.ops.matmul import MatmulOps

TILE = (
    1 << 18
)  # elements of a weight dequantised at a time where it is not kept: 1 MB, which stays in cache and in the allocator


class ReferenceMatmul(ReferenceQuant, MatmulOps):
    """Contracts of ``ops/matmul.py``."""

    def linear(self, x: Host, weight: Host | ScaledArray, *, out_dtype: str) -> Host:
        wide = self.quantised_activation(x, weight.format) if isinstance(weight, ScaledArray) else self.widen(x)
        return self.round_to(self.times(wide, weight), out_dtype)

    def grouped_linear(self, x: Host, weight: Host | ScaledArray) -> Host:
        groups, (out, _) = x.shape[1], weight.shape
        rows = out // groups
        wide = self.widen(x)
        y = np.empty((x.shape[0], out), self.wide_type)
        matrix = self.matrix(weight)
        for g in range(groups):  # one product per o_group: 8 or 16
            part = slice(g * rows, (g + 1) * rows)
            y[:, part] = self.dot(wide[:, g], (self.widened_rows(weight, part) if matrix is None else matrix[part]).T)
        return self.rounded(y)

    def expert_linear(self, x: Host, weight: Experts, offsets: Host) -> Host:
        fmt = format_of(weight.dtype)
        wide = self.quantised_activation(x, fmt) if fmt else self.widen(x)
        y = np.zeros((x.shape[0], weight.shape[1]), self.wide_type)
        for e in np.flatnonzero(np.diff(offsets)):
            part = slice(offsets[e], offsets[e + 1])
            y[part] = self.times(wide[part], weight[int(e)])
        return self.rounded(y)

    def times(self, x: Host, weight: Host | ScaledArray) -> Host:
        """``x @ weight.T``, wide; a weight that is not kept dequantised is taken tile by tile of
        its rows.
        """
        if (matrix := self.matrix(weight)) is not None:
            return self.dot(x, matrix.T)
        out, cols = weight.shape
        step = max(FP8_BLOCK, TILE // cols // FP8_BLOCK * FP8_BLOCK)
        y = np.empty((x.shape[0], out), self.wide_type)
        for row in range(0, out, step):
            part = slice(row, min(row + step, out))
            y[:, part] = self.dot(x, self.widened_rows(weight, part).T)
        return y

    def matrix(self, weight: Host | ScaledArray) -> Host | None:
        """The whole weight, wide: itself where it is so already, else from the weight cache; None
        where that cannot hold it.
        """
        if not isinstance(weight, ScaledArray) and weight.dtype == self.wide_type:
            return weight
        out, cols = weight.shape
        return self.weights.get(
            weight, out * cols * self.wide_type.itemsize, lambda: self.widened_rows(weight, slice(0, out))
        )

    def widened_rows(self, weight: Host | ScaledArray, rows: slice) -> Host:
        """Rows of a weight, dequantised; ``rows`` begins on a block where blocks of an FP8 weight
        are 128 rows high.
        """
        if not isinstance(weight, ScaledArray):
            return self.widen(weight[rows])
        return weight.rows(rows.start, rows.stop).dequantise(self.wide_dtype)
