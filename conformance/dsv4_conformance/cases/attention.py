"""Cases of attention and the indexer: a function an op, with its name."""

from __future__ import annotations

from dsv4_conformance.cases.case import Case


def _windows(plain: Case, overlapping: Case) -> tuple[Case, ...]:
    return (
        plain,
        overlapping,
        *overlapping.odd("rows"),
        overlapping.but("first_row", "smoke", data="first_row"),  # no previous window
        overlapping.but("padding", "smoke", data="padding"),  # rows without a token
        overlapping.but("holes", "smoke", data="holes"),  # tokens missing anywhere in a window
    )


def compress() -> tuple[Case, ...]:
    plain = Case("ratio=128", {"rows": 2, "ratio": 128}, {"dim": 64}, tier="smoke")
    overlapping = Case("ratio=4", {"rows": 5, "ratio": 4}, {"dim": 64}, tier="smoke")
    return (
        *_windows(plain, overlapping),
        plain.but("holes_128", data="holes"),
        overlapping.but("outliers", data="outliers"),
        overlapping.but("peaked", data="peaked"),
        plain.but("peaked_128", data="peaked"),
        *(
            base.but(f"{base.name}_{data}", data=data)
            for base in (plain, overlapping)
            for data in ("far_above", "far_below")
        ),
        plain.but("padding_128", data="padding"),
        overlapping.but("views", views=True),
        overlapping.but("flash_ratio=4", rows=33, dim=512),
        overlapping.but("flash_indexer", rows=33, dim=128),
        plain.but("flash_ratio=128", rows=3, dim=512),
    )


def kv_score() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "dim": 256, "width": 64}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("width=72", width=72),  # no power of two
        base.but("dim=200", dim=200),
        base.but("fp8", dim=256, width=128, dtypes={"wkv": "e4m3", "wgate": "e4m3"}),
        base.but("outliers", data="outliers"),
        base.but("positive", data="positive"),
        base.but("zero_rows", data="zero_rows"),
        base.but("nan", data="nan"),
        base.but("views", views=True),
        base.but("flash", dim=4096, width=1024),
    )


def cached_compress() -> tuple[Case, ...]:
    plain = Case("ratio=128", {"rows": 2, "ratio": 128, "slots": 200}, {"dim": 64}, tier="smoke")
    overlapping = Case("ratio=4", {"rows": 5, "ratio": 4, "slots": 40}, {"dim": 64}, tier="smoke")
    return (
        *_windows(plain, overlapping),
        overlapping.but("absent", "smoke", data="absent"),  # slots of -1: a token of zeros, which counts
        plain.but("absent_128", data="absent"),
        overlapping.but("outliers", data="outliers"),
        overlapping.but("peaked", data="peaked"),
        overlapping.but("views", views=True),
        overlapping.but("flash_ratio=4", rows=33, slots=200, dim=512),
        plain.but("flash_ratio=128", rows=3, slots=600, dim=512),
    )


def index_scores() -> tuple[Case, ...]:
    base = Case("small", {"batch": 2, "seq": 3, "heads": 4, "dim": 64, "rows": 20}, {"scale": 0.0625}, tier="smoke")
    return (
        base,
        *base.odd("rows"),
        *(odd.but(f"odd_{odd.name}", odd.tier) for odd in base.odd("seq", sizes=(0, 1, 17))),
        base.but("outliers", data="outliers"),
        base.but("on_grid", data="fp4"),
        base.but("zero_rows", data="zero_rows"),
        base.but("views", views=True),
        base.but("flash", batch=1, heads=64, dim=128, rows=257, scale=0.011048543456039806),  # 128^-0.5 * 64^-0.5
        base.but("flash_long", "full", batch=1, heads=64, dim=128, rows=8193, scale=0.011048543456039806),
    )


def index_select() -> tuple[Case, ...]:
    base = Case("small", {"batch": 2, "seq": 3, "rows": 40}, {"topk": 8}, tier="smoke")
    return (
        base,
        base.but("ties", "smoke", data="ties"),
        base.but("all_equal", "smoke", data="equal"),
        base.but("few_visible", "smoke", data="few_visible"),
        base.but("near_ties", data="near_ties"),
        base.but("topk=rows", topk=40),
        base.but("negative", data="negative"),
        base.but("limits", data="limits"),
        *base.odd("seq", sizes=(0, 1, 17, 65)),
        base.but("one_row", rows=1, topk=1),
        base.but("views", views=True),
        base.but("flash", rows=2049, topk=512),
        base.but("pro", "full", rows=8193, topk=1024, data="ties"),
    )


def sparse_attn() -> tuple[Case, ...]:
    base = Case(
        "small",
        {"tokens": 5, "heads": 4, "dim": 128, "rows": 40, "picks": 16},
        {"softmax_scale": 0.08838834764831845},
        tier="smoke",
    )
    return (
        base,
        *base.odd(),
        *base.odd("picks", sizes=(1, 17, 33)),
        base.but("padding", "smoke", data="padding"),
        base.but("all_masked", "smoke", data="all_masked"),
        base.but("strong_sink", "smoke", data="strong_sink"),
        base.but("peaked", "smoke", data="peaked"),  # scores far apart: exp must not overflow
        base.but("repeated", data="repeated"),
        base.but("outliers", data="outliers"),
        base.but("cancel", data="cancel"),
        base.but("zero_rows", data="zero_rows"),
        base.but("shared_rows", data="shared_rows", tokens=65, rows=80),  # neighbours list the same rows
        base.but("views", views=True),
        base.but("flash", tokens=3, heads=64, dim=512, rows=300, picks=192, softmax_scale=512**-0.5, data="padding"),
        base.but("flash_csa", "full", tokens=5, heads=64, dim=512, rows=1200, picks=640, softmax_scale=512**-0.5),
        base.but("pro_csa", "full", tokens=3, heads=128, dim=512, rows=2000, picks=1152, softmax_scale=512**-0.5),
    )


def index_topk() -> tuple[Case, ...]:
    base = Case(
        "small", {"batch": 2, "seq": 3, "heads": 4, "dim": 64, "rows": 40}, {"scale": 0.0625, "topk": 8}, tier="smoke"
    )
    return (
        base,
        base.but("ties", "smoke", data="ties"),
        base.but("few_visible", data="few_visible"),
        base.but("on_grid", data="fp4"),
        *base.odd("seq", sizes=(0, 1, 17)),
        base.but("topk=rows", topk=40),
        base.but("views", views=True),
        base.but("flash", batch=1, heads=64, dim=128, rows=600, topk=512, scale=0.011048543456039806),
    )


def cached_index_topk() -> tuple[Case, ...]:
    base = Case(
        "small",
        {"batch": 2, "seq": 3, "heads": 4, "dim": 64, "rows": 40, "slots": 100, "rope_dim": 0},
        {"layout": "key", "scale": 0.0625, "topk": 8},
        tier="smoke",
    )
    return (
        base,
        base.but("ties", "smoke", data="ties"),
        base.but("few_visible", data="few_visible"),
        base.but("runs", slots=112, data="runs"),  # keys that may be read where they lie
        base.but("plain_runs", slots=112, data="runs", layout="plain"),
        *base.odd("seq", sizes=(0, 1, 17)),
        base.but("views", views=True),
        base.but("flash", batch=1, heads=64, dim=128, rows=600, slots=700, topk=512, scale=0.011048543456039806),
        base.but("past_2^31_bytes", "full", heads=16, dim=128, slots=32_000_000, data="sparse"),
    )


def cached_sparse_attn() -> tuple[Case, ...]:
    base = Case(
        "small",
        {
            "tokens": 5,
            "heads": 4,
            "dim": 128,
            "rope_dim": 64,
            "ring_slots": 24,
            "recent": 16,
            "row_slots": 40,
            "old": 20,
            "picks": 24,
        },
        {"layout": "kv", "softmax_scale": 0.08838834764831845},
        tier="smoke",
    )
    return (
        base,
        base.but("window_alone", "smoke", dtypes={"rows": "none"}),
        *base.odd(),
        base.but("padding", "smoke", data="padding"),
        base.but("all_masked", data="all_masked"),
        base.but("strong_sink", data="strong_sink"),
        base.but("no_recent_rows", recent=0),
        base.but("no_recent_rows_padding", recent=0, data="padding"),
        base.but("views", views=True),
        base.but("flash", tokens=2, heads=64, dim=512, recent=127, ring_slots=136, picks=148, softmax_scale=512**-0.5),
        base.but("past_2^31_bytes", "full", dim=512, row_slots=3_700_000, data="sparse", softmax_scale=512**-0.5),
    )
