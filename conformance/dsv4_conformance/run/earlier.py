"""Failures that need an earlier call: what fails in a run and passes on its own, and the pair that
shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_conformance.check import BAD, Check, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Fresh = Callable[[Sequence[Check]], Sequence[Finding]]
    """Runs checks one after another in a process of their own."""

LOOKED_AT = 2  # failures of a run: each takes a dozen processes at most
REACH = 64  # checks before it


def explain(failing: Check, before: Sequence[Check], fresh: Fresh) -> list[Check] | None:
    """Checks after which it fails, itself last; None where it fails on its own, or none of those
    ``before`` is to blame.

    The shortest run of checks before it that still makes it fail is found by halving; where its
    first one is enough, it is a pair.
    """

    def fails(chain: Sequence[Check]) -> bool:
        return fresh(chain)[-1].status in BAD

    chain = list(before[-REACH:])
    if fails([failing]) or not chain or not fails([*chain, failing]):
        return None
    enough, few = len(chain), 0  # it fails after the last ``enough``, and not after the last ``few``
    while enough - few > 1:
        middle = (enough + few) // 2
        if fails([*chain[-middle:], failing]):
            enough = middle
        else:
            few = middle
    pair = [chain[-enough], failing]
    return pair if enough == 1 or fails(pair) else [*chain[-enough:], failing]


def words(chain: Sequence[Check]) -> str:
    """What is added to the failure's message."""
    cases = " ".join(f"--case {c.id}" for c in chain)
    what = chain[0].id if len(chain) == 2 else f"{len(chain) - 1} checks, from {chain[0].id} on"
    return f"passes on its own and fails after {what}: something is kept between calls; re-run {cases}"
