"""Running the museum: what kills each mutant, and that no honest variant is failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from dsv4_core import registry

import dsv4_conformance.museum.attending
import dsv4_conformance.museum.numbers
import dsv4_conformance.museum.remembering
import dsv4_conformance.museum.routing
import dsv4_conformance.museum.streams  # noqa: F401  each registers its mutants
from dsv4_conformance.checks import BAD, Check, Finding, Session, collect
from dsv4_conformance.museum.fault import MUTANTS, Mutant
from dsv4_conformance.museum.honest import VARIANTS, Variant
from dsv4_conformance.runner import run_check

if TYPE_CHECKING:
    from dsv4_core.backend import Backend
    from dsv4_core.spec import Numerics

DEADLY = BAD - {"xpassed"}


@dataclass(frozen=True)
class Kill:
    """What became of a mutant. ``finding`` is None for a survivor."""

    mutant: Mutant
    finding: Finding | None
    tier: str
    checks: int
    seconds: float


def right_backend() -> type[Backend]:
    """The backend that the installed oracle stands for: mutants and variants are made of it."""
    for entry in metadata.entry_points(group=registry.ORACLES):
        return registry.backend_class(entry.name)
    raise RuntimeError("no oracle is installed (entry points dsv4.oracles)")


def hunt(mutant: Mutant, numerics: Numerics = "native", tier: str = "standard") -> Kill:
    """Run checks, smoke first, until one fails."""
    begin, count = time.perf_counter(), 0
    cls = mutant.build(right_backend())
    for level in ("smoke", "standard")[: 1 if tier == "smoke" else 2]:
        session = Session(cls(numerics=numerics), level)  # type: ignore[arg-type]
        for check in in_order(level, numerics):
            count += 1
            finding = run_check(check, session)
            if finding.status in DEADLY:
                return Kill(mutant, finding, level, count, time.perf_counter() - begin)
    return Kill(mutant, None, "", count, time.perf_counter() - begin)


def in_order(tier: str, numerics: Numerics) -> list[Check]:
    """Checks of a tier and not below it, op cases first: they are quick and name the op."""
    every = [c for c in collect("standard", numerics) if c.tier == tier and c.group != "invariance"]
    return sorted(every, key=lambda c: ("op", "trace", "law", "model").index(c.group))


def hunt_all(names: tuple[str, ...] = (), tier: str = "standard") -> Iterator[Kill]:
    """Hunt every mutant, or those named."""
    for name, mutant in MUTANTS.items():
        if not names or name in names:
            yield hunt(mutant, tier=tier)


@dataclass
class Honesty:
    """How an honest variant fared: cases run, false alarms, and the largest share of a budget that it used."""

    variant: Variant
    cases: int = 0
    alarms: list[Finding] | None = None
    used: float = 0.0
    at: str = ""
    seconds: float = 0.0


def trial(variant: Variant, numerics: Numerics, seeds: int, keep: Callable[[Check], bool], shares: list[float] | None = None) -> Honesty:
    """Run op cases on a variant over several seeds; ``shares`` collects every case's share of its budget."""
    begin = time.perf_counter()
    backend = variant.build(right_backend())(numerics=numerics)
    result = Honesty(variant, alarms=[])
    assert result.alarms is not None
    chosen = [c for c in collect("standard", numerics) if keep(c)]
    for repeat in range(seeds):
        session = Session(backend, "standard", repeat)
        for check in chosen:
            finding = run_check(check, session)
            result.cases += 1
            if finding.status in DEADLY:
                result.alarms.append(finding)
            if finding.used > result.used:
                result.used, result.at = finding.used, f"{finding.id} (seed {repeat})"
            if shares is not None and finding.metrics:
                shares.append(finding.used)
    result.seconds = time.perf_counter() - begin
    return result


__all__ = ["MUTANTS", "VARIANTS", "Honesty", "Kill", "hunt", "hunt_all", "right_backend", "trial"]
