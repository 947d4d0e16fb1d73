"""A cache in pages, for an engine that hands out pages itself and lets sequences share them, as
vLLM's does.

A page holds what ``page`` tokens leave: their compressed rows and keys, and the last window rows
and open windows among them. So a sequence can go on at the end of any page, whoever filled it.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.graph.cache import Cache, CacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Host


class Pages(Cache):
    """``pages`` pages of ``page`` tokens. A step's sequences are rows of ``tables``, which say for
    each of their pages which one it is: [sequences, pages of a sequence].

    Compressed rows are read whole, not pick by pick: a pick counts from one offset.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        *,
        sequences: int,
        capacity: int,
        page: int,
        pages: int,
        rewindable: int = 0,
    ) -> None:
        """Allocate; raise ``CacheError`` where a window would lie across pages."""
        whole = lcm(*(ratio for ratio in config.compress_ratios if ratio))
        if page < 1 or page % whole:
            raise CacheError(f"pages of {page} tokens: this model compresses {whole} at most; give a multiple of it")
        self.page, self.pages = page, pages
        self.tables = np.zeros((sequences, -(-capacity // page)), np.int64)
        super().__init__(backend, config, sequences, capacity, rewindable)

    def place(self, tables: Host, lengths: Sequence[int] | Host) -> None:
        """Say where the next step's sequences 0 .. n - 1 lie, and how many tokens each holds:
        ``tables`` [n, ...].
        """
        width = min(self.tables.shape[1], tables.shape[1])
        self.tables[: len(tables), :width] = tables[:, :width]
        self.lengths[: len(tables)] = lengths

    @property
    def ring_rows(self) -> int:
        """Window rows of a page."""
        return min(self.page, super().ring_rows)

    def compressed_rows(self, ratio: int) -> int:
        """Compressed rows of a page."""
        return self.page // ratio

    def state_rows(self, ratio: int) -> int:
        """Tokens of a page's open windows."""
        return min(self.page, super().state_rows(ratio))

    @property
    def parts(self) -> int:
        """A part is a page."""
        return self.pages

    @property
    def in_one_part(self) -> bool:
        """Not more than a page of it."""
        return False

    def at(self, sequences: Host, number: Host, rows: int, *, tokens: int) -> Host:
        """As ``Cache.at``: by the sequence's table. What lies behind it is masked and may be any
        row.
        """
        page, within = np.divmod(number, self.page // tokens)
        return self.tables[sequences, np.minimum(page, self.tables.shape[1] - 1)] * rows + within % rows

    def stays(self, position: Host, ends: Host, rows: int) -> Host:
        """As ``Cache.stays``: at the end of each page, too."""
        return super().stays(position, ends, rows) | (position % self.page >= self.page - rows) & (position >= 0)
