"""Dequantised weights, kept up to a number of bytes, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsv4_core.contract.dtypes import Host


class WeightCache:
    """Maps a weight, by identity, to its wide matrix. ``nbytes`` never exceeds ``capacity``; a
    weight that is larger alone is not kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self.entries: OrderedDict[int, tuple[Any, Host]] = (
            OrderedDict()
        )  # the weight is held too, so that its id stays its own

    def get(self, weight: Any, size: int, make: Callable[[], Host]) -> Host | None:
        """Give ``weight``'s matrix of ``size`` bytes, making it if need be; None where it can never
        fit.
        """
        if size > self.capacity:
            return None
        if (entry := self.entries.get(id(weight))) is not None:
            self.entries.move_to_end(id(weight))
            return entry[1]
        while self.nbytes + size > self.capacity:
            _, (_, dropped) = self.entries.popitem(last=False)
            self.nbytes -= dropped.nbytes
        matrix = make()
        self.entries[id(weight)] = (weight, matrix)
        self.nbytes += matrix.nbytes
        return matrix
