"""Cases of embedding and sampling: a function an op, with its name."""

from __future__ import annotations

from dsv4_conformance.cases.case import Case


def embedding() -> tuple[Case, ...]:
    base = Case("small", {"tokens": 5, "vocab": 64, "dim": 128}, tier="smoke")
    return (
        base,
        *base.odd(),
        base.but("ids_outside", "smoke", data="ids_outside"),
        base.but("views", views=True),
        base.but("float32", dtypes={"weight": "float32"}),
        base.but("ends", tokens=9, vocab=129280, dim=16, data="ends"),
        base.but("flash", tokens=7, vocab=2048, dim=4096),
        base.but("pro", "full", tokens=7, vocab=2048, dim=7168),
    )


def sample() -> tuple[Case, ...]:
    base = Case("greedy", {"tokens": 5, "vocab": 512}, {"temperature": 0.0, "top_p": 1.0}, tier="smoke")
    return (
        base,
        base.but("greedy_ties", "smoke", data="ties"),
        base.but("warm", "smoke", temperature=0.7, top_p=0.9),
        base.but("greedy_no_number", "smoke", data="no_number"),
        base.but("warm_no_number", "smoke", data="no_number", temperature=0.7, top_p=0.9),
        base.but("masked", data="masked", temperature=0.7, top_p=0.9),
        base.but("edges", temperature=1.0, data="edges"),
        base.but("edges_top_p=0.9", temperature=1.0, top_p=0.9, data="edges"),
        base.but("top_p=0", temperature=1.0, top_p=0.0),
        base.but("warm_ties", data="ties", temperature=1.0, top_p=0.5),
        *base.odd(sizes=(0, 1, 17)),
        base.but("views", views=True, temperature=0.7),
        base.but("flash", vocab=129280, temperature=0.7, top_p=0.95),
    )


def sample_each() -> tuple[Case, ...]:
    base = Case("some_greedy", {"tokens": 6, "vocab": 500, "changed": 5}, {"likely": 3}, tier="smoke")
    return (
        base,
        base.but("ties", "smoke", data="ties"),
        base.but("no_number", "smoke", data="no_number"),
        base.but("nothing_changed", "smoke", changed=0, dtypes={"allowed": "none"}),
        base.but("nothing_told", "smoke", likely=0),
        base.but("twenty_told", likely=20),
        base.but("only_one_allowed", "smoke", data="only_one"),
        base.but("whole_words", vocab=512),
        base.but("holes", tokens=12, data="holes"),
        base.but("masked", data="masked"),
        base.but("edges", data="edges"),
        base.but("views", views=True),
        *base.odd(sizes=(0, 1, 17)),
        base.but("flash", vocab=129280, likely=20),
    )
