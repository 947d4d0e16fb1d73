"""The ops' declared cases as checks."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import dsv4_conformance.cases.rules  # noqa: F401  registers how operands are made
import dsv4_core.contract.ops  # noqa: F401  declares the ops
from dsv4_conformance.cases import operands
from dsv4_conformance.cases.case import Case, cases_of
from dsv4_conformance.cases.extents import extended
from dsv4_conformance.cases.joined import joined
from dsv4_conformance.cases.pairs import paired
from dsv4_conformance.cases.scalars import beside_rows, rescaled
from dsv4_conformance.check import Check, Finding, Group, Session
from dsv4_conformance.verdict import calls, dump, subnormals
from dsv4_conformance.verdict.budget import BEFORE_FAILING, SAMPLES, Expected, expect
from dsv4_conformance.verdict.calls import Call, Outcome, execute, seed_of
from dsv4_conformance.verdict.discrete import judge_discrete
from dsv4_conformance.verdict.judge import Verdict, flushed, judge_exact, judge_rounded
from dsv4_core.contract.backend import Backend
from dsv4_core.contract.dtypes import WEIGHT_DTYPES, dtype_name
from dsv4_core.contract.spec import OPS, Operand, OpSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Numerics, Tier

SEEDS = 8  # of a smoke case in the full tier


def level_of(spec: OpSpec) -> int:
    """0: data movement and codecs, exact throughout; 1: the other required ops; 3: fused ops."""
    if spec.fused:
        return 3
    return 0 if set(spec.judged) == {"exact"} else 1


def judge_call(
    call: Call, session: Session, expected: list[Expected] | None = None, ran: Callable[[], Outcome] | None = None
) -> Verdict:
    """Run a call on the session's backend and judge every result: against ``expected`` first where
    the oracle has been asked already, and by more samples of it before anything fails. ``ran``:
    how it is run, where not by itself and guarded.
    """
    spec, backend = call.spec, session.backend
    more = (SAMPLES, BEFORE_FAILING) if expected else (BEFORE_FAILING,)
    if expected is None:
        expected = expect(call, session.oracle, backend)
    with np.errstate(all="ignore"):
        outcome = ran() if ran else execute(call, backend, [e.value.shape for e in expected])
    verdict = Verdict(list(outcome.problems), used=float("inf") if outcome.problems else 0.0)
    if outcome.problems or len(outcome.results) != len(expected):
        return verdict
    if "discrete" in spec.judged:
        verdict.add(judge_discrete(call, outcome.results, session.oracle, backend), "")
        verdict.got, verdict.want = outcome.results, expected
        return verdict
    verdict.add(compared(outcome.results, expected), "")
    for samples in more:
        if verdict.ok or "rounded" not in spec.judged:
            break
        expected = expect(call, session.oracle, backend, samples)
        verdict = compared(outcome.results, expected)
    if verdict.ok:
        return verdict
    verdict.got, verdict.want = outcome.results, expected
    if session.numerics == "float64":
        return verdict
    others = expect(subnormals.flushed(call), session.oracle, backend)
    forgiving = compared(outcome.results, [flushed(e, o) for e, o in zip(expected, others, strict=True)])
    if not forgiving.ok:
        return verdict
    if backend.flushes_subnormals:
        return forgiving
    verdict.problems.append(
        "it passes where numbers below the least normal one count as zero (subnormal numbers flushed): a backend that does so "
        "declares flushes_subnormals = True"
    )
    return verdict


def compared(results: list[Host], expected: list[Expected]) -> Verdict:
    """Judge results against what is expected of them."""
    verdict = Verdict()
    for i, (got, want) in enumerate(zip(results, expected, strict=True)):
        where = f"result {i}: " if len(expected) > 1 else ""
        verdict.add(judge_exact(got, want) if want.budget is None else judge_rounded(got, want), where)
    return verdict


def describe(call: Call) -> dict[str, Any]:
    """Operands and scalars as ``Backend.supports`` takes them."""

    def form(value: Any) -> Any:
        return None if value is None else Operand(dtype_name(value), tuple(value.shape))

    arrays = {n: [form(p) for p in o] if isinstance(o, (list, tuple)) else form(o) for n, o in call.named().items()}
    return {**arrays, **call.scalars}


def refused(check: Check, call: Call, session: Session, dtypes: str = "", where: str = "") -> Finding | None:
    """What there is to say of a check whose call the backend's ``supports`` refuses; None where it
    takes the call.
    """
    if support := session.backend.supports(call.op, **describe(call)):
        return None
    finding = Finding(check.id, check.op, check.group, check.level, "unsupported", where + support.reason, dtypes)
    return replace(finding, seed=call.seed)


@dataclass(frozen=True)
class OpCase:
    """One declared case of one op."""

    spec: OpSpec
    case: Case
    group: Group = "op"
    again: int = 0
    """Which further seed (full tier); 0 is the case itself."""

    @property
    def id(self) -> str:
        """``OP/CASE``, or ``OP/CASE#3`` with a further seed."""
        return f"{self.spec.name}/{self.case.name}" + (f"#{self.again}" if self.again else "")

    @property
    def op(self) -> str:
        """The op."""
        return self.spec.name

    @property
    def tier(self) -> Tier:
        """The least tier that runs it."""
        return "full" if self.again else self.case.tier

    @property
    def level(self) -> int:
        """The op's."""
        return level_of(self.spec)

    def call(self, numerics: Numerics, repeat: int = 0) -> Call:
        """The case's call."""
        seed = seed_of(f"{self.spec.name}/{self.case.name}", repeat + self.again)
        made, scalars = operands.make(self.spec.name, self.case, numerics, seed)
        return Call(self.spec.name, made, scalars, views=self.case.views, seed=seed)

    def dtypes(self, numerics: Numerics) -> str:
        """The column of the report: weight formats, or the mode's activation dtype."""
        act = "bfloat16" if numerics == "native" else numerics
        formats = sorted({f for f in self.case.dtypes.values() if f != "none"})
        layout = self.case.scalars.get("layout")
        return "+".join(formats) or (f"{layout} rows" if layout else act)

    def run(self, session: Session) -> Finding:
        """Ask for support, run, judge."""
        call = self.call(session.numerics, session.repeat)
        if finding := refused(self, call, session, self.dtypes(session.numerics)):
            return finding
        verdict = judge_call(call, session)
        if session.dump and not verdict.ok:
            dump.write(session.dump, self.id, call, verdict)
        return Finding.of(
            self, verdict, seed=call.seed, dtypes=self.dtypes(session.numerics), inputs=calls.hashed(call)
        )


@dataclass(frozen=True)
class LawOnCase:
    """A law on one op case, ``LAW/OP/CASE``: the method of the law's name judges the case's
    call.
    """

    case: OpCase
    law: str
    tier: Tier = "standard"
    group: Group = "op"

    @property
    def id(self) -> str:
        """``LAW/OP/CASE``."""
        return f"{self.law}/{self.case.id}"

    @property
    def op(self) -> str:
        """The op."""
        return self.case.op

    @property
    def level(self) -> int:
        """The op's."""
        return level_of(self.case.spec)

    def run(self, session: Session) -> Finding:
        """Ask for support, judge."""
        call = self.case.call(session.numerics, session.repeat)
        if finding := refused(self, call, session):
            return finding
        verdict: Verdict = getattr(self, self.law)(call, session)
        return Finding.of(self, verdict, seed=call.seed, dtypes=self.case.dtypes(session.numerics))


def checks(numerics: Numerics) -> list[Check]:
    """Every declared case of every op, but for weight formats that a backend need not have; in the
    full tier smoke's with more seeds.
    """
    del numerics
    cases = [(spec, case) for spec in OPS.values() for case in every_case(spec) if not optional(case)]
    again = [OpCase(s, c, again=i) for s, c in cases if c.tier == "smoke" for i in range(1, SEEDS)]
    return [*(OpCase(s, c) for s, c in cases), *again]


def every_case(spec: OpSpec) -> list[Case]:
    """An op's declared cases, those with other scalars, those at published extents, and those in
    which data and sizes meet.
    """
    return list(_every_case(spec.name))


@functools.cache
def _every_case(op: str) -> tuple[Case, ...]:
    declared = cases_of(OPS[op])
    of_scalars = (*declared, *rescaled(op, declared))
    rows = () if op == "concat" else beside_rows(op, of_scalars)
    return (*of_scalars, *extended(op, declared), *paired(op, declared), *rows, *joined(op, declared))


def optional(case: Case) -> set[str]:
    """Formats of a case's weights that only some backends declare."""
    return set(case.dtypes.values()) & (WEIGHT_DTYPES.keys() - set(Backend.weight_formats))


def declared(formats: Iterable[str]) -> list[Check]:
    """Cases of the optional weight formats among ``formats``."""
    return [
        OpCase(spec, case)
        for spec in OPS.values()
        for case in every_case(spec)
        if optional(case) and optional(case) <= set(formats)
    ]
