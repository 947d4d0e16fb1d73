"""Running the museum: what kills each mutant, and that no honest variant is failed."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4_conformance.cases import checks as opcases
from dsv4_conformance.cases.checks import OpCase, judge_call
from dsv4_conformance.check import BAD, Check, Finding, Session
from dsv4_conformance.laws.invariance import plain_run
from dsv4_conformance.museum.catalogue import VARIANTS
from dsv4_conformance.museum.fault import Fault, Mutant, Op, altered
from dsv4_conformance.museum.honest import Variant
from dsv4_conformance.run.catalogue import collect
from dsv4_conformance.run.runner import run_check
from dsv4_conformance.verdict.budget import expect
from dsv4_core.contract import registry
from dsv4_core.contract.spec import OPS

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics

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
    """What mutants and variants are made of."""
    return registry.reference()


def hunt(
    mutant: Mutant,
    numerics: Numerics = "native",
    tier: str = "standard",
    killer: str = "",
    only: Container[str] | None = None,
) -> Kill:
    """Run checks, smoke first, until one fails; ``killer``: the id of a check that is tried before
    the others of its tier; ``only``: ids of the checks that there are.
    """
    begin, count = time.perf_counter(), 0
    cls = mutant.build(right_backend())
    for level in ("smoke", "standard")[: 1 if tier == "smoke" else 2]:
        session = Session(cls(numerics=numerics), level)  # type: ignore[arg-type]
        for check in sorted(in_order(level, numerics, set(mutant.faults)), key=lambda c: c.id != killer):
            if only is not None and check.id not in only:
                continue
            count += 1
            finding = run_check(check, session)
            if finding.status in DEADLY:
                return Kill(mutant, finding, level, count, time.perf_counter() - begin)
    return Kill(mutant, None, "", count, time.perf_counter() - begin)


MADE_OF_OTHERS = {"hc_pre"}
"""Required ops that the right backend makes of other ops."""


def in_order(tier: str, numerics: Numerics, faults: set[str]) -> list[Check]:
    """What a tier adds, the faulty ops' cases first: they are quick and name the op. At standard
    laws of smoke count again, which draw examples there. Cases of ops that never call a faulty one
    are left out.
    """
    drawn = tier == "standard"
    every = [
        c
        for c in collect("standard", numerics)
        if c.op != "batch_invariance" and (c.tier == tier or (drawn and c.group == "law"))
    ]
    if faults <= OPS.keys():
        every = [c for c in every if c.op in faults or c.op not in OPS or OPS[c.op].fused or c.op in MADE_OF_OTHERS]
    return sorted(
        every, key=lambda c: (c.op not in faults, ("op", "invariance", "trace", "law", "model").index(c.group))
    )


@dataclass
class Honesty:
    """How an honest variant fared: cases run, false alarms, and the largest share of a budget that
    it used.
    """

    name: str
    cases: int = 0
    alarms: list[str] = field(default_factory=list)
    used: float = 0.0
    factor: float = 0.0
    """The largest safety factor that it needed, ``at`` this case."""
    at: str = ""

    def note(self, finding_id: str, used: float, factor: float, message: str) -> None:
        """Count one case."""
        self.cases += 1
        if message:
            self.alarms.append(f"{finding_id}: {message}")
        self.used = max(self.used, used)
        if factor > self.factor:
            self.factor, self.at = factor, finding_id


def affected(variant: Variant, case: OpCase, reached: set[str]) -> bool:
    """Whether a case reaches what the variant does otherwise, and is judged by what it declares
    (nothing, or this op).
    """
    declared = variant.narrower
    return bool(reached & variant.steps.keys()) and (not declared or case.op in declared or case.spec.fused)


def noting(base: type[Backend], reached: set[str]) -> type[Backend]:
    """The right backend, noting which of the ops and internal steps that any variant replaces are
    reached.
    """

    def noted(step: str) -> Fault:
        def fault(_be: Any, right: Op, *operands: Any, **scalars: Any) -> Any:
            reached.add(step)
            return right(*operands, **scalars)

        return fault

    return altered(base, "noting", {step: noted(step) for v in VARIANTS.values() for step in v.steps})


def drawn_again(case: OpCase) -> bool:
    """Whether a case is tried with further seeds: the small declared ones are."""
    return not case.case.name.startswith(("flash", "pro", "met_", "at_")) and "_at_" not in case.case.name


def trials(seeds: range, numerics: Numerics = "native", names: Sequence[str] = ()) -> list[Honesty]:
    """Run op cases on every variant that they reach, over several seeds; real-size shapes with seed
    0 only. The oracle is asked once a case for all. Each case has backends of its own, as they may
    keep weights.
    """
    base = right_backend()
    reached: set[str] = set()
    notes = noting(base, reached)
    chosen = [v for v in VARIANTS.values() if not names or v.name in names]
    classes = {v.name: v.build(base) for v in chosen}
    sessions = {name: Session(cls(numerics=numerics), "standard") for name, cls in classes.items()}
    results = {v.name: Honesty(v.name) for v in chosen}
    cases = [c for c in opcases.checks(numerics) if isinstance(c, OpCase) and c.tier != "full"]
    for repeat in seeds:
        for case in cases:
            if repeat and not drawn_again(case):
                continue
            call, shared = case.call(numerics, repeat), None
            reached.clear()
            plain_run(call, notes(numerics=numerics))
            for v in chosen:
                if not affected(v, case, reached):
                    continue
                session = sessions[v.name]
                session.backend = classes[v.name](numerics=numerics)
                if v.narrower:
                    expected = None
                else:
                    shared = expected = shared or expect(call, session.oracle, session.backend)
                verdict = judge_call(call, session, expected)
                results[v.name].note(
                    f"{case.id} (seed {repeat})",
                    verdict.used,
                    verdict.metrics.get("factor", 0.0),
                    "; ".join(verdict.problems),
                )
    return list(results.values())


def whole_tier(name: str, numerics: Numerics = "native") -> Honesty:
    """The whole standard tier once on a variant."""
    variant = VARIANTS[name]
    session = Session(variant.build(right_backend())(numerics=numerics), "standard")
    result = Honesty(name)
    for check in collect("standard", numerics):
        if check.group != "invariance":  # a variant claims nothing about bits
            finding = run_check(check, session)
            result.note(
                finding.id,
                finding.used,
                finding.metrics.get("factor", 0.0),
                finding.message if finding.status in DEADLY else "",
            )
    return result
