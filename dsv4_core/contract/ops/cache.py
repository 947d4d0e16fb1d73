"""Cache rows: packed writes, gathered reads. Slots are row numbers; a row's address may pass 2^31
bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.contract.spec import Array, Ops, op

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import RowLayout


class CacheOps(Ops):
    """Scatter, gather, concatenate."""

    @op(
        axes={"cache": "slots layout.width", "rows": "n layout.dim", "index": "n"},
        returns="slots layout.width",
        dtypes={"cache": "cache", "rows": "any", "index": "int32", "return": "cache"},
        judged="exact",
        mutates=("cache",),
        reads={"cache": "0"},
        writes={"cache": "min(1, n/slots)"},
    )
    def cache_write(self, cache: Array, rows: Array, index: Array, *, layout: RowLayout) -> Array:
        """Give the cache with ``rows[i]`` at ``cache[index[i]]`` as ``layout`` packs it; ``-1``
        stores nothing.

        No two indices are equal. A backend writes in place and returns the array that it was given,
        or returns another one: the caller goes on with what is returned, and never reads the one
        that it gave again.

        Packing ``kv`` and ``key`` rows quantises them as ``act_quant`` does, in E4M3 by 64 channels
        and in E2M1 by 32: what is read back is ``act_qdq`` of the rows, and rows that are on that
        grid already lose nothing.
        """
        raise NotImplementedError

    @op(
        axes={"cache": "slots layout.width", "index": "n"},
        returns="n layout.dim",
        dtypes={"cache": "cache", "index": "int32", "return": "row"},
        judged="exact",
        reads={"cache": "n/slots"},
    )
    def cache_read(self, cache: Array, index: Array, *, layout: RowLayout) -> Array:
        """Gather ``cache[index[i]]`` and unpack it: [n, layout.dim], in the activation dtype, or
        the cache's own where ``layout`` is plain. ``-1`` gives zeros. Scale bytes are 1 to 247
        (``kv``) or 253 (``key``), the most that ``act_qdq`` of a finite number needs; code times
        scale is finite.
        """
        raise NotImplementedError

    @op(
        axes={"parts": "..."},
        returns="...",
        dtypes={"parts": "any", "return": "parts"},
        judged="exact",
    )
    def concat(self, parts: Sequence[Array], *, axis: int) -> Array:
        """Join arrays of one dtype along ``axis``. A single part may be returned as it is."""
        raise NotImplementedError
