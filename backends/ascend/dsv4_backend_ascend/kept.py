"""What an op leaves for the ops after it: results for the same operands, and tensors that never
change.

A decode step asks many layers the same of the same indices. What is made of them is made once:
fewer launches.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

RESULTS = 8  # of operands as large as activations: what a block quantises
OF_INDICES = 64  # of indices and positions: those of a step, for each compress ratio
FIXED_BYTES, FIXED = 1 << 20, 1024  # the largest tensor that is kept for good, and how many


class Kept:
    """Results of one backend. Tensors are compared as objects, and held, so that they stay
    those.
    """

    def __init__(self) -> None:
        self.results: list[tuple[tuple[Any, ...], Any]] = []
        self.of_indices: list[tuple[tuple[Any, ...], Any]] = []
        self.fixed: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` gives for operands of any size, while few others came after them."""
        return _once(self.results, key, make, RESULTS)

    def result(self, key: tuple[Any, ...]) -> Any:
        """What ``once`` was given for a key; None where it was not, or too long ago."""
        return _find(self.results, key)

    def of(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` gives for indices or positions, which no op changes."""
        return _once(self.of_indices, key, make, OF_INDICES)

    def known(self, key: tuple[Any, ...]) -> Any:
        """What ``of`` was given for a key; None where it was not."""
        return _find(self.of_indices, key)

    def always(self, key: Hashable, held: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor that depends on shapes and on a weight alone; ``held`` is the weight, whose id
        may stand in ``key``.

        It outlives a step and is not forgotten, so that recorded steps may read it. Made anew each
        time where it is large.
        """
        if key in self.fixed:
            self.fixed.move_to_end(key)
            return self.fixed[key][1]  # type: ignore[no-any-return]
        made = make()
        if made.numel() * made.element_size() <= FIXED_BYTES:
            self.fixed[key] = (held, made)
            if len(self.fixed) > FIXED:
                self.fixed.popitem(last=False)
        return made

    def forget(self) -> None:
        """Drop what was made of a step's operands."""
        self.results, self.of_indices = [], []


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) else bool(a == b)


def _find(kept: list[tuple[tuple[Any, ...], Any]], key: tuple[Any, ...]) -> Any:
    for known, value in reversed(kept):
        if len(known) == len(key) and all(map(_same, known, key)):
            return value
    return None


def _once(kept: list[tuple[tuple[Any, ...], Any]], key: tuple[Any, ...], make: Callable[[], Any], most: int) -> Any:
    if (value := _find(kept, key)) is None:
        value = make()
        kept.append((key, value))
        if len(kept) > most:
            del kept[0]
    return value
