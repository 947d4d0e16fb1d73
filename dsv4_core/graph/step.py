"""One forward step's addresses: which rows every token reads and writes, computed on the host from
lengths alone.

All integer arithmetic of attention stands here, once for all backends: the graph and the ops get
index arrays. Positions are known on the host, so nothing is read back from a device. All of a
step's arrays are parts of one buffer, copied once; ``StepShape`` says where they stand. Extents
that grow with the context are rounded up by the backend (``Backend.round_up``) and what is too much
is masked, so that shapes seldom change: a recorded step is replayed on the buffers of later ones.

Letters: n sequences, S tokens each (padded on the right), T = n * S. A token's rows are counted in
the concatenation ``[window rows before the step: n * before | this step's: T | compressed: ...]``.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dsv4_core.graph.cache import Cache, CacheError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Array

Fed: TypeAlias = "Addresses | Joined"
"""What a pass of the graph is given."""

ALIGNED = 16  # elements: parts of the buffer begin at whole cache lines


@dataclass(frozen=True)
class CompressionShape:
    """Extents of one compress ratio.

    ``closing``: windows per sequence that may close. ``before``: tokens per sequence that are read
    back from the open windows. ``bound``: compressed rows per sequence that are read. ``topk``: the
    indexer's picks, 0 where it has none. ``gathered``: picks are read one by one, not all ``bound``
    rows.
    """

    ratio: int
    closing: int
    before: int
    bound: int
    topk: int
    gathered: bool

    @property
    def span(self) -> int:
        """Tokens that a compressed row mixes."""
        return 2 * self.ratio if self.ratio == 4 else self.ratio

    def parts(self, batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its arrays."""
        parts: dict[str, tuple[int, ...]] = {
            "state_read": (batch * self.before,),
            "state_write": (tokens,),
            "window_idxs": (batch * self.closing, self.span),
            "row_write": (batch * self.closing,),
            "row_positions": (batch * self.closing,),
            "row_read": (batch * self.bound,),
            "visible": (batch, tokens // batch if batch else 0),
        }
        if self.ratio != 4:
            parts["row_idxs"] = (tokens, self.bound)
        elif self.bound:
            parts["offset"] = parts["visible"]
            if self.gathered:
                parts["pick_idxs"] = (tokens, self.topk)
        return parts


@dataclass(frozen=True)
class StepShape:
    """All that the shapes of a step's arrays depend on: steps of one shape differ in values alone.

    ``before``: window rows per sequence that are read back from the ring. ``width``: window rows of
    a token. ``padded``: rows that each of several ranks gives to an exchange among experts; 0 where
    counts are exchanged first.
    """

    batch: int
    seq: int
    before: int
    width: int
    compressions: tuple[CompressionShape, ...]
    padded: int = 0

    @property
    def tokens(self) -> int:
        """All sequences' tokens, padding too."""
        return self.batch * self.seq

    @property
    def parts(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Where each array begins in the buffer, and its shape; a ratio's arrays are named
        ``ratio.name``.
        """
        return _placed(self)

    @property
    def size(self) -> int:
        """Elements of the buffer."""
        return max(((begin + prod(shape)) for begin, shape in self.parts.values()), default=0)


@functools.lru_cache(maxsize=256)
def _placed(shape: StepShape) -> dict[str, tuple[int, tuple[int, ...]]]:
    n, tokens = shape.batch, shape.tokens
    arrays: dict[str, tuple[int, ...]] = {
        "ids": (tokens,),
        "positions": (tokens,),
        "ring_read": (n * shape.before,),
        "ring_write": (tokens,),
        "window_idxs": (tokens, shape.width),
    }
    for each in shape.compressions:
        arrays |= {f"{each.ratio}.{name}": size for name, size in each.parts(n, tokens).items()}
    parts, begin = {}, 0
    for name, size in arrays.items():
        parts[name] = (begin, size)
        begin += -(-prod(size) // ALIGNED) * ALIGNED
    return parts


@dataclass(frozen=True)
class Compression:
    """Addresses of one compress ratio.

    ``state_read`` [n * before], ``state_write`` [T]: tokens of open windows (-1: before the
    sequence, or too old to keep). ``window_idxs`` [n * closing, span]: each closing window's tokens
    in ``[state_read | step]``; -1 where there is none. ``row_write``, ``row_positions`` [n *
    closing]; a window that does not close is written nowhere (-1). ``row_read`` [n * bound].
    ``visible`` [n, S]. ``row_idxs`` [T, width + bound]: window rows and all visible rows (ratio
    128).
    """

    shape: CompressionShape
    state_read: Array
    state_write: Array
    window_idxs: Array
    row_write: Array
    row_positions: Array
    row_read: Array
    visible: Array
    row_idxs: Array | None
    picks: Picks | None

    @property
    def ratio(self) -> int:
        """Tokens of a window."""
        return self.shape.ratio

    @property
    def closing(self) -> int:
        """Windows per sequence that may close."""
        return self.shape.closing

    @property
    def bound(self) -> int:
        """Compressed rows per sequence that are read."""
        return self.shape.bound


@dataclass(frozen=True)
class Picks:
    """Where the indexer's picks are read from (ratio 4).

    Gathered: each token's picks are read one by one and ``idxs`` [T, width + topk], window rows and
    picks, is known beforehand; otherwise all ``bound`` rows are read and the picks themselves,
    shifted by ``offset`` [n, S], are the indices.
    """

    topk: int
    gathered: bool
    offset: Array
    idxs: Array | None


class Tokens(ABC):
    """What a step has for each of its tokens, in one rectangle or in several."""

    @abstractmethod
    def part(self, name: str) -> Array:
        """One array of the step."""

    @cached_property
    def ids(self) -> Array:
        """Token ids [T]."""
        return self.part("ids")

    @cached_property
    def positions(self) -> Array:
        """Positions [T], 0 for padding."""
        return self.part("positions")

    @cached_property
    def ring_write(self) -> Array:
        """Ring slots of this step's rows, -1 for those that later ones of the step overwrite:
        [T].
        """
        return self.part("ring_write")


class Addresses(Tokens):
    """A step as the graph sees it: the arrays in a ``buffer`` [shape.size] int32 on the device, for
    a cache.
    """

    def __init__(self, cache: Cache, shape: StepShape, buffer: Array | None) -> None:
        self.cache, self.shape, self.parts = cache, shape, shape.parts
        self._buffer = buffer
        self._compressions: dict[int, Compression] = {}

    @property
    def buffer(self) -> Array:
        """All arrays of the step, one after another, on the device."""
        assert self._buffer is not None, "a step without a buffer makes its own"
        return self._buffer

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.shape.batch

    @property
    def seq(self) -> int:
        """Tokens of each, padding too."""
        return self.shape.seq

    @property
    def tokens(self) -> int:
        """All sequences' tokens, padding too."""
        return self.shape.tokens

    @property
    def padded(self) -> int:
        """As of ``StepShape``."""
        return self.shape.padded

    @property
    def rectangles(self) -> tuple[Addresses, ...]:
        """Itself: ``Joined`` has several."""
        return (self,)

    def part(self, name: str) -> Array:
        """One array of the step."""
        begin, shape = self.parts[name]
        return self.buffer[begin : begin + prod(shape)].reshape(shape)

    @cached_property
    def ring_read(self) -> Array:
        """Ring slots of the ``before`` rows that precede each sequence's tokens, oldest first; -1
        before its beginning: [n * before].
        """
        return self.part("ring_read")

    @cached_property
    def window_idxs(self) -> Array:
        """Window rows of each token, oldest first, -1 before its sequence's beginning: [T,
        width].
        """
        return self.part("window_idxs")

    def compression(self, ratio: int) -> Compression:
        """Addresses of a compress ratio; ``KeyError`` for one that no layer has."""
        if ratio not in self._compressions:
            shape = {each.ratio: each for each in self.shape.compressions}[ratio]
            names = shape.parts(self.batch, self.tokens)
            arrays = {name: self.part(f"{ratio}.{name}") for name in names}
            for name in arrays.keys() & {"row_idxs", "pick_idxs"}:  # joined once a step, not by every layer
                arrays[name] = self.cache.backend.concat((self.window_idxs, arrays[name]), axis=1)
            offset, idxs = arrays.pop("offset", None), arrays.pop("pick_idxs", None)
            picks = None if offset is None else Picks(shape.topk, shape.gathered, offset, idxs)
            self._compressions[ratio] = Compression(
                shape=shape, row_idxs=arrays.pop("row_idxs", None), picks=picks, **arrays
            )
        return self._compressions[ratio]


class Step(Addresses):
    """A rectangle of tokens: ``ids`` [n, S] for cache rows ``sequences``, of which the first
    ``counts[b]`` of row b are real.
    """

    def __init__(
        self,
        cache: Cache,
        ids: Host,
        sequences: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        *,
        padded: int = 0,
    ) -> None:
        """Raise ``CacheError`` where a sequence would grow past the cache's capacity,
        ``ValueError`` for ids outside the vocabulary and for sequences or counts that the cache or
        the rectangle does not have. ``padded``: as in ``StepShape``.
        """
        batch, seq = ids.shape
        self.backend, self.config = cache.backend, cache.config
        self.sequences = np.arange(batch) if sequences is None else np.asarray(sequences, np.int64)
        self.counts = np.full(batch, seq) if counts is None else np.asarray(counts, np.int64)
        _check_rectangle(cache, ids, self.sequences, self.counts)
        self.starts = cache.lengths[self.sequences]
        self.ends = self.starts + self.counts
        if (self.ends > cache.capacity).any():
            b = int(np.argmax(self.ends))
            raise CacheError(
                f"context too long: sequence {int(self.sequences[b])} would hold {int(self.ends[b])} tokens; the cache has "
                f"room for {cache.capacity} and the model for {self.config.max_position_embeddings}; make a larger cache or shorten the prompt"
            )
        check_ids(ids, self.config.vocab_size)
        column = np.arange(seq)
        self.real = column < self.counts[:, None]
        self.host_positions = np.where(self.real, self.starts[:, None] + column, -1)  # [n, S]
        self.cache = cache
        super().__init__(cache, self._extents(batch, seq, padded), None)
        self.host = np.zeros(self.shape.size, np.int32)
        self._fill(ids)

    @property
    def buffer(self) -> Array:
        """``host`` on the device, copied when it is first used."""
        if self._buffer is None:
            self._buffer = self.backend.from_numpy(self.host)
        return self._buffer

    def _extents(self, batch: int, seq: int, padded: int) -> StepShape:
        """The step's shape, its extents rounded up."""
        c, up = self.config, self.backend.round_up
        start, end = int(self.starts.max(initial=0)), int(self.ends.max(initial=0))
        before = min(c.sliding_window - 1, up(start))
        width = min(c.sliding_window, up(max(1, end)))
        compressions = []
        for ratio in sorted(set(c.compress_ratios) - {0}):
            span = 2 * ratio if ratio == 4 else ratio
            closes = int((self.ends // ratio - self.starts // ratio).max(initial=0))
            closing = min(-(-seq // ratio), up(closes)) if batch else 0
            bound = min(-(-self.cache.capacity // ratio), up(int(self._visible(ratio).max(initial=0))))
            topk = min(c.index_topk, bound) if ratio == 4 else 0
            compressions.append(
                CompressionShape(
                    ratio=ratio,
                    closing=closing,
                    before=min(span - 1, up(start)) if closing else 0,
                    bound=bound,
                    topk=topk,
                    gathered=ratio == 4 and self.cache.in_one_part and batch * seq * topk < batch * bound,
                )
            )
        return StepShape(batch, seq, before, width, tuple(compressions), padded)

    def _visible(self, ratio: int) -> Host:
        """Compressed rows that each token sees [n, S]; 0 for padding, whose position is -1."""
        return (self.host_positions + 1) // ratio

    def on_host(self, name: str) -> Host:
        """One array of the step in host memory."""
        begin, shape = self.parts[name]
        return self.host[begin : begin + prod(shape)].reshape(shape)

    def _put(self, name: str, values: Any) -> None:
        array = self.on_host(name)
        if array.size:  # not of a rank without a sequence, nor of windows that do not close
            array[...] = values

    def _fill(self, ids: Host) -> None:
        shape, tokens = self.shape, self.tokens
        self._put("ids", ids.reshape(-1))
        self._put("positions", np.maximum(self.host_positions, 0).reshape(-1))
        position = self.starts[:, None] + np.arange(-shape.before, 0)
        self._put("ring_read", self._slots(position, self.cache.ring_rows).reshape(-1))
        self._put("ring_write", self._newest(self.cache.ring_rows))
        position = self.host_positions[:, :, None] + np.arange(1 - shape.width, 1)
        absent = (position < 0) | (self.host_positions < 0)[:, :, None]
        recent = np.where(absent, -1, self._recent(position, shape.before))
        self._put("window_idxs", recent.reshape(tokens, shape.width))
        for each in shape.compressions:
            self._fill_compression(each)

    def _slots(self, position: Host, rows: int) -> Host:
        """Slots of positions [n, ...] in rings of ``rows`` rows a sequence; -1 for negative
        positions.
        """
        sequence = self.sequences.reshape(-1, *(1,) * (position.ndim - 1))
        return np.where(position < 0, -1, self.cache.at(sequence, np.maximum(position, 0), rows, tokens=1))

    def _newest(self, rows: int) -> Host:
        """Slots [T] of this step's tokens in such rings, -1 for padding and for tokens that are
        overwritten within the step.
        """
        kept = self.cache.stays(self.host_positions, self.ends[:, None], rows)
        return self._slots(np.where(kept, self.host_positions, -1), rows).reshape(-1)

    def _recent(self, position: Host, before: int) -> Host:
        """Index of positions [n, ...] in ``[before rows of each sequence | this step's
        tokens]``.
        """
        shape = (-1, *(1,) * (position.ndim - 1))
        start, b = self.starts.reshape(shape), np.arange(self.batch).reshape(shape)
        return np.where(
            position >= start,
            self.batch * before + b * self.seq + position - start,
            b * before + position - start + before,
        )

    def _fill_compression(self, shape: CompressionShape) -> None:
        n, ratio, cache = self.batch, shape.ratio, self.cache

        def put(name: str, values: Any) -> None:
            self._put(f"{ratio}.{name}", values)

        state_rows, rows = cache.state_rows(ratio), cache.compressed_rows(ratio)
        sequence = self.sequences[:, None]
        put("state_write", self._newest(state_rows))
        if shape.closing:
            window = self.starts[:, None] // ratio + np.arange(shape.closing)  # the first to close, and those after it
            closes = window < self.ends[:, None] // ratio
            token = (window[:, :, None] + 1) * ratio + np.arange(-shape.span, 0)  # [n, closing, span]
            absent = (token < 0) | ~closes[:, :, None]
            old = self.starts[:, None] + np.arange(-shape.before, 0)
            put("state_read", self._slots(old, state_rows).reshape(-1))
            put("window_idxs", np.where(absent, -1, self._recent(token, shape.before)).reshape(-1, shape.span))
            put("row_write", np.where(closes, cache.at(sequence, window, rows, tokens=ratio), -1).reshape(-1))
            put("row_positions", np.where(closes, window * ratio, 0).reshape(-1))

        visible, column = self._visible(ratio), np.arange(shape.bound)
        behind = n * self.shape.before + self.tokens  # window rows that stand before the compressed ones
        first = behind + np.arange(n)[:, None] * shape.bound
        put("row_read", cache.at(sequence, column, rows, tokens=ratio).reshape(-1))
        put("visible", visible)
        if ratio != 4:
            idxs = np.where(column < visible[:, :, None], first[:, :, None] + column, -1)
            put("row_idxs", idxs.reshape(self.tokens, shape.bound))
        elif shape.gathered:
            pick = np.arange(shape.topk)
            idxs = behind + np.arange(self.tokens)[:, None] * shape.topk + pick
            put("offset", sequence * rows)
            put("pick_idxs", np.where(pick < visible.reshape(-1, 1), idxs, -1))
        elif shape.bound:
            put("offset", first)


class Joined(Tokens):
    """Rectangles of unlike lengths in one pass, so that none is padded to another's length: their
    tokens stand one after another. Each keeps its own addresses; what treats every token by itself
    is done for all at once.
    """

    def __init__(self, rectangles: Sequence[Step]) -> None:
        """Raise ``ValueError`` where two of them name a sequence, or are of two caches."""
        self.rectangles, self.cache = tuple(rectangles), rectangles[0].cache
        if any(step.cache is not self.cache for step in rectangles):
            raise ValueError("step: its rectangles are of several caches; a step has one")
        self.sequences = np.concatenate([step.sequences for step in rectangles])
        self.starts = np.concatenate([step.starts for step in rectangles])
        self.ends = np.concatenate([step.ends for step in rectangles])
        _check_once(self.sequences)
        self.tokens = sum(step.tokens for step in rectangles)
        self.padded = rectangles[0].padded

    def part(self, name: str) -> Array:
        """One array with an element for each token, of all rectangles."""
        host = np.concatenate([step.on_host(name) for step in self.rectangles])
        return self.cache.backend.from_numpy(host)


def _check_rectangle(cache: Cache, ids: Host, sequences: Host, counts: Host) -> None:
    """Raise ``ValueError`` where a step names a sequence twice or one that the cache lacks, or
    counts more tokens than there are.
    """
    batch, seq = ids.shape
    if sequences.shape != (batch,) or counts.shape != (batch,):
        raise ValueError(
            f"step: {sequences.size} sequences and {counts.size} counts for {batch} rows of ids; give one of each per row"
        )
    if batch and not 0 <= sequences.min() <= sequences.max() < cache.sequences:
        wrong = int(sequences[(sequences < 0) | (sequences >= cache.sequences)][0])
        raise ValueError(f"step: sequence {wrong} is not one of the cache's 0 .. {cache.sequences - 1}")
    _check_once(sequences)
    if batch and not 0 <= counts.min() <= counts.max() <= seq:
        wrong = int(counts[(counts < 0) | (counts > seq)][0])
        raise ValueError(
            f"step: a count of {wrong}; a row of ids has {seq} tokens, of which the first 0 .. {seq} may be real"
        )


def _check_once(sequences: Host) -> None:
    if len(set(sequences.tolist())) != sequences.size:
        twice = int(np.flatnonzero(np.bincount(sequences) > 1)[0])
        raise ValueError(
            f"step: sequence {twice} is named twice; a sequence's tokens stand in one row of ids, or in steps one after another"
        )


def check_ids(ids: Host, vocab_size: int) -> None:
    """Raise ``ValueError`` naming the first token id that is not an integer in ``0 .. vocab_size -
    1``.
    """
    whole = ids.dtype.kind in "iu" or (ids.dtype == object and all(type(n) is int for n in ids.flat))  # past 64 bits
    if not whole:
        raise ValueError(f"token ids: dtype {ids.dtype} must be an integer dtype; save them with e.g. int64")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = np.argwhere((ids < 0) | (ids >= vocab_size))
        where = tuple(int(i) for i in wrong[0])
        found = f"token id {int(ids[where])} at {list(where)}"
        raise ValueError(f"{found} is outside the vocabulary 0 .. {vocab_size - 1}; was it made by another tokenizer?")
