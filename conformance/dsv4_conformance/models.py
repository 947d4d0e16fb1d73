"""Checks of this kind (being written)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsv4_conformance.checks import Check
    from dsv4_core.spec import Numerics


def checks(numerics: Numerics) -> list[Check]:
    """Give the checks."""
    del numerics
    return []
