"""Cases of mixture of experts: a function an op, with its name."""

from __future__ import annotations

from dsv4_conformance.cases.case import Case


def gate() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256, "experts": 16}, {"topk": 3, "route_scale": 1.5}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("ties", "smoke", data="ties", experts=64, topk=5),  # pairs are equal: an odd number parts one
        base.but(
            "ties_tokens=1", "smoke", data="ties", experts=64, topk=5, tokens=1
        ),  # a decode step has code of its own
        base.but("all_equal", data="equal", experts=64, topk=6),
        base.but("near_ties", "smoke", data="near_ties", experts=64, topk=6),
        base.but("strong_bias", "smoke", data="strong_bias"),
        base.but("all_experts", topk=16),
        base.but("outliers", data="outliers"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("experts=10", experts=10),
        base.but("flash", dim=4096, experts=256, topk=6),
        base.but("pro", "full", dim=7168, experts=384, topk=6, route_scale=2.5),
    )


def gate_hash() -> tuple[Case, ...]:
    base = Case(
        "small", {"tokens": 5, "dim": 256, "experts": 16, "vocab": 64, "topk": 3}, {"route_scale": 1.5}, tier="smoke"
    )
    return (
        base,
        *base.odd(),
        base.but("zero_rows", data="zero_rows"),
        base.but("ends", tokens=9, vocab=129280, data="ends"),
        base.but("views", views=True),
        base.but("flash", dim=4096, experts=256, topk=6),
        base.but("pro", "full", dim=7168, experts=384, topk=6, route_scale=2.5),
    )


def dispatch() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 64, "topk": 3}, {"first_expert": 0, "n_experts": 8}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("one_expert", "smoke", data="one_expert"),
        base.but("other_ranks", "smoke", first_expert=3, n_experts=2),
        base.but("nothing_here", data="nothing_here"),
        base.but("topk=1", topk=1),
        base.but("views", views=True),
        base.but("flash", tokens=33, dim=4096, topk=6, n_experts=256),
        base.but("flash_rank", "full", tokens=129, dim=4096, topk=6, first_expert=32, n_experts=32),
    )


def swiglu() -> tuple[Case, ...]:
    base = Case("routed", {"rows": 5, "inter": 128}, {"limit": 10.0}, tier="smoke")
    shared = {"weights": "none"}
    return (
        base,
        base.but("shared", "smoke", dtypes=shared),
        *base.odd("rows"),
        base.but("at_the_clamp", "smoke", data="clamp"),
        base.but("shared_at_the_clamp", "smoke", data="clamp", dtypes=shared),
        base.but("limit=2", data="clamp", limit=2.0),
        base.but("nan", "smoke", data="nan"),
        base.but("zero_rows", data="zero_rows"),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", rows=33, inter=2048),
        base.but("pro", "full", rows=129, inter=3072),
    )


def combine() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 64, "experts": 8}, {"topk": 3, "out_dtype": "act"}, tier="smoke")
    return (
        base,
        base.but("routed_alone", "smoke", dtypes={"shared": "none"}),
        base.but("wide", out_dtype="wide", dtypes={"shared": "none"}),
        *base.odd(),
        base.but("other_ranks", "smoke", data="other_ranks"),
        base.but("nothing_here", data="nothing_here"),
        base.but("cancel", data="cancel"),
        base.but("outliers", data="outliers"),
        base.but("views", views=True),
        base.but("flash", tokens=17, dim=4096, topk=6, experts=256),
        base.but("pro", "full", tokens=65, dim=7168, topk=6, experts=384),
    )


def ffn() -> tuple[Case, ...]:
    fp8 = {"w1": "e4m3", "w3": "e4m3", "w2": "e4m3"}
    base = Case("fp8", {"tokens": 5, "dim": 256, "inter": 128}, {"limit": 10.0}, dtypes=fp8, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("clamped", "smoke", limit=0.5),
        base.but("clamped_tokens=1", "smoke", limit=0.5, tokens=1),
        base.but("bf16", dtypes=dict.fromkeys(fp8, "bfloat16")),
        base.but("bf16_tokens=1", dtypes=dict.fromkeys(fp8, "bfloat16"), tokens=1),
        base.but("outliers", data="outliers"),
        base.but("floor", data="below_floor"),
        base.but("views", views=True),
        base.but("flash", tokens=2, dim=4096, inter=2048),
    )


def moe() -> tuple[Case, ...]:
    fp4 = {"w1": "e2m1", "w3": "e2m1", "w2": "e2m1"}
    base = Case(
        "fp4",
        {"tokens": 5, "dim": 128, "inter": 128, "experts": 6, "topk": 2},
        {"first_expert": 0, "limit": 10.0, "out_dtype": "act"},
        dtypes=fp4,
        tier="smoke",
    )
    return (
        base,
        base.but("fp8", dtypes=dict.fromkeys(fp4, "e4m3")),
        base.but("routed_alone", "smoke", dtypes={"shared": "none"}, out_dtype="wide"),
        *base.odd(),
        base.but("clamped", "smoke", limit=0.5),
        base.but("clamped_tokens=1", "smoke", limit=0.5, tokens=1),  # a decode step has code of its own
        base.but("bf16_tokens=1", dtypes=dict.fromkeys(fp4, "bfloat16"), tokens=1),
        base.but(
            "bf16_tokens=5462", dtypes=dict.fromkeys(fp4, "bfloat16"), tokens=5462, topk=6, experts=8, dim=32, inter=32
        ),  # past 2^15 copies
        base.but("one_expert", "smoke", data="one_expert"),
        base.but("other_ranks", "smoke", data="other_ranks", first_expert=2),
        base.but("other_ranks_tokens=1", "smoke", data="other_ranks", first_expert=2, tokens=1),
        base.but("nothing_here", data="nothing_here"),
        base.but("outliers", data="outliers"),
        base.but("floor", data="below_floor"),
        base.but("views", views=True),
        base.but("flash", tokens=1, dim=4096, inter=2048, experts=2, topk=2),
        base.but("flash_three", "full", tokens=3, dim=4096, inter=2048, experts=8, topk=6),
    )
