"""Cases of quantisation: a function an op, with its name."""

from __future__ import annotations

from dsv4_conformance.cases.case import Case


def act_quant() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256}, {"block": 128}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("midpoints", "smoke", data="midpoints", tokens=16),
        base.but("scale_edges", "smoke", data="scale_edges", tokens=384),
        base.but("all_codes", data="all_codes", tokens=4),
        base.but("zero_rows", data="zero_rows"),
        base.but("outliers", data="outliers"),
        base.but("near_floor", data="floor"),
        base.but("limits", data="limits"),
        base.but("subnormal", data="subnormal"),
        base.but("views", views=True),
        base.but("block=64", block=64),
        base.but("flash", dim=4096),
        base.but("pro", "full", tokens=65, dim=7168),
    )


def act_qdq() -> tuple[Case, ...]:
    kv = Case("kv", {"tokens": 5, "dim": 128}, {"format": "e4m3", "block": 64, "channels": 64}, tier="smoke")
    key = Case("key", {"tokens": 5, "dim": 128}, {"format": "e2m1", "block": 32, "channels": 128}, tier="smoke")
    return (
        *tuple(
            case
            for base in (kv, key)
            for case in (
                base,
                *(odd.but(f"{base.name}_{odd.name}", odd.tier) for odd in base.odd()),
                base.but(f"{base.name}_midpoints", "smoke", data="midpoints", tokens=17),
                base.but(f"{base.name}_scale_edges", "smoke", data="scale_edges", tokens=768),
                base.but(f"{base.name}_zero_rows", data="zero_rows"),
                base.but(f"{base.name}_outliers", data="outliers"),
                base.but(f"{base.name}_near_floor", data="floor"),
                base.but(f"{base.name}_limits", data="limits"),
                base.but(f"{base.name}_subnormal", data="subnormal"),
                base.but(f"{base.name}_views", views=True),
            )
        ),
        kv.but("kv_all_codes", data="all_codes", tokens=8),
        kv.but("flash_kv", tokens=33, dim=512, channels=448),
        key.but("flash_key", tokens=640),
    )


def hadamard() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 64}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("dim=32", dim=32),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", tokens=320, dim=128),
    )
