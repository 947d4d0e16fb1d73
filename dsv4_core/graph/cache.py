"""What a sequence remembers: window ring, compressed rows, indexer keys, open windows; and how far
it can be rewound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.contract.dtypes import Host, RowLayout
from dsv4_core.contract.spec import BackendError

if TYPE_CHECKING:
    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Array


def written(backend: Backend, array: Array, rows: Array, index: Array, *, layout: RowLayout) -> Array:
    """Write rows by the backend's ``cache_write``; give the array that holds them, which may be
    another than ``array``.

    Raises ``BackendError`` where the op gives none.
    """
    after = backend.cache_write(array, rows, index, layout=layout)
    if after is None:
        raise BackendError(f"backend {backend.name!r}: cache_write gave None; it must return the array that it wrote")
    return after


class CacheError(ValueError):
    """A request that the cache cannot hold: context too long, or a rewind too far."""


@dataclass(eq=False)
class LayerCache:
    """One layer's arrays; rows of part p begin at ``p * rows per part``.

    None where the layer's ratio has no such thing. What is written is replaced by what
    ``cache_write`` returns.
    """

    ratio: int
    ring: Array
    rows: Array | None = None
    keys: Array | None = None
    state: Array | None = None
    key_state: Array | None = None


SHARED = 128  # a prefix can be taken over at multiples of it: windows of every ratio are closed there


@dataclass(frozen=True)
class Snapshot:
    """What a sequence of ``length`` tokens remembers beside its compressed rows: [rows, dim] a
    layer, None where there is none.
    """

    length: int
    rings: tuple[Array, ...]
    states: tuple[Array | None, ...]
    key_states: tuple[Array | None, ...]


RUN = 128  # keys that are said to be neighbours, at most
_COPIED = 1 << 16  # compressed rows that are copied at a time


@dataclass
class Cache:
    """Room for ``sequences`` sequences of up to ``capacity`` tokens, each rewindable by
    ``rewindable`` tokens.

    ``lengths[s]``: tokens that sequence s holds. ``furthest[s]``: the most it ever held, which
    limits how far back its rings reach.
    """

    backend: Backend
    config: ModelConfig
    sequences: int
    capacity: int
    rewindable: int = 8
    lengths: Host = field(init=False)
    furthest: Host = field(init=False)
    layers: list[LayerCache] = field(init=False)

    def __post_init__(self) -> None:
        """Allocate; raise ``CacheError`` where the capacity is more than the model's positions."""
        if not 0 < self.capacity <= self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise CacheError(
                f"cache: capacity of {self.capacity} tokens; the model has positions 0 .. {limit - 1} (max_position_embeddings)"
            )
        self.lengths = np.zeros(self.sequences, np.int64)
        self.furthest = np.zeros(self.sequences, np.int64)
        self.layers = [self._layer(ratio) for ratio in self.config.compress_ratios]

    @cached_property
    def kv_layout(self) -> RowLayout:
        """Key/value rows: packed in native mode, plain in the exact ones and where the backend
        packs none.
        """
        c = self.config
        return RowLayout("kv", c.head_dim, c.qk_rope_head_dim) if self._packed else RowLayout("plain", c.head_dim)

    @cached_property
    def key_layout(self) -> RowLayout:
        """Indexer keys: packed as key/value rows are. A part's stand together, and are read in
        order.
        """
        run = gcd(self.compressed_rows(4), RUN)
        return RowLayout("key" if self._packed else "plain", self.config.index_head_dim, run=run)

    @property
    def _packed(self) -> bool:
        return self.backend.numerics == "native" and self.backend.packs_rows

    @property
    def parts(self) -> int:
        """Parts of each array, of ``ring_rows``, ``compressed_rows`` and ``state_rows`` rows: one a
        sequence.
        """
        return self.sequences

    @property
    def in_one_part(self) -> bool:
        """Whether a sequence's rows stand in one part, so that they are counted from one offset."""
        return True

    def at(self, sequences: Host, number: Host, rows: int, *, tokens: int) -> Host:
        """Where rows ``number`` [n, ...] of sequences [n, 1, ...] stand in arrays of ``rows`` rows
        a part; ``tokens``: how many a row is of.
        """
        del tokens
        return sequences * rows + number % rows

    def stays(self, position: Host, ends: Host, rows: int) -> Host:
        """Whether a position's row is still there when the sequence has reached ``ends``."""
        return position >= ends - rows

    def state_layout(self, ratio: int, dim: int) -> RowLayout:
        """The compressor's open windows: a token's kv and score, [2 * width]."""
        return RowLayout("plain", 2 * (2 if ratio == 4 else 1) * dim)

    @property
    def ring_rows(self) -> int:
        """Window rows of a sequence."""
        return self.config.sliding_window + self.rewindable

    def compressed_rows(self, ratio: int) -> int:
        """Compressed rows of a sequence."""
        return -(-self.capacity // ratio)

    def state_rows(self, ratio: int) -> int:
        """Tokens of a sequence's open windows; where windows overlap, the one before counts too."""
        return (2 * ratio if ratio == 4 else ratio) + self.rewindable

    def _layer(self, ratio: int) -> LayerCache:
        def rows(count: int, layout: RowLayout) -> Array:
            dtype = "uint8" if layout.kind != "plain" else self.backend.activation_dtype
            return self.backend.zeros((self.parts * count, layout.width), dtype)

        def state(dim: int) -> Array:
            width = self.state_layout(ratio, dim).width
            return self.backend.zeros((self.parts * self.state_rows(ratio), width), self.backend.wide_dtype)

        ring = rows(self.ring_rows, self.kv_layout)
        if ratio == 0:
            return LayerCache(0, ring)
        compressed, open_window = rows(self.compressed_rows(ratio), self.kv_layout), state(self.config.head_dim)
        if ratio != 4:
            return LayerCache(ratio, ring, compressed, state=open_window)
        keys = rows(self.compressed_rows(4), self.key_layout)
        return LayerCache(4, ring, compressed, keys, open_window, state(self.config.index_head_dim))

    def snapshot(self, sequence: int) -> Snapshot:
        """Copy what another sequence needs, beside the compressed rows, to go on from here.

        Raises ``CacheError`` at a length that is not a multiple of 128, where windows are open.
        """
        length = int(self.lengths[sequence])
        if length == 0 or length % SHARED:
            raise CacheError(f"snapshot: sequence {sequence} holds {length} tokens; it must be a multiple of {SHARED}")
        be, c = self.backend, self.config

        def read(array: Array | None, count: int, rows: int, layout: RowLayout) -> Array | None:
            return (
                None
                if array is None
                else be.cache_read(array, self._last(sequence, length, count, rows), layout=layout)
            )

        rings = [
            be.cache_read(x.ring, self._last(sequence, length, c.sliding_window, self.ring_rows), layout=self.kv_layout)
            for x in self.layers
        ]
        states, key_states = [], []
        for layer in self.layers:
            overlaps = layer.ratio == 4  # elsewhere no window is open at this length
            shape = (2 * layer.ratio, self.state_rows(layer.ratio))
            states.append(read(layer.state, *shape, self.state_layout(4, c.head_dim)) if overlaps else None)
            key_states.append(
                read(layer.key_state, *shape, self.state_layout(4, c.index_head_dim)) if overlaps else None
            )
        return Snapshot(length, tuple(rings), tuple(states), tuple(key_states))

    def restore(self, sequence: int, snapshot: Snapshot, *, donor: int) -> None:
        """Make a sequence what one of the snapshot's length was; ``donor``, which may have gone on,
        has its compressed rows.
        """
        be, c, length = self.backend, self.config, snapshot.length
        if self.lengths[donor] < length:
            raise CacheError(f"restore: sequence {donor} holds {self.lengths[donor]} tokens; {length} are needed of it")

        def state(array: Array | None, rows: Array | None, count: int, each: int, layout: RowLayout) -> Array | None:
            if array is None or rows is None:
                return array
            return written(be, array, rows, self._last(sequence, length, count, each), layout=layout)

        for i, layer in enumerate(self.layers):
            last = self._last(sequence, length, c.sliding_window, self.ring_rows)
            layer.ring = written(be, layer.ring, snapshot.rings[i], last, layout=self.kv_layout)
            if not layer.ratio:
                continue
            shape = (2 * layer.ratio, self.state_rows(layer.ratio))
            layer.state = state(layer.state, snapshot.states[i], *shape, self.state_layout(4, c.head_dim))
            key_layout = self.state_layout(4, c.index_head_dim)
            layer.key_state = state(layer.key_state, snapshot.key_states[i], *shape, key_layout)
            if donor != sequence:
                where = self.compressed_rows(layer.ratio), donor, sequence, length // layer.ratio
                layer.rows = self._copied(layer.rows, self.kv_layout, *where)
                layer.keys = self._copied(layer.keys, self.key_layout, *where)
        self.lengths[sequence] = self.furthest[sequence] = length

    def _copied(
        self, array: Array | None, layout: RowLayout, each: int, source: int, target: int, count: int
    ) -> Array | None:
        """Give an array in which the first ``count`` rows of sequence ``target`` are those of
        ``source``.
        """
        if array is None:
            return None
        for begin in range(0, count, _COPIED):
            rows = np.arange(begin, min(begin + _COPIED, count), dtype=np.int32)
            read = self.backend.cache_read(array, self.backend.from_numpy(source * each + rows), layout=layout)
            array = written(self.backend, array, read, self.backend.from_numpy(target * each + rows), layout=layout)
        return array

    def _last(self, sequence: int, length: int, count: int, rows: int) -> Array:
        """Rows of a sequence's last ``count`` tokens in rings of ``rows`` rows."""
        position = np.arange(max(0, length - count), length)
        return self.backend.from_numpy((sequence * rows + position % rows).astype(np.int32))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: the formulas of model.md section 5, times sequences."""
        arrays = (
            a
            for layer in self.layers
            for a in (layer.ring, layer.rows, layer.keys, layer.state, layer.key_state)
            if a is not None
        )
        return sum(int(np.prod(a.shape)) * _ITEMSIZE[str(a.dtype).removeprefix("torch.")] for a in arrays)

    def advance(self, sequences: Host, ends: Host) -> None:
        """Note that sequences now hold ``ends`` tokens."""
        self.lengths[sequences] = ends
        self.furthest[sequences] = np.maximum(self.furthest[sequences], ends)

    def rewind(self, sequence: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a sequence; raise ``CacheError`` where its
        rings no longer reach back so far.
        """
        have, floor = int(self.lengths[sequence]), max(0, int(self.furthest[sequence]) - self.rewindable)
        if not 0 <= length <= have:
            raise CacheError(f"rewind: sequence {sequence} holds {have} tokens, not {length}")
        if length == 0:
            self.furthest[sequence] = 0
        elif length < floor:
            reached = int(self.furthest[sequence])
            raise CacheError(
                f"rewind: sequence {sequence} to {length} tokens; it has reached {reached} and the cache keeps "
                f"{self.rewindable} to rewind: the least is {floor}. Make the cache with rewindable={reached - length} or more, or prefill again"
            )
        self.lengths[sequence] = length


_ITEMSIZE = {"uint8": 1, "bfloat16": 2, "float32": 4, "float64": 8}
