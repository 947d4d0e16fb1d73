"""Two axes of an op at large extents at once, the others tiny.

A kernel for many heads has little room left for picks, a batch's third sequence lies far off where
sequences are long: neither axis shows it alone. ``extents`` has one axis beside one row and beside
a chunk's; where no published extent is affordable beside another axis, ``MIDDLE`` stands for it.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

from dsv4_conformance.cases.extents import AFFORDABLE, EXTENTS, ROW_CLASSES
from dsv4_conformance.cases.pairs import rows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dsv4_conformance.cases.case import Case

    Change = dict[str, Any]

OF_TWO = frozenset({"gate", "index_scores", "index_select", "index_topk", "sparse_attn"})
"""Ops that choose or attend along several axes; products have cases of their own."""
MIDDLE = 4097  # past any tile, and any block of tiles
MOST = ROW_CLASSES[-1] * MIDDLE  # the product of two extents


def joined(op: str, cases: Sequence[Case]) -> Iterator[Case]:
    """The op's cases in which each pair of its axes is large, from those that are declared."""
    base = cases[0]
    for a, b in combinations(dict.fromkeys(next(iter(c)) for c in EXTENTS.get(op, ())), 2) if op in OF_TWO else ():
        if found := _largest(op, base, a, b):
            yield base.but(f"at_{a}={found[a]}_{b}={found[b]}", **found)


def _extents(op: str, base: Case, axis: str) -> list[Change]:
    """The changes that make one axis large, the middle extent among them."""
    if axis == rows_of(base):
        return [{axis: ROW_CLASSES[-1]}]
    published = [c for c in EXTENTS[op] if next(iter(c)) == axis and c["data"] == "normal"]
    return [*published, *({**c, axis: MIDDLE} for c in published if c[axis] > MIDDLE)]


def _largest(op: str, base: Case, a: str, b: str) -> Change:
    """The changes to the extents of the largest affordable product; none where ``extents`` has a
    chunk's rows beside the other axis.
    """
    first, second = (_extents(op, base, axis) for axis in (a, b))
    if (row := rows_of(base)) in (a, b):
        other = b if row == a else a
        if any(
            c[other] * ROW_CLASSES[-1] <= AFFORDABLE and c[other] != MIDDLE for c in (second if row == a else first)
        ):
            return {}
    fitting = [(p, q) for p in first for q in second if p[a] * q[b] <= MOST]
    if not fitting:
        return {}
    p, q = max(fitting, key=lambda pq: pq[0][a] * pq[1][b])
    merged = {**q, **p, a: p[a], b: q[b]}
    return {k: v for k, v in merged.items() if k in base.sizes or k in base.scalars}
