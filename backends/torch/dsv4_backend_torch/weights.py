"""Weights on the device: stacks of experts, and dequantised or repacked matrices kept up to a
number of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from dsv4_core.contract.dtypes import Experts, ScaledArray

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class WeightCache:
    """Maps weights, by identity, to a matrix made of them; least recently used first out.
    ``nbytes`` never exceeds ``capacity``.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self.entries: OrderedDict[tuple[Any, ...], tuple[Any, Tensor, int]] = (
            OrderedDict()
        )  # weights are held too, so that their ids stay theirs

    def find(self, key: tuple[Any, ...]) -> Tensor | None:
        """Give what is kept under a key: a kind, then the weights' ids."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        self.entries.move_to_end(key)
        return entry[1]

    def keep(
        self, key: tuple[Any, ...], weights: tuple[Any, ...], size: int, make: Callable[[], Tensor]
    ) -> Tensor | None:
        """Make and keep a matrix of ``size`` bytes; None where it can never fit."""
        if size > self.capacity:
            return None
        while self.nbytes + size > self.capacity:
            self.nbytes -= self.entries.popitem(last=False)[1][2]
        matrix = make()
        self.entries[key] = (weights, matrix, size)
        self.nbytes += size
        return matrix


class StackedExperts(Experts):
    """Routed experts whose codes and scales lie in one tensor each, [experts, ...]: what a grouped
    kernel reads. Items are views.
    """

    def __init__(self, stack: ScaledArray | Tensor) -> None:
        super().__init__([stack[e] for e in range(stack.shape[0])])
        self.stack = stack
