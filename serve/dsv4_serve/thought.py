"""How long a model may think: after so many tokens its thought is ended for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_core.graph.sampling import packed_bits

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.graph.sampling import Constraint

_EVER = 1 << 31


class Thought:
    """Up to ``budget`` tokens and the end of the thought, then what ``after`` allows.
    ``asked``: of which another rank makes it.
    """

    asked: Any = None

    def __init__(self, budget: int, ending: int, vocab_size: int, after: Constraint | None) -> None:
        """``ending``: the id that ends a thought. ``after`` hears of the thought's tokens too."""
        self._left, self._ending, self._after = budget, ending, after
        self._end_now = packed_bits([ending], vocab_size)
        self._over = False

    def free(self) -> int:
        """How many of the next tokens may be any."""
        if self._after is not None:
            return 0 if self._over else min(self._left, self._after.free())
        return _EVER if self._over else self._left

    def allowed(self) -> Host:
        """Bits of the ids that may come next."""
        if not self._over and not self._left:
            return self._end_now
        assert self._after is not None, "what may be any is not asked for"
        return self._after.allowed()

    def accept(self, token: int) -> None:
        """Note that the token was chosen."""
        self._over |= token == self._ending
        self._left -= not self._over
        if self._after is not None:
            self._after.accept(token)
