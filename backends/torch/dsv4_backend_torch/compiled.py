"""The C kernels of ``c/`` on a CPU, called one by one, or recorded as a tape that one call runs.

PyTorch's calls cost more than what they compute there, and its products of one row in BF16 read
half of what memory gives.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import threading
import weakref
from array import array
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4_backend_torch.kept import library
from dsv4_backend_torch.tape import Tape
from dsv4_core.contract.dtypes import FP4_GROUP, KV_BLOCK, Experts, ScaledArray

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dsv4_core.contract.dtypes import Format, RowLayout

    Weight = Tensor | ScaledArray

_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as in values.h
_DONE, _NO_MEMORY = 0, 2  # what kernels give; 1: not for them
ALIKE = 8  # tokens up to which a product's bits are those of one alone: as in weights.h
# tokens of a call at most: what a kernel makes beside its result takes memory
MANY = 4096
MOVED = 1 << 22  # bytes that are copied at a time: the second cache level of a core
STREAMS = 4  # of hyper-connections: the published models'
TILE = 16  # channels that attention takes at a time
_ARGUMENTS = {  # q: an integer or an address, d: a number
    "gemv": "qq",
    "moe": "q" * 15 + "d",
    "gate": "q" * 13 + "d",
    "rms_norm": "qqqqqqqd",
    "hc_pre": "q" * 12 + "ddq",
    "hc_head": "q" * 8 + "dd",
    "hc_post": "q" * 8,
    "rotation": "q" * 5,
    "apply_rope": "q" * 9,
    "act_qdq": "q" * 8,
    "hadamard": "q" * 5,
    "embedding": "q" * 8,
    "cache_write": "q" * 7,
    "cache_read": "q" * 8,
    "copy": "q" * 6,
    "sparse_attn": "q" * 21 + "d",
    "compress": "q" * 14,
    "index_topk": "q" * 17 + "d",
}


class ExpertTable:
    """Where experts' weights are: w1, w3, w2 of one expert after another. ``dim``, ``inter``:
    channels; 0 where they are not for kernels.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights, self.count = weights, len(weights) // 3
        self.inter, self.dim = weights[0].shape
        fit = _weights(weights) and all(
            weight.shape == ((self.dim, self.inter) if i % 3 == 2 else (self.inter, self.dim))
            for i, weight in enumerate(weights)
        )
        fields = [_fields(weight) for weight in weights] if fit else []
        if len({kind for _, _, kind in fields}) != 1:
            self.inter = self.dim = 0
        self._fields = array("q", [number for each in fields for number in each])
        self.address = self._fields.buffer_info()[0]


class Kernels:
    """Ops on float32 and BF16 tensors in host memory. ``compiler``: its version.

    Each method is the contract of its name and gives None where the kernel is not for these
    operands (too many, of other dtypes or shapes, not contiguous, not finite, out of range):
    PyTorch's way is then taken, and raises what there is to raise. All raise ``MemoryError``.
    """

    def __init__(self, path: Path, compiler: str) -> None:
        self.compiler = compiler
        self.library = ctypes.CDLL(str(path))
        self.library.find_kernel.restype = ctypes.c_void_p
        self.library.find_kernel.argtypes = (ctypes.c_char_p,)
        self._kernel = self.library.run_kernel
        self._kernel.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)
        self._entries = {
            name: (self.library.find_kernel(name.encode()), struct.Struct(f"={kinds}"))
            for name, kinds in _ARGUMENTS.items()
        }
        self._recording = threading.local()
        self._tables: dict[int, tuple[tuple[weakref.ref[Experts], ...], ExpertTable]] = {}

    @property
    def tape(self) -> Tape | None:
        """What this thread records its calls on, beside running them."""
        return getattr(self._recording, "tape", None)

    @tape.setter
    def tape(self, tape: Tape | None) -> None:
        self._recording.tape = tape

    def call(self, entry: int, packed: bytes) -> int:
        """Call a kernel; what it says."""
        return int(self._kernel(entry, packed, torch.get_num_threads()))

    def name_of(self, entry: int) -> str:
        """The kernel at an entry."""
        return next(name for name, (known, _) in self._entries.items() if known == entry)

    def _run(self, name: str, *arguments: float, keep: object = None) -> bool:
        """Call; say whether the kernel did it. ``keep``: what the arguments are addresses in."""
        entry, packer = self._entries[name]
        packed = packer.pack(*arguments)
        status = self.call(entry, packed)
        if status == _NO_MEMORY:
            raise MemoryError(
                f"{name} of the torch backend's C kernels got no memory for what it makes beside its result"
            )
        if status == _DONE and (tape := self.tape) is not None:
            tape.add(entry, packed, keep)
        return bool(status == _DONE)

    def products(self, products: Sequence[tuple[Tensor, Sequence[Weight]]], dtype: torch.dtype) -> Tensor | None:
        """``x @ concat(weights).T`` of each pair, one below the other, in ``dtype``; all pairs are
        of the same widths.
        """
        rows, width = 0, sum(weight.shape[0] for weight in products[0][1])
        for x, weights in products:
            rows += x.shape[0]
            if x.shape[0] > MANY or not (_taken(x) and _weights(weights)):
                return None
        y = torch.empty((rows, width), dtype=dtype)
        fields = array("q")
        to, size, y_type = y.data_ptr(), dtype.itemsize, _TYPES[dtype]
        for x, weights in products:
            start, x_type, tokens = x.data_ptr(), _TYPES[x.dtype], x.shape[0]
            at = to
            for weight in weights:
                out, cols = weight.shape
                if cols != x.shape[1]:
                    return None
                fields.extend((*_fields(weight), start, at, 0, x_type, y_type, out, cols, tokens, cols, width))
                at += out * size
            to += tokens * width * size
        return y if self._run("gemv", fields.buffer_info()[0], len(fields) // 13, keep=(fields, products)) else None

    def grouped(self, x: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor | None:
        """Contract of ``grouped_linear``, in ``dtype``: channels of ``x`` [tokens, groups, cols]
        times their own rows of ``weight``.
        """
        tokens, groups, cols = x.shape
        if tokens > MANY or not (_taken(x) and _weights((weight,))):
            return None
        out = weight.shape[0] // groups
        y = torch.empty((tokens, groups * out), dtype=dtype)
        fields = array("q")
        for g in range(groups):
            fields.extend(
                (*_fields(weight), x.data_ptr() + g * cols * x.itemsize, y.data_ptr() + g * out * y.itemsize, g * out, _TYPES[x.dtype],
                 _TYPES[dtype], out, cols, tokens, groups * cols, groups * out)
            )  # fmt: skip
        return y if self._run("gemv", fields.buffer_info()[0], groups, keep=(fields, x, weight)) else None

    def moe(
        self, x: Tensor, chosen: Tensor, share: Tensor | None, shared: Tensor | None, experts: tuple[Experts, Experts, Experts] | ExpertTable,
        first_expert: int, limit: float, dtype: torch.dtype, *, quantise: bool,
    ) -> Tensor | None:  # fmt: skip
        """Rows ``x`` [rows, dim] through the experts ``chosen`` [rows, topk], weighted by
        ``share``, summed onto ``shared``, in ``dtype``.

        ``experts``: w1, w3, w2, or all of them in a table. ``quantise``: what w2 multiplies, as
        ``act_qdq`` in blocks of 128.
        """
        rows, dim = x.shape
        if rows > MANY or not rows or not (_taken(x) and _wide(share) and _indices(chosen)):
            return None
        if shared is not None and not (shared.dtype == x.dtype and shared.is_contiguous() and shared.shape == x.shape):
            return None
        table = experts if isinstance(experts, ExpertTable) else self._table(experts)
        if table.dim != dim or (share is not None and share.shape != chosen.shape):
            return None
        y = torch.empty((rows, dim), dtype=dtype)
        done = self._run(
            "moe", table.address, x.data_ptr(), chosen.data_ptr(), _address(share), _address(shared), y.data_ptr(),
            _TYPES[x.dtype], _TYPES[dtype], rows, chosen.shape[1], table.count, first_expert, dim, table.inter, quantise, limit,
            keep=(table, x, chosen, share, shared),
        )  # fmt: skip
        return y if done else None

    def _table(self, experts: tuple[Experts, Experts, Experts]) -> ExpertTable:
        """Where all experts' weights are, kept for as long as w1's experts live."""
        found = self._tables.get(id(experts[0]))
        if found is None or not all(was() is now for was, now in zip(found[0], experts, strict=True)):
            key, tables = id(experts[0]), self._tables
            first = weakref.ref(experts[0], lambda _: tables.pop(key, None))
            weights = [projection[e] for e in range(experts[0].shape[0]) for projection in experts]
            found = tables[key] = (first, weakref.ref(experts[1]), weakref.ref(experts[2])), ExpertTable(weights)
        return found[1]

    def gate(
        self, x: Tensor, weight: Weight, bias: Tensor | None, table: Tensor | None, ids: Tensor | None, topk: int, route_scale: float
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Contract of ``gate``, or without ``bias`` and with ``table`` and ``ids`` of
        ``gate_hash``.
        """
        rows, dim = x.shape
        if rows > MANY or not (_taken(x) and _weights((weight,)) and _wide(bias)) or dim != weight.shape[1]:
            return None
        experts = weight.shape[0]
        if bias is not None and bias.shape != (experts,):
            return None
        if table is not None and not (
            table.dtype == torch.int64 and table.is_contiguous() and ids is not None and _indices(ids)
        ):
            return None
        described = array("q", _fields(weight))
        chosen, shares = torch.empty((rows, topk), dtype=torch.int32), torch.empty((rows, topk))
        done = self._run(
            "gate", x.data_ptr(), _TYPES[x.dtype], described.buffer_info()[0], _address(bias), _address(table), _address(ids),
            chosen.data_ptr(), shares.data_ptr(), rows, experts, dim, topk, 0 if table is None else table.shape[0], route_scale,
            keep=(x, described, weight, bias, table, ids),
        )  # fmt: skip
        return (shares, chosen) if done else None

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
        """Contract of ``rms_norm``."""
        rows, dim = x.shape
        if rows > MANY or not _taken(x):
            return None
        if weight is not None and not (_taken(weight) and weight.shape == (dim,)):
            return None
        y = torch.empty_like(x)
        weight_type = 0 if weight is None else _TYPES[weight.dtype]
        done = self._run(
            "rms_norm", x.data_ptr(), y.data_ptr(), _TYPES[x.dtype], _address(weight), weight_type, rows, dim, eps, keep=(x, weight)
        )  # fmt: skip
        return y if done else None

    def rotation(self, positions: Tensor, freqs: Tensor) -> Tensor | None:
        """Cosine and sine of positions times frequencies, float32 [tokens, half, 2]."""
        tokens, half = positions.shape[0], freqs.shape[0]
        if tokens > MANY or not (_indices(positions) and _wide(freqs)):
            return None
        turn = torch.empty((tokens, half, 2))
        done = self._run(
            "rotation", positions.data_ptr(), freqs.data_ptr(), turn.data_ptr(), tokens, half, keep=(positions, freqs)
        )
        return turn if done else None

    def apply_rope(self, x: Tensor, turn: Tensor, *, inverse: bool) -> Tensor | None:
        """``turn``: what ``rotation`` gives."""
        tokens, heads, dim = x.shape
        if not _taken(x) or turn.shape[0] != tokens or 2 * turn.shape[1] > dim:
            return None
        y = torch.empty_like(x)
        done = self._run(
            "apply_rope", x.data_ptr(), y.data_ptr(), _TYPES[x.dtype], turn.data_ptr(), tokens, heads, dim, turn.shape[1], inverse,
            keep=(x, turn),
        )  # fmt: skip
        return y if done else None

    def act_qdq(self, x: Tensor, fmt: Format, block: int, channels: int) -> Tensor | None:
        """Contract of ``act_qdq``, in native numerics."""
        rows, dim = x.shape
        if rows > MANY or channels > dim or channels % block or not _taken(x):
            return None
        y = torch.empty_like(x)
        done = self._run(
            "act_qdq", x.data_ptr(), y.data_ptr(), _TYPES[x.dtype], rows, dim, channels, block, fmt == "e4m3", keep=x
        )
        return y if done else None

    def hadamard(self, x: Tensor) -> Tensor | None:
        """Contract of ``hadamard``."""
        rows, dim = x.shape
        if rows > MANY or dim & (dim - 1) or not _taken(x):
            return None
        y = torch.empty_like(x)
        return y if self._run("hadamard", x.data_ptr(), y.data_ptr(), _TYPES[x.dtype], rows, dim, keep=x) else None

    def embedding(self, ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Contract of ``embedding``, in ``dtype``."""
        tokens = ids.shape[0]
        if tokens > MANY or not (_taken(weight) and _indices(ids)):
            return None
        y = torch.empty((tokens, weight.shape[1]), dtype=dtype)
        done = self._run(
            "embedding", ids.data_ptr(), weight.data_ptr(), _TYPES[weight.dtype], weight.shape[0], weight.shape[1], y.data_ptr(),
            _TYPES[dtype], tokens, keep=(ids, weight),
        )  # fmt: skip
        return y if done else None

    def hc_expand(self, x: Tensor, hc: int) -> Tensor | None:
        """Contract of ``hc_expand``."""
        tokens, dim = x.shape
        if tokens > MANY or not _taken(x):
            return None
        y = torch.empty((tokens, hc, dim), dtype=x.dtype)
        row = dim * x.itemsize
        for n in range(hc):
            self._run("copy", x.data_ptr(), y.data_ptr() + n * row, tokens, row, row, hc * row, keep=x)
        return y

    def concat(self, parts: Sequence[Tensor], axis: int) -> Tensor | None:
        """Contract of ``concat``, for contiguous parts that are alike but in ``axis``."""
        first = parts[0]
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        if math.prod(shape) * first.itemsize > MOVED:
            return None
        for part in parts:
            alike = part.dtype == first.dtype and part.shape[:axis] == first.shape[:axis]
            if not (alike and part.shape[axis + 1 :] == first.shape[axis + 1 :] and part.is_contiguous()):
                return None
        y = torch.empty(shape, dtype=first.dtype)
        rows, stride, at = math.prod(shape[:axis]), math.prod(shape[axis:]) * first.itemsize, y.data_ptr()
        for part in parts:
            size = math.prod(part.shape[axis:]) * part.itemsize
            if size and rows:
                self._run("copy", part.data_ptr(), at, rows, size, size, stride, keep=part)
            at += size
        return y

    def hc_pre(
        self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor | None, norm_eps: float, eps: float, iters: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
        """Contract of ``hc_pre``, or with ``norm`` of ``hc_pre_norm``, for four streams."""
        tokens, streams, dim = h.shape
        if streams != STREAMS or tokens > MANY or not (_taken(h) and _wide(fn, scale, base)):
            return None
        mixes = STREAMS * (STREAMS + 2)
        if fn.shape != (mixes, STREAMS * dim) or scale.shape != (3,) or base.shape != (mixes,):
            return None
        if norm is not None and not (_taken(norm) and norm.shape == (dim,)):
            return None
        y = torch.empty((tokens, dim), dtype=h.dtype)
        post, comb = torch.empty((tokens, STREAMS)), torch.empty((tokens, STREAMS, STREAMS))
        done = self._run(
            "hc_pre", h.data_ptr(), _TYPES[h.dtype], fn.data_ptr(), scale.data_ptr(), base.data_ptr(), _address(norm),
            0 if norm is None else _TYPES[norm.dtype], y.data_ptr(), post.data_ptr(), comb.data_ptr(), tokens, dim, norm_eps, eps, iters,
            keep=(h, fn, scale, base, norm),
        )  # fmt: skip
        return (y, post, comb) if done else None

    def hc_head(self, h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, eps: float) -> Tensor | None:
        """Contract of ``hc_head``, for four streams."""
        tokens, streams, dim = h.shape
        if streams != STREAMS or tokens > MANY or not (_taken(h) and _wide(fn, scale, base)):
            return None
        if fn.shape != (STREAMS, STREAMS * dim) or scale.shape != (1,) or base.shape != (STREAMS,):
            return None
        y = torch.empty((tokens, dim), dtype=h.dtype)
        done = self._run(
            "hc_head", h.data_ptr(), _TYPES[h.dtype], fn.data_ptr(), scale.data_ptr(), base.data_ptr(), y.data_ptr(), tokens, dim,
            norm_eps, eps, keep=(h, fn, scale, base),
        )  # fmt: skip
        return y if done else None

    def hc_post(self, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor | None:
        """Contract of ``hc_post``, for four streams."""
        tokens, streams, dim = h.shape
        if streams != STREAMS or tokens > MANY or y.dtype != h.dtype or not (_taken(y, h) and _wide(post, comb)):
            return None
        if y.shape != (tokens, dim) or post.shape != (tokens, STREAMS) or comb.shape != (tokens, STREAMS, STREAMS):
            return None
        out = torch.empty_like(h)
        done = self._run(
            "hc_post", y.data_ptr(), h.data_ptr(), _TYPES[h.dtype], post.data_ptr(), comb.data_ptr(), out.data_ptr(), tokens, dim,
            keep=(y, h, post, comb),
        )  # fmt: skip
        return out if done else None

    def cache_write(self, cache: Tensor, rows: Tensor, index: Tensor, layout: RowLayout) -> bool:
        """Say whether rows were stored; where not, nothing is promised of those that ``index``
        names.
        """
        return (
            index.shape[0] <= MANY
            and _taken(rows)
            and rows.dtype == (cache.dtype if layout.kind == "plain" else torch.bfloat16)
            and rows.shape == (index.shape[0], layout.dim)
            and cache.shape[1] == layout.width
            and _whole_blocks(layout)
            and cache.is_contiguous()
            and _indices(index)
            and self._run(
                "cache_write", cache.data_ptr(), cache.shape[0], rows.data_ptr(), _TYPES[rows.dtype], index.data_ptr(),
                index.shape[0], _layout(layout), keep=(cache, rows, index),
            )
        )  # fmt: skip

    def cache_read(self, cache: Tensor, index: Tensor, layout: RowLayout, dtype: torch.dtype) -> Tensor | None:
        """Contract of ``cache_read``, in ``dtype``."""
        if dtype not in _TYPES or not (_indices(index) and _cached(cache, layout)):
            return None
        rows = torch.empty((index.shape[0], layout.dim), dtype=dtype)
        done = self._run(
            "cache_read", cache.data_ptr(), cache.shape[0], _TYPES.get(cache.dtype, 0), index.data_ptr(), index.shape[0],
            rows.data_ptr(), _TYPES[dtype], _layout(layout), keep=(cache, index),
        )  # fmt: skip
        return rows if done else None

    def sparse_attn(
        self, q: Tensor, kv: Tensor, ring: Tensor | None, ring_index: Tensor | None, rows: Tensor | None, row_index: Tensor | None,
        sink: Tensor, idxs: Tensor, layout: RowLayout | None, softmax_scale: float,
    ) -> Tensor | None:  # fmt: skip
        """Contract of ``cached_sparse_attn``; without ``ring`` and ``layout`` of
        ``sparse_attn``.
        """
        tokens, heads, dim = q.shape
        if tokens > MANY or dim % TILE or q.dtype != kv.dtype or not (_taken(q, kv) and _wide(sink) and _indices(idxs)):
            return None
        for cache, index in ((ring, ring_index), (rows, row_index)):
            if cache is not None and not (layout and index is not None and _indices(index) and _cached(cache, layout)):
                return None
        y = torch.empty_like(q)
        done = self._run(
            "sparse_attn", q.data_ptr(), kv.data_ptr(), _address(ring), _address(rows), _address(ring_index), _address(row_index),
            idxs.data_ptr(), sink.data_ptr(), y.data_ptr(), _layout(layout) if layout else 0, _TYPES[q.dtype],
            0 if ring is None else _TYPES.get(ring.dtype, 0), 0 if ring is None else ring.shape[0], 0 if rows is None else rows.shape[0],
            0 if ring_index is None else ring_index.shape[0], kv.shape[0], 0 if row_index is None else row_index.shape[0],
            tokens, heads, dim, idxs.shape[1], softmax_scale, keep=(q, kv, ring, rows, ring_index, row_index, idxs, sink),
        )  # fmt: skip
        return y if done else None

    def compress(
        self, kv_score: Tensor, state: Tensor | None, index: Tensor | None, ape: Tensor, idxs: Tensor, dim: int, dtype: torch.dtype
    ) -> Tensor | None:  # fmt: skip
        """Contract of ``cached_compress``, in ``dtype``; without ``state`` and ``index`` of
        ``compress``.
        """
        (rows, span), (ratio, width) = idxs.shape, ape.shape
        if (
            rows > MANY
            or dim % TILE
            or width != span // ratio * dim
            or not (_wide(kv_score, state, ape) and _indices(idxs))
        ):
            return None
        if index is not None and not _indices(index):
            return None
        y = torch.empty((rows, dim), dtype=dtype)
        done = self._run(
            "compress", kv_score.data_ptr(), ape.data_ptr(), idxs.data_ptr(), rows, span, ratio, dim, kv_score.shape[0], y.data_ptr(),
            _TYPES[dtype], _address(state), 1 if state is None else state.shape[0], _address(index), 0 if index is None else index.shape[0],
            keep=(kv_score, state, index, ape, idxs),
        )  # fmt: skip
        return y if done else None

    def index_topk(
        self, q: Tensor, weights: Tensor, cache: Tensor, index: Tensor, visible: Tensor, offset: Tensor, layout: RowLayout,
        scale: float, topk: int,
    ) -> Tensor | None:  # fmt: skip
        """Contract of ``cached_index_topk``."""
        batch, seq, heads, dim = q.shape
        if batch * seq > MANY or not batch * seq or not (_taken(q) and _wide(weights) and _indices(index)):
            return None
        if not (_indices(visible) and _indices(offset) and _cached(cache, layout)):
            return None
        rows = index.shape[0] // batch
        picks = torch.empty((batch, seq, topk), dtype=torch.int32)
        done = self._run(
            "index_topk", q.data_ptr(), weights.data_ptr(), cache.data_ptr(), index.data_ptr(), visible.data_ptr(), offset.data_ptr(),
            picks.data_ptr(), _layout(layout), _TYPES[q.dtype], _TYPES.get(cache.dtype, 0), cache.shape[0], batch, seq, heads, dim, rows,
            topk, scale, keep=(q, weights, cache, index, visible, offset),
        )  # fmt: skip
        return picks if done else None


def _taken(*tensors: object) -> bool:
    """Say whether all are contiguous, float32 or BF16."""
    for tensor in tensors:  # noqa: SIM110  all() takes twice the time
        if not (isinstance(tensor, Tensor) and tensor.dtype in _TYPES and tensor.is_contiguous()):
            return False
    return True


def _weights(weights: Sequence[Weight]) -> bool:
    """Say whether all are contiguous float32, BF16, or E4M3 or E2M1 codes with their scales."""
    return all(
        weight.format != "int8" and weight.data.is_contiguous() and weight.scale.is_contiguous()
        if isinstance(weight, ScaledArray)
        else _taken(weight)
        for weight in weights
    )


def _fields(weight: Weight) -> tuple[int, int, int]:
    """A weight as ``weights.h`` describes it."""
    if isinstance(weight, ScaledArray):
        return weight.data.data_ptr(), weight.scale.data_ptr(), 2 if weight.format == "e4m3" else 3
    return weight.data_ptr(), 0, _TYPES[weight.dtype]


def _wide(*tensors: Tensor | None) -> bool:
    """Say whether all are contiguous float32, or absent."""
    return all(tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()) for tensor in tensors)


def _indices(tensor: Tensor) -> bool:
    """Say whether these are contiguous int32."""
    return tensor.dtype == torch.int32 and tensor.is_contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cached(cache: Tensor, layout: RowLayout) -> bool:
    """Say whether rows of such a cache can be unpacked."""
    if not cache.is_contiguous() or cache.shape[1] != layout.width or not _whole_blocks(layout):
        return False
    return layout.kind != "plain" or cache.dtype in _TYPES


def _whole_blocks(layout: RowLayout) -> bool:
    return layout.kind == "plain" or not (layout.dim - layout.rope_dim) % (
        KV_BLOCK if layout.kind == "kv" else FP4_GROUP
    )


@functools.cache
def _kept_layout(layout: RowLayout) -> array[int]:
    return array("q", (("plain", "kv", "key").index(layout.kind), layout.dim, layout.rope_dim, layout.width))


def _layout(layout: RowLayout) -> int:
    return _kept_layout(layout).buffer_info()[0]


@functools.cache
def build() -> Kernels:
    """The kernels for this CPU, one object a process; raise ``NotCompiledError`` where they cannot
    be had.
    """
    path, compiler = library()
    return Kernels(path, compiler)
