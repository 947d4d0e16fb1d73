"""Widen, compute, round once: the three steps every op is written in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_backend_reference import tiles
from dsv4_core.contract.dtypes import BFLOAT16, Host, numpy_dtype
from dsv4_core.contract.spec import Ops

if TYPE_CHECKING:
    from dsv4_backend_reference.weight_cache import WeightCache


class Numeric(Ops):
    """Conversions between an op's operands and the dtype that it computes in."""

    weights: WeightCache
    batch_invariant: bool

    @property
    def wide_type(self) -> np.dtype[Any]:
        """The dtype inside ops."""
        return numpy_dtype(self.wide_dtype)

    def widen(self, x: Host) -> Host:
        """Take an operand to the dtype inside ops; exact."""
        if x.dtype == BFLOAT16 and self.wide_dtype == "float32":
            return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)  # several times faster than the cast
        return x.astype(self.wide_type, copy=False)

    def dot(self, a: Host, b: Host) -> Host:
        """Every product that sums over an axis: ``a @ b``, wide. Order of summation is free;
        subclasses choose one, or round in between.
        """
        return tiles.product(a, b) if self.batch_invariant else a @ b

    def total(self, x: Host, axis: int) -> Host:
        """Every plain sum over an axis, which is kept with size 1."""
        return x.sum(axis, keepdims=True)

    def square_mean(self, x: Host) -> Host:
        """Mean of squares over the last axis of [t, d]: [t, 1]."""
        return np.einsum("td,td->t", x, x)[:, None] / x.dtype.type(x.shape[1])

    def round_to(self, x: Host, dtype: str) -> Host:
        """Round a result once to the dtype that the contract returns."""
        return x.astype(numpy_dtype(dtype), copy=False)

    def rounded(self, x: Host) -> Host:
        """Round a result once to the activation dtype."""
        return self.round_to(x, self.activation_dtype)
