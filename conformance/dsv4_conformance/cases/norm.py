"""Cases of norms and RoPE: a function an op, with its name."""

from __future__ import annotations

from dsv4_conformance.cases.case import Case


def rms_norm() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256}, {"eps": 1e-6}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("dim=72", dim=72),  # no power of two
        base.but("unweighted", "smoke", dtypes={"weight": "none"}, dim=128),
        base.but("near_eps", "smoke", data="tiny"),  # mean(x^2) is of the size of eps
        base.but("zero_rows", data="zero_rows"),
        base.but("outliers", data="outliers"),
        base.but("large", data="large"),
        base.but("nan", data="nan"),
        base.but("subnormal", data="subnormal"),
        base.but("views", views=True),
        base.but("unweighted_views", views=True, dtypes={"weight": "none"}),
        base.but("flash", dim=4096),
        base.but("flash_heads", "full", tokens=640, dim=512, dtypes={"weight": "none"}),
        base.but("flash_q_lora", "full", tokens=33, dim=1024),
        base.but("pro", "full", tokens=33, dim=7168),
    )


def apply_rope() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "heads": 2, "dim": 128, "half": 32}, {"inverse": False}, tier="smoke")
    return (
        base,
        base.but("inverse", "smoke", inverse=True),
        base.but("inverse_of_one_head", "smoke", inverse=True, heads=1),  # a rank's share of few heads
        base.but("one_head", heads=1),
        *base.odd(),
        base.but("whole_head", dim=64),
        base.but("half=16", half=16),
        base.but("far", "smoke", data="far"),  # positions up to 2^20: float32 angles
        base.but("far_inverse", data="far", inverse=True),
        base.but("yarn", data="yarn"),
        base.but("everywhere", data="everywhere", tokens=84),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", heads=64, dim=512, data="yarn"),
        base.but("pro", "full", heads=128, dim=512, data="far"),
    )


def rms_norm_rope() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "heads": 2, "dim": 128, "half": 32}, {"eps": 1e-6}, tier="smoke")
    return (
        base,
        base.but("unweighted", "smoke", dtypes={"weight": "none"}),  # a query's heads
        base.but("one_head", "smoke", heads=1),  # a key/value row
        *base.odd(),
        base.but("whole_head", dim=64),
        base.but("half=16", half=16),
        base.but("near_eps", "smoke", data="tiny"),  # mean(x^2) is of the size of eps
        base.but("far", "smoke", data="far"),  # positions up to 2^20: float32 angles
        base.but("yarn", data="yarn"),
        base.but("everywhere", data="everywhere", tokens=84),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("nan", data="nan"),
        base.but("views", views=True),
        base.but("unweighted_views", views=True, dtypes={"weight": "none"}),
        base.but("flash", heads=64, dim=512, data="yarn", dtypes={"weight": "none"}),
        base.but("flash_row", heads=1, dim=512),
        base.but("pro", "full", heads=128, dim=512, data="far", dtypes={"weight": "none"}),
    )
