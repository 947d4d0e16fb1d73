"""Every mutant and every honest variant, by name."""

from __future__ import annotations

from dsv4_conformance.museum import (
    attending,
    constants,
    drafting,
    meetings,
    numbers,
    promises,
    remembering,
    routing,
    sizes,
    streams,
    unseen,
)
from dsv4_conformance.museum.fault import MUTANTS
from dsv4_conformance.museum.honest import VARIANTS

FAMILIES = (numbers, routing, attending, streams, remembering, sizes, meetings, promises, drafting, unseen, constants)
"""The modules whose import registers the mutants."""

__all__ = ["FAMILIES", "MUTANTS", "VARIANTS"]
