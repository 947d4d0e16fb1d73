"""Data meets size: for every op, cases in which each pair of (flavour of data, rows, variant,
memory layout) occurs.

A fault often takes two things at once: a flavour that fills a tile's last lane, a large value in a
decode kernel of its own. All combinations would be too many; a covering array holds every *pair* of
them in few cases. Rows are those of decode steps (powers of two up to 128, as servers batch them,
which fill tiles exactly), one past a tile, and three.
"""

from __future__ import annotations

import functools
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dsv4_conformance.cases.case import Case

BUCKETS = (1, 2, 3, 4, 8, 16, 32, 33, 64, 128)
ROWS = ("tokens", "seq", "rows", "n")
"""The axis that grows with a step's tokens, by the name that an op has for it."""

MOST: Mapping[str, int] = {"compress": 33, "cached_compress": 33}
"""Ops whose rows are many tokens each."""

OF_NUMBERS = ("normal", "outliers", "zero_rows", "positive", "cancel", "tiny")
EXTRA: Mapping[str, tuple[str, ...]] = {
    "sparse_attn": ("late", "early", "padding", "peaked", "strong_sink", "all_masked", "repeated"),
    "cached_sparse_attn": ("late", "early", "padding", "strong_sink", "all_masked"),
    "index_select": ("normal", "ties", "equal", "near_ties", "few_visible", "negative", "late", "all_visible"),
    "index_topk": ("normal", "ties", "few_visible", "close", "all_visible"),
    "cached_index_topk": ("normal", "ties", "few_visible", "close", "all_visible"),
    "gate": (*OF_NUMBERS, "ties", "near_ties", "strong_bias", "very_negative"),
    "gate_hash": ("normal", "zero_rows", "positive", "tiny", "very_negative"),
    "compress": ("normal", "outliers", "padding", "peaked", "first_row", "late"),
    "cached_compress": ("normal", "outliers", "padding", "peaked", "first_row", "late", "absent"),
    "dispatch": ("normal", "one_expert", "nothing_here"),
    "combine": (*OF_NUMBERS, "other_ranks", "nothing_here"),
    "moe": ("normal", "outliers", "one_expert", "other_ranks", "nothing_here", "positive"),
    "expert_linear": (*OF_NUMBERS, "one_expert", "other_ranks", "nothing_here"),
    "sample": ("normal", "ties", "peaked", "late"),
    "sample_each": ("normal", "ties", "peaked", "late", "masked", "only_one"),
    "swiglu": (*OF_NUMBERS, "clamp", "very_negative"),
    "embedding": ("normal", "ids_outside"),
    "cache_write": ("normal", "padding", "nothing", "outliers", "zero_rows"),
    "cache_read": ("normal", "padding", "nothing", "outliers", "zero_rows"),
    "concat": ("normal", "int32"),
    "apply_rope": ("normal", "far", "yarn", "outliers"),
    "rms_norm_rope": (*OF_NUMBERS, "far", "yarn"),
    "hc_split_sinkhorn": ("normal", "slow", "peaked", "outliers", "zero_rows"),
    "hc_pre": (*OF_NUMBERS, "slow"),
    "hc_pre_norm": (*OF_NUMBERS, "slow"),
    "hc_expand": ("normal",),
    "act_quant": (*OF_NUMBERS, "floor", "limits", "late"),
    "act_qdq": (*OF_NUMBERS, "floor", "limits", "late"),
    "rms_norm": (*OF_NUMBERS, "large", "late"),
}
"""Flavours of an op's own; the others take those of numbers."""


def rows_of(case: Case) -> str:
    """The axis that is varied."""
    return next(axis for axis in ROWS if axis in case.sizes)


def variants(cases: Sequence[Case]) -> list[Case]:
    """One ordinary case of each combination of scalars and formats that the op's smoke cases
    have.
    """
    found: dict[tuple[object, ...], Case] = {}
    for c in cases:
        if c.tier == "smoke" and c.data in {"normal", "ties"} and not c.views and c.sizes.get(rows_of(c)) != 1:
            found.setdefault((tuple(sorted(c.scalars.items())), tuple(sorted(c.dtypes.items()))), c)
    return list(found.values())


@functools.cache
def covering(*sizes: int) -> list[tuple[int, ...]]:
    """Rows of levels, one a factor of ``sizes`` levels, in which every pair of levels of two
    factors occurs; greedy, the same each time.
    """
    rng = np.random.default_rng(0)
    factors = range(len(sizes))
    open_pairs = {(f, g, a, b) for f, g in combinations(factors, 2) for a in range(sizes[f]) for b in range(sizes[g])}
    rows: list[tuple[int, ...]] = []
    while open_pairs:
        best, most = (0,) * len(sizes), -1
        f, g, a, b = min(open_pairs)
        for _ in range(24):
            row = [int(rng.integers(n)) for n in sizes]
            row[f], row[g] = a, b
            covered = sum((i, j, row[i], row[j]) in open_pairs for i, j in combinations(factors, 2))
            if covered > most:
                best, most = tuple(row), covered
        rows.append(best)
        open_pairs -= {(i, j, best[i], best[j]) for i, j in combinations(factors, 2)}
    return rows


def paired(op: str, cases: Sequence[Case]) -> Iterator[Case]:
    """The op's cases that make every pair meet, from those that are declared."""
    every = variants(cases)
    optional = [c for c in every if "int8" in c.dtypes.values()]  # only some backends have it: pairs of its own
    for bases in filter(None, ([c for c in every if c not in optional], optional)):
        yield from _paired(op, bases, named=len(every) > 1)


def _paired(op: str, bases: Sequence[Case], *, named: bool) -> Iterator[Case]:
    flavours = EXTRA.get(op, OF_NUMBERS)
    buckets = [n for n in BUCKETS if n <= MOST.get(op, n)]
    for base, flavour, rows, views in covering(len(bases), len(flavours), len(buckets), 2):
        case, data, n = bases[base], flavours[flavour], buckets[rows]
        sizes = {rows_of(case): n}
        if "slots" in case.sizes and "n" in case.sizes:
            sizes["slots"] = max(case.sizes["slots"], n + 1)
        name = "_".join(
            ["met", *([case.name] if named else []), data, f"{rows_of(case)}={n}", *(["views"] if views else [])]
        )
        yield case.but(name, "standard", data=data, views=bool(views), **sizes)  # type: ignore[arg-type]
