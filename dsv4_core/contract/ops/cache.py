"""Cache rows: packed writes, gathered reads. Slots are row numbers; a row's address may pass 2^31 bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_core.contract.spec import Array, Case, Ops, op

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.dtypes import RowLayout


def _cache_write_cases() -> tuple[Case, ...]:
    kv = Case("kv", {"slots": 12, "n": 5, "dim": 128, "rope_dim": 64}, {"layout": "kv"}, tier="smoke")
    key, plain = kv.but("key", "smoke", layout="key", rope_dim=0), kv.but("plain", "smoke", layout="plain", rope_dim=0)
    return (
        *tuple(
            case
            for base in (kv, key, plain)
            for case in (
                base,
                base.but(f"{base.name}_padding", "smoke", data="padding"),
                base.but(f"{base.name}_nothing", data="nothing"),
                base.but(f"{base.name}_full", n=12),
                base.but(f"{base.name}_n=0", n=0),
                base.but(f"{base.name}_outliers", data="outliers"),
                base.but(f"{base.name}_zero_rows", data="zero_rows"),
                base.but(f"{base.name}_subnormal", data="subnormal"),
                base.but(f"{base.name}_views", views=True),
            )
        ),
        kv.but("flash_kv", slots=300, n=129, dim=512),
        key.but("flash_key", slots=300, n=129),
        kv.but("past_2^31_bytes", "full", slots=3700000, dim=512, data="sparse"),
    )


def _cache_read_cases() -> tuple[Case, ...]:
    kv = Case("kv", {"slots": 12, "n": 5, "dim": 128, "rope_dim": 64}, {"layout": "kv"}, tier="smoke")
    key, plain = kv.but("key", "smoke", layout="key", rope_dim=0), kv.but("plain", "smoke", layout="plain", rope_dim=0)
    return (
        *tuple(
            case
            for base in (kv, key, plain)
            for case in (
                base,
                base.but(f"{base.name}_padding", "smoke", data="padding"),
                base.but(f"{base.name}_nothing", data="nothing"),
                base.but(f"{base.name}_repeated", n=33),
                base.but(f"{base.name}_n=0", n=0),
                base.but(f"{base.name}_views", views=True),
            )
        ),
        kv.but("kv_every_code", "smoke", data="every_code", slots=256, n=256),
        key.but("key_every_code", "smoke", data="every_code", slots=256, n=256),
        kv.but("flash_kv", slots=300, n=129, dim=512),
        key.but("flash_key", slots=300, n=129),
        kv.but("past_2^31_bytes", "full", slots=3700000, dim=512, data="sparse"),
    )


def _concat_cases() -> tuple[Case, ...]:
    base = Case("rows", {"parts": 3, "n": 5, "dim": 64}, {"axis": 0}, tier="smoke")
    return (
        base,
        base.but("channels", "smoke", axis=1),
        base.but("indices", data="int32", axis=1),
        base.but("one_part", parts=1),
        base.but("an_empty_part", data="an_empty_part"),
        base.but("views", views=True),
        base.but("flash", n=129, dim=512),
    )


class CacheOps(Ops):
    """Scatter, gather, concatenate."""

    @op(
        axes={"cache": "slots layout.width", "rows": "n layout.dim", "index": "n"},
        returns="",
        dtypes={"cache": "cache", "rows": "any", "index": "int32"},
        judged="exact",
        mutates=("cache",),
        reads={"cache": "0"},
        writes={"cache": "min(1, n/slots)"},
        cases=_cache_write_cases,
    )
    def cache_write(self, cache: Array, rows: Array, index: Array, *, layout: RowLayout) -> None:
        """Store ``rows[i]`` at ``cache[index[i]]`` as ``layout`` packs it; ``-1`` stores nothing.

        No two indices are equal.

        ``kv`` and ``key`` rows are on their format's grid already (``act_qdq``), so that packing, which quantises
        again, loses nothing.
        """
        raise NotImplementedError

    @op(
        axes={"cache": "slots layout.width", "index": "n"},
        returns="n layout.dim",
        dtypes={"cache": "cache", "index": "int32", "return": "row"},
        judged="exact",
        reads={"cache": "n/slots"},
        cases=_cache_read_cases,
    )
    def cache_read(self, cache: Array, index: Array, *, layout: RowLayout) -> Array:
        """Gather ``cache[index[i]]`` and unpack it: [n, layout.dim], in the activation dtype, or the cache's own where
        ``layout`` is plain. ``-1`` gives zeros. Scale bytes are 1 to 247 (``kv``) or 253 (``key``), the most that
        ``act_qdq`` of a finite number needs; code times scale is finite.
        """
        raise NotImplementedError

    @op(
        axes={"parts": "..."},
        returns="...",
        dtypes={"parts": "any", "return": "parts"},
        judged="exact",
        cases=_concat_cases,
    )
    def concat(self, parts: Sequence[Array], *, axis: int) -> Array:
        """Join arrays of one dtype along ``axis``. A single part may be returned as it is."""
        raise NotImplementedError
