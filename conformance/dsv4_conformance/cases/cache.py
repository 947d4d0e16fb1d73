"""Cases of cache rows and joining: a function an op, with its name."""

from __future__ import annotations

from dsv4_conformance.cases.case import Case


def cache_write() -> tuple[Case, ...]:
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
                base.but(f"{base.name}_off_grid", "smoke", data="off_grid"),  # packing quantises
                base.but(f"{base.name}_zero_rows", data="zero_rows"),
                base.but(f"{base.name}_subnormal", data="subnormal"),
                base.but(f"{base.name}_views", views=True),
            )
        ),
        *(
            base.but(f"{base.name}_{data}", data=data, slots=300, n=280)
            for base in (kv, key, plain)
            for data in ("run", "run_with_holes")  # a copy of whole pages
        ),
        plain.but("state", dim=2048, dtypes={"cache": "wide"}),  # of the compressor: kv and score, each of two halves
        plain.but("state_run", dim=2048, dtypes={"cache": "wide"}, data="run", slots=300, n=130),
        kv.but("flash_kv", slots=300, n=129, dim=512),
        key.but("flash_key", slots=300, n=129),
        kv.but("past_2^31_bytes", "full", slots=3700000, dim=512, data="sparse"),
    )


def cache_read() -> tuple[Case, ...]:
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
        *(
            base.but(f"{base.name}_{data}", data=data, slots=300, n=280)
            for base in (kv, key, plain)
            for data in ("run", "run_with_holes")  # a copy of whole pages
        ),
        plain.but("state", dim=2048, dtypes={"cache": "wide"}),  # of the compressor: kv and score, each of two halves
        plain.but("state_run", dim=2048, dtypes={"cache": "wide"}, data="run", slots=300, n=130),
        kv.but("flash_kv", slots=300, n=129, dim=512),
        key.but("flash_key", slots=300, n=129),
        kv.but("past_2^31_bytes", "full", slots=3700000, dim=512, data="sparse"),
    )


def concat() -> tuple[Case, ...]:
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
