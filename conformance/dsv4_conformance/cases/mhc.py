"""Cases of hyper-connections: a function an op, with its name."""

from __future__ import annotations

from dsv4_conformance.cases.case import Case


def hc_expand() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 64}, {"hc": 4}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("views", views=True),
        base.but("flash", dim=4096),
        base.but("pro", "full", dim=7168),
    )


def hc_add() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "hc": 4, "dim": 64}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("outliers", data="outliers"),
        base.but("cancel", data="cancel"),
        base.but("views", views=True),
        base.but("flash", dim=4096),
    )


def hc_split_sinkhorn() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5}, {"hc": 4, "eps": 1e-6, "iters": 20}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("slow", "smoke", data="slow"),  # mixes that converge slowly: every iteration shows
        base.but("turned", data="turned"),  # scales below zero
        base.but("peaked", data="peaked"),
        base.but("iters=1", data="slow", iters=1),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("long", "full", tokens=4097, data="slow"),
    )


def hc_pre() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "hc": 4, "dim": 64}, {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("slow", "smoke", data="slow"),
        base.but("near_eps", data="tiny"),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("turned", data="turned"),  # scales below zero
        base.but("views", views=True),
        base.but("flash", dim=4096),
        base.but("pro", "full", dim=7168, tokens=17),
    )


def hc_post() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "hc": 4, "dim": 64}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("cancel", "smoke", data="cancel"),
        base.but("nan", data="nan"),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", dim=4096),
        base.but("pro", "full", dim=7168, tokens=17),
    )


def hc_head() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "hc": 4, "dim": 64}, {"norm_eps": 1e-6, "eps": 1e-6}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("near_eps", data="tiny"),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("turned", data="turned"),  # scales below zero
        base.but("views", views=True),
        base.but("flash", dim=4096),
        base.but("pro", "full", dim=7168, tokens=17),
    )


def hc_pre_norm() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "hc": 4, "dim": 64}, {"norm_eps": 1e-6, "eps": 1e-6, "iters": 20}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("slow", "smoke", data="slow"),
        base.but("near_eps", data="tiny"),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", dim=4096),
    )
