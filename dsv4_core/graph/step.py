"""One forward step's addresses: which rows every token reads and writes, computed on the host from lengths alone.

All integer arithmetic of attention stands here, once for all backends: the graph and the ops get index arrays.
Positions are known on the host, so nothing is read back from a device; a captured graph is replayed with new index
arrays of the same shapes.

Letters: n sequences, S tokens each (padded on the right), T = n * S. A token's rows are counted in the concatenation
``[window rows before the step: n * before | this step's: T | compressed: ...]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_core.graph.cache import Cache, CacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array


@dataclass(frozen=True)
class Compression:
    """Addresses of one compress ratio. Closed: windows that end in this step, ``closing`` per sequence at most.

    ``state_read`` / ``state_write``: tokens of open windows (write: -1 for tokens too old to keep). ``window_idxs`` [n
    * closing, span]: each closing window's tokens in ``[state_read | step]``. ``row_write``, ``row_positions`` [n *
    closing]. ``bound``: compressed rows that any token may see. ``row_read`` [n * bound]. ``visible`` [n, S].
    ``row_idxs`` [T, bound]: all visible rows (ratio 128).
    """

    ratio: int
    closing: int
    bound: int
    state_read: Array
    state_write: Array
    window_idxs: Array
    row_write: Array
    row_positions: Array
    row_read: Array
    visible: Array
    row_idxs: Array | None
    picks: Picks | None


@dataclass(frozen=True)
class Picks:
    """Where the indexer's picks are read from (ratio 4).

    Gathered: each token's picks are read one by one and ``idxs`` is known beforehand; otherwise all ``bound`` rows are
    read and the picks themselves, shifted by ``offset`` [n, S], are the indices.
    """

    topk: int
    gathered: bool
    offset: Array
    idxs: Array | None


class Step:
    """A rectangle of tokens: ``ids`` [n, S] for cache rows ``sequences``, of which the first ``counts[b]`` of row b are
    real.
    """

    def __init__(
        self, cache: Cache, ids: Host, sequences: Sequence[int] | None = None, counts: Sequence[int] | None = None
    ) -> None:
        """Raise ``CacheError`` where a sequence would grow past the cache's capacity, and ``ValueError`` for ids
        outside the vocabulary.
        """
        self.cache, self.backend, self.config = cache, cache.backend, cache.config
        self.batch, self.seq = ids.shape
        self.sequences = np.arange(self.batch) if sequences is None else np.asarray(sequences, np.int64)
        self.counts = np.full(self.batch, self.seq) if counts is None else np.asarray(counts, np.int64)
        self.starts = cache.lengths[self.sequences]
        self.ends = self.starts + self.counts
        if (self.ends > cache.capacity).any():
            b = int(np.argmax(self.ends))
            raise CacheError(
                f"context too long: sequence {int(self.sequences[b])} would hold {int(self.ends[b])} tokens; the cache has "
                f"room for {cache.capacity} and the model for {self.config.max_position_embeddings}; make a larger cache or shorten the prompt"
            )
        check_ids(ids, self.config.vocab_size)
        column = np.arange(self.seq)
        self.real = column < self.counts[:, None]
        self.host_positions = np.where(self.real, self.starts[:, None] + column, -1)  # [n, S]
        self.ids = self._array(ids.reshape(-1))
        self.positions = self._array(np.maximum(self.host_positions, 0).reshape(-1))
        self.tokens = self.batch * self.seq
        self._compressions: dict[int, Compression] = {}

    def _array(self, host: Any) -> Array:
        return self.backend.from_numpy(np.ascontiguousarray(host, np.int32))

    @cached_property
    def before(self) -> int:
        """Window rows per sequence that are read back from the ring."""
        return int(min(self.config.sliding_window - 1, self.starts.max(initial=0)))

    @cached_property
    def ring_read(self) -> Array:
        """Ring slots of the ``before`` rows that precede each sequence's tokens, oldest first; -1 before its beginning:
        [n * before].
        """
        position = self.starts[:, None] + np.arange(-self.before, 0)
        return self._array(self._slots(position, self.cache.ring_rows).reshape(-1))

    @cached_property
    def ring_write(self) -> Array:
        """Ring slots of this step's rows, -1 for those that later ones of the step overwrite: [T]."""
        return self._array(self._newest(self.cache.ring_rows))

    @cached_property
    def window_idxs(self) -> Array:
        """Window rows of each token, oldest first: [T, min(W, longest)]."""
        width = int(min(self.config.sliding_window, self.ends.max(initial=1)))
        position = self.host_positions[:, :, None] + np.arange(1 - width, 1)
        absent = (position < 0) | (self.host_positions < 0)[:, :, None]
        return self._array(np.where(absent, -1, self._recent(position, self.before)).reshape(self.tokens, width))

    def _slots(self, position: Host, rows: int) -> Host:
        """Slots of positions [n, ...] in rings of ``rows`` rows a sequence; -1 for negative positions."""
        sequence = self.sequences.reshape(-1, *(1,) * (position.ndim - 1))
        return np.where(position < 0, -1, sequence * rows + position % rows)

    def _newest(self, rows: int) -> Host:
        """Slots [T] of this step's tokens in such rings, -1 for padding and for tokens that are overwritten within the
        step.
        """
        kept = self.host_positions >= self.ends[:, None] - rows
        return self._slots(np.where(kept, self.host_positions, -1), rows).reshape(-1)

    def _recent(self, position: Host, before: int) -> Host:
        """Index of positions [n, ...] in ``[before rows of each sequence | this step's tokens]``."""
        shape = (-1, *(1,) * (position.ndim - 1))
        start, b = self.starts.reshape(shape), np.arange(self.batch).reshape(shape)
        return np.where(
            position >= start,
            self.batch * before + b * self.seq + position - start,
            b * before + position - start + before,
        )

    def compression(self, ratio: int) -> Compression:
        """Addresses of a compress ratio, made once a step."""
        if ratio not in self._compressions:
            self._compressions[ratio] = self._compression(ratio)
        return self._compressions[ratio]

    def _compression(self, ratio: int) -> Compression:
        n, cache = self.batch, self.cache
        first, last = self.starts // ratio, self.ends // ratio  # windows first .. last - 1 close
        closing = int((last - first).max(initial=0))
        window = first[:, None] + np.arange(closing)
        closes = window < last[:, None]
        span = 2 * ratio if ratio == 4 else ratio
        token = (window[:, :, None] + 1) * ratio + np.arange(-span, 0)  # [n, closing, span]
        before = int(min(span - 1, self.starts.max(initial=0))) if closing else 0
        absent = (token < 0) | ~closes[:, :, None]
        old = self.starts[:, None] + np.arange(-before, 0)
        state_rows, rows = cache.state_rows(ratio), cache.compressed_rows(ratio)

        visible = (self.host_positions + 1) // ratio  # 0 for padding, whose position is -1
        bound = int(visible.max(initial=0))
        column = np.arange(bound)
        behind = n * self.before + self.tokens  # window rows that stand before the compressed ones
        base = behind + np.arange(n)[:, None] * bound
        row_idxs = None
        picks = None
        if ratio == 4:
            picks = self._picks(visible, bound, behind, rows) if bound else None
        else:
            row_idxs = self._array(
                np.where(column < visible[:, :, None], base[:, :, None] + column, -1).reshape(self.tokens, bound)
            )
        return Compression(
            ratio=ratio,
            closing=closing,
            bound=bound,
            state_read=self._array(self._slots(old, state_rows).reshape(-1)),
            state_write=self._array(self._newest(state_rows)),
            window_idxs=self._array(np.where(absent, -1, self._recent(token, before)).reshape(n * closing, span)),
            row_write=self._array(np.where(closes, self.sequences[:, None] * rows + window, -1).reshape(-1)),
            row_positions=self._array((window * ratio).reshape(-1)),
            row_read=self._array((self.sequences[:, None] * rows + column).reshape(-1)),
            visible=self._array(visible),
            row_idxs=row_idxs,
            picks=picks,
        )

    def _picks(self, visible: Host, bound: int, behind: int, rows: int) -> Picks:
        topk = min(self.config.index_topk, bound)
        gathered = self.tokens * topk < self.batch * bound
        if not gathered:
            offset = np.broadcast_to(behind + np.arange(self.batch)[:, None] * bound, visible.shape)
            return Picks(topk, gathered, self._array(offset), None)
        pick = np.arange(topk)
        idxs = np.where(pick < visible.reshape(-1, 1), behind + np.arange(self.tokens)[:, None] * topk + pick, -1)
        return Picks(
            topk,
            gathered,
            self._array(np.broadcast_to(self.sequences[:, None] * rows, visible.shape)),
            self._array(idxs),
        )


def check_ids(ids: Host, vocab_size: int) -> None:
    """Raise ``ValueError`` naming the first token id that is not an integer in ``0 .. vocab_size - 1``."""
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token ids: dtype {ids.dtype} must be an integer dtype; save them with e.g. int64")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
        where = tuple(int(i) for i in wrong[0])
        found = f"token id {int(ids[where])} at {list(where)}"
        raise ValueError(f"{found} is outside the vocabulary 0 .. {vocab_size - 1}; was it made by another tokenizer?")
