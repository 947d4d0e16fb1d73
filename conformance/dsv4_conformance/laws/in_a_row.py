"""Calls in a row: one that is almost the call before it, one with its operands and another scalar,
and very many.

A backend keeps things between calls: tables of angles, sorted routes, expanded weights, buffers in
turn. What it keeps is found again by a key. A key of some of the operands, of an array's ends, its
sum or its histogram finds the wrong thing; so does a counter that runs over.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.cases.case import cases_of
from dsv4_conformance.cases.checks import LawOnCase, OpCase, judge_call, optional
from dsv4_conformance.cases.every_size import FIRST
from dsv4_conformance.cases.operands import Maker
from dsv4_conformance.cases.pairs import rows_of, variants
from dsv4_conformance.cases.scalars import rescaled
from dsv4_conformance.check import Check, Session
from dsv4_conformance.laws.invariance import bits_differ, plain_run
from dsv4_conformance.verdict.budget import expect
from dsv4_conformance.verdict.calls import Outcome, as_tuple, copied, place
from dsv4_conformance.verdict.judge import Verdict
from dsv4_core.contract.dtypes import Experts, ScaledArray
from dsv4_core.contract.spec import OPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4_conformance.verdict.calls import Call
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Numerics

TOKENS = 6  # rows of a case: the first and the last stay, those between change places
BOUND = frozenset({"offsets", "order", "ring_index", "row_index", "index"})
"""Operands whose elements depend on each other, or on the rows that they lead to."""
MOST, SECONDS = 4096, 0.1  # calls of one case, and the time that they may take


def inside(array: Host) -> Host | None:
    """The array with its inner rows (of few: its inner elements) the other way round: its ends, its
    sum and its histogram stay; None where nothing changes.
    """
    changed = array.copy()
    if len(array) > 3:
        changed[1:-1] = array[1:-1][::-1]
    elif array.dtype.kind in "fV":
        flat = changed.reshape(-1)
        flat[1:-1] = flat[1:-1][::-1].copy()
    same = np.ascontiguousarray(changed).tobytes() == np.ascontiguousarray(array).tobytes()
    return None if same else changed


def changed(operand: Any) -> Any:
    """An operand, or a weight, changed inside; None where it cannot be."""
    if isinstance(operand, ScaledArray):
        data = inside(operand.data)
        return None if data is None else ScaledArray(data, operand.scale, operand.format)
    if isinstance(operand, Experts):
        every = [operand[i] for i in range(operand.shape[0])]
        middle = changed(every[len(every) // 2])
        return None if middle is None else Experts([*every[: len(every) // 2], middle, *every[len(every) // 2 + 1 :]])
    return inside(operand) if isinstance(operand, np.ndarray) and operand.ndim and operand.size else None


def nearly(call: Call) -> Iterator[tuple[str, Call]]:
    """The call with one operand changed inside, by the operand's name."""
    for i, (name, operand) in enumerate(call.named().items()):
        if name not in BOUND and name not in call.spec.mutates and (other := changed(operand)) is not None:
            yield name, replace(call, operands=[*call.operands[:i], other, *call.operands[i + 1 :]])


def after(call: Call, name: str, other: Call, backend: Backend) -> Outcome:
    """What the other call gives after the first; they share what the backend has loaded and taken
    over, but for the operand ``name``, where one is named, and what is written.
    """

    def given(where: str, operand: Any) -> Any:
        return place(backend, where, operand, lambda _, x: backend.from_numpy(copied(x)))

    operands = {where: given(where, o) for where, o in call.named().items()}
    getattr(backend, call.op)(*operands.values(), **call.scalars)
    for where in (*([name] if name else []), *call.spec.mutates):
        operands[where] = given(where, other.named()[where])
    returned = getattr(backend, call.op)(*operands.values(), **other.scalars)
    outcome = Outcome()
    outcome.results = [np.array(backend.to_numpy(r)) for r in as_tuple(other, returned, outcome)]
    return outcome


SHAPING = frozenset({"hc", "layout", "dim", "topk"})
"""Scalars that operands are made for."""


def other_scalars_of(case: OpCase) -> list[OpCase]:
    """The op's cases that differ from one in scalars alone, and take its operands."""
    declared = cases_of(case.spec)
    axis = rows_of(case.case)
    found: dict[tuple[object, ...], OpCase] = {}
    for c in (*variants(declared), *rescaled(case.op, declared)):
        turned = {k for k, v in c.scalars.items() if case.case.scalars[k] != v}
        same = {**c.sizes, axis: TOKENS} == {**case.case.sizes, axis: TOKENS} and c.dtypes == case.case.dtypes
        if same and turned and not turned & SHAPING:
            found.setdefault(tuple(sorted(c.scalars.items())), OpCase(case.spec, c))
    return list(found.values())


class InARow(LawOnCase):
    """``almost_the_same``, ``other_scalars`` or ``many_calls``."""

    def other_scalars(self, call: Call, session: Session) -> Verdict:
        """A call with the very operands of the last one and another scalar gives what is its
        own.
        """
        worst = Verdict()
        for case in other_scalars_of(self.case):
            other = replace(call, scalars=Maker(case.case, session.numerics, np.random.default_rng(0)).scalars())

            def ran(other: Call = other) -> Outcome:
                return after(call, "", other, session.backend)

            verdict = judge_call(other, session, expect(other, session.oracle, session.backend, FIRST), ran)
            if not verdict.ok:
                turned = ", ".join(f"{k}={v}" for k, v in other.scalars.items() if call.scalars[k] != v)
                verdict.problems[0] = f"{turned}, after a call that differs in that alone: {verdict.problems[0]}"
                return verdict
            if verdict.used >= worst.used:
                worst = verdict
        return worst

    def almost_the_same(self, call: Call, session: Session) -> Verdict:
        """A call whose operands differ from the last one's in one place, inside one of them, gives
        what is its own.
        """
        worst = Verdict()
        for name, other in nearly(call):

            def ran(name: str = name, other: Call = other) -> Outcome:
                return after(call, name, other, session.backend)

            verdict = judge_call(other, session, expect(other, session.oracle, session.backend, FIRST), ran)
            if not verdict.ok:
                verdict.problems[0] = f"after a call that differs inside {name!r} alone: {verdict.problems[0]}"
                return verdict
            if verdict.used >= worst.used:
                worst = verdict
        return worst

    def many_calls(self, call: Call, session: Session) -> Verdict:
        """The same call gives the same, give or take rounding, however often it is made; and leaves
        the results of the call before, with other operands, alone.
        """
        before = plain_run(next((other for _, other in nearly(call)), call), session.backend)
        _, first = plain_run(call, session.backend)
        want = [np.nan_to_num(x.astype(np.float64)) for x in first]
        begin, verdict = time.perf_counter(), Verdict()
        for i in range(MOST):
            if time.perf_counter() - begin > SECONDS:
                break
            for number, (a, b) in enumerate(zip(want, plain_run(call, session.backend)[1], strict=True)):
                if not np.allclose(np.nan_to_num(b.astype(np.float64)), a, rtol=2.0**-6, atol=2.0**-6):
                    verdict.problems.append(
                        f"result {number}: call {i + 2} with the same operands gives something else"
                    )
                    verdict.used = float("inf")
                    return verdict
        for number, (held, was) in enumerate(zip(*before, strict=True)):
            if bits_differ(np.asarray(session.backend.to_numpy(held)), was).any():
                verdict.problems.append(f"result {number}: one of the next {i + 1} calls overwrote it")
                verdict.used = float("inf")
        return verdict


def checks(numerics: Numerics) -> list[Check]:
    """Every variant of scalars and formats that an op's smoke cases have."""
    del numerics
    found: list[Check] = []
    for spec in OPS.values():
        for case in variants(cases_of(spec)):
            if not optional(case):
                fixed = spec.name in {"concat", "compress"}
                several = case if fixed else replace(case, sizes={**case.sizes, rows_of(case): TOKENS})
                found += [InARow(OpCase(spec, several), law) for law in ("almost_the_same", "many_calls")]
                if not fixed and other_scalars_of(OpCase(spec, several)):
                    found.append(InARow(OpCase(spec, several), "other_scalars"))
    return found
