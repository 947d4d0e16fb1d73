"""NaN and infinity: what depends on one becomes no number, and nothing else does.

What depends on an element is found without any NaN, so that no oracle's NaN handling is believed:
the oracle is asked for the results with several finite values in its place, and what differs
depends on it. There a NaN must come out as NaN, and an infinity as no number or as what a very
large number comes out as; everywhere else results are judged as if nothing had happened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.cases.case import Case, cases_of
from dsv4_conformance.cases.checks import LawOnCase, OpCase, optional
from dsv4_conformance.cases.pairs import rows_of
from dsv4_conformance.check import Check, Session
from dsv4_conformance.verdict.budget import Expected, expect
from dsv4_conformance.verdict.calls import LOADED, Call, execute, seed_of
from dsv4_conformance.verdict.discrete import judge_discrete
from dsv4_conformance.verdict.judge import Verdict, judge_exact, judge_rounded, place
from dsv4_core.contract.dtypes import Experts, Host, RowLayout, ScaledArray
from dsv4_core.contract.spec import OPS, OpSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4_core.contract.registry import Oracle
    from dsv4_core.contract.spec import Numerics

FINITE = (0.0, 1.0, -3.0, 300.0, -1000.0)  # far enough apart that a difference shows behind any quantisation
FINITE_CODES = (0x00, 0x38, 0xB8, 0x7E)  # the same of E4M3: 0, 1, -1, 448
NAN_CODE = 0x7F
ROWS = 33  # full tiles, whose clamps and maxima are not those of single rows, and a rest
HUGE = 1e30  # what stands for infinity where a clamp or an exponential makes a number of it again
BY_CHOICE = frozenset({"index_select", "index_topk", "cached_index_topk", "sample", "sample_each"})
"""Ops that return choices alone: of what is no number none is the best."""
SHARES_A_SCALE = {"act_quant": "block", "act_qdq": "block"}
"""Casts: the element's own result is NaN; the others of its block share a scale with it, and may
be.
"""


@dataclass(frozen=True)
class Spot:
    """One element of one operand."""

    operand: str
    at: tuple[int, ...]

    def put(self, call: Call, value: float) -> Call:
        """The call with another value there."""
        operands = []
        for name, operand in call.named().items():
            if name == self.operand:
                operand = operand.copy()  # noqa: PLW2901
                operand[self.at] = value
            operands.append(operand)
        return replace(call, operands=operands)


def spots(call: Call) -> Iterator[Spot]:
    """Of every operand of activations: an element of the first row (which a clamped -1 reads), one
    further down, and one of the last of many rows.
    """
    rng = np.random.default_rng(call.seed)
    layout = call.scalars.get("layout")
    for name, operand in call.named().items():
        if name in LOADED or not isinstance(operand, np.ndarray) or not operand.size:
            continue
        packed = operand.dtype == np.uint8
        if packed and not (isinstance(layout, RowLayout) and layout.kind == "kv"):
            continue
        if not packed and operand.dtype.kind not in "fV":
            continue
        width = layout.dim - layout.rope_dim if packed and isinstance(layout, RowLayout) else operand.shape[-1]
        rows = {0, int(rng.integers(operand.shape[0]))}
        last = {len(operand) - 1} - rows if len(operand) > 2 * ROWS else set()  # beyond the first tiles
        for row in (*rows, *last):
            middle = tuple(int(rng.integers(n)) for n in operand.shape[1:-1])
            column = (int(rng.integers(width)),) if operand.ndim > 1 else ()
            yield Spot(name, (row, *middle, *column))


def values_of(call: Call, spot: Spot) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Finite values for a spot, and those that are none."""
    if call.named()[spot.operand].dtype == np.uint8:
        return FINITE_CODES, (NAN_CODE,)
    return FINITE, (np.nan, np.inf, -np.inf)


def evaluated(call: Call, oracle: Oracle) -> list[Host]:
    """The oracle's exact results."""
    operands = [o.copy() if n in call.spec.mutates else o for n, o in call.named().items()]
    with np.errstate(all="ignore"):
        exact, _ = oracle.evaluate(call.op, operands, call.scalars, samples=0, seed=0)
    return list(exact) if isinstance(exact, tuple) else [exact]


def without_zeros(call: Call) -> Call:
    """The call with every zero among its numbers replaced: nothing times NaN is NaN, so that a zero
    hides no dependence from it.
    """

    def dense(operand: Any) -> Any:
        if isinstance(operand, Experts):
            return Experts([dense(operand[e]) for e in range(operand.shape[0])])
        if isinstance(operand, ScaledArray):
            if operand.format == "e2m1":
                low, high = operand.data & 0xF, operand.data >> 4
                nibbles = [np.where(n & 7, n, n | 2) for n in (low, high)]
                return ScaledArray((nibbles[0] | nibbles[1] << 4).astype(np.uint8), operand.scale, "e2m1")
            zero = operand.data & (0x7F if operand.format == "e4m3" else 0xFF) == 0
            return ScaledArray(
                np.where(zero, 1, operand.data).astype(operand.data.dtype), operand.scale, operand.format
            )
        if isinstance(operand, np.ndarray) and operand.dtype.kind in "fV":
            return np.where(operand == 0, operand.dtype.type(0.5), operand)
        return operand

    return replace(call, operands=[dense(o) for o in call.operands])


def above_zero(call: Call) -> Call:
    """The call with every number positive, so that no ReLU hides a dependence."""
    floats = [isinstance(o, np.ndarray) and o.dtype.kind in "fV" for o in call.operands]
    return replace(call, operands=[np.abs(o) if f else o for o, f in zip(call.operands, floats, strict=True)])


def dependents(call: Call, spot: Spot, oracle: Oracle) -> list[Host]:
    """Per result, which elements depend on the spot."""
    finite, _ = values_of(call, spot)
    depends: list[Host] = []
    for variant in (without_zeros(call), above_zero(without_zeros(call))):
        found = [evaluated(spot.put(variant, value), oracle) for value in finite]
        differ = [np.any([f[i] != found[0][i] for f in found[1:]], axis=0) for i in range(len(found[0]))]
        depends = [a | b for a, b in zip(depends, differ, strict=True)] if depends else differ
    return depends


def judge_spot(call: Call, spot: Spot, session: Session) -> Verdict:
    """Judge an op with one element that is no number."""
    finite, others = values_of(call, spot)
    depends = dependents(call, spot, session.oracle)
    with np.errstate(all="ignore"):
        expected = expect(spot.put(call, finite[1]), session.oracle, session.backend)
    verdict = Verdict()
    for value in others:
        made = spot.put(call, value)
        with np.errstate(all="ignore"):
            outcome = execute(made, session.backend, [e.value.shape for e in expected])
        where = f"{word(value)} in {spot.operand}{list(spot.at)}: "
        verdict.problems += [where + p for p in outcome.problems]
        if verdict.problems:
            break
        asked: list[list[Expected]] = []
        if np.isinf(value):
            limit = spot.put(call, float(np.copysign(HUGE, value)))
            with np.errstate(all="ignore"):
                asked = [expect(c, session.oracle, session.backend) for c in (limit, made)]
        for i, (got, want) in enumerate(zip(outcome.results, expected, strict=True)):
            result = f"result {i}: " if len(expected) > 1 else ""
            one = judge_result(made, spot, got, want, depends[i], [a[i] for a in asked])
            verdict.add(one, where + result)
        if "discrete" in call.spec.judged and verdict.ok:
            verdict.add(judge_others(made, outcome.results, depends[0], session), where)
        if not verdict.ok:
            break
    if not verdict.ok:
        verdict.used = float("inf")
    return verdict


def word(value: float) -> str:
    """How a message calls it."""
    return "NaN" if np.isnan(value) or value == NAN_CODE else "infinity" if value > 0 else "-infinity"


def judge_result(call: Call, spot: Spot, got: Host, want: Expected, depends: Host, asked: list[Expected]) -> Verdict:
    """Judge one result: what depends on the spot, and the rest."""
    if got.dtype.kind == "i" or want.dtype == "int32":
        return Verdict()
    if got.dtype == np.uint8:
        return judge_codes(call, spot, got, want, depends)
    x = got.astype(np.float64)
    may = in_block(call, spot, depends) if call.op in SHARES_A_SCALE else np.zeros(depends.shape, bool)
    wrong = depends & ~may & (np.isfinite(x) if asked else ~np.isnan(x))
    for one in asked:  # a clamp, or an exponential of -infinity, makes a number of it again
        with np.errstate(invalid="ignore"):
            wrong &= ~(np.abs(x - one.value) <= (0.0 if one.budget is None else one.budget))
    if wrong.any():
        at = place(wrong)
        return Verdict(
            [
                f"{int(wrong.sum())} of {int(depends.sum())} elements that depend on it are numbers; first {list(at)}: got {x[at]:.9g}"
            ],
            worst={"element": list(at), "got": float(x[at])},
        )
    if "discrete" in call.spec.judged:  # by what was chosen, in whatever order: ``judge_others``
        return Verdict()
    return elsewhere(got, want, ~(depends | may))


def elsewhere(got: Host, want: Expected, rest: Host) -> Verdict:
    """Judge the elements that do not depend on the spot."""
    x = got.astype(np.float64)
    lost = rest & ~np.isfinite(x) & np.isfinite(want.value.astype(np.float64))
    if lost.any():
        at = place(lost)
        return Verdict(
            [
                f"{int(lost.sum())} elements are no numbers and do not depend on it; first {list(at)}: got {x[at]}, want {want.value[at]}"
            ],
            worst={"element": list(at)},
        )
    if not rest.any():
        return Verdict()
    budget, spread, noise = (None if f is None else f[rest] for f in (want.budget, want.spread, want.noise))
    part = Expected(want.value[rest], want.dtype, budget, spread, noise)
    return judge_exact(got[rest], part) if part.budget is None else judge_rounded(got[rest], part)


def in_block(call: Call, spot: Spot, depends: Host) -> Host:
    """The other elements of the spot's block, which share its scale."""
    block = call.scalars["block"]
    may = np.zeros(depends.shape, bool)
    start = spot.at[-1] // block * block
    if start < call.scalars.get("channels", depends.shape[-1]):
        may[spot.at[0], start : start + block] = True
        may[spot.at] = False
    return may


def judge_codes(call: Call, spot: Spot, got: Host, want: Expected, depends: Host) -> Verdict:
    """Codes and scales: of the block that holds the spot nothing but that its own element decodes
    to NaN, all else bit for bit.
    """
    differ = (got != want.value) & ~depends
    if call.op in SHARES_A_SCALE or "cache" in call.spec.mutates:
        rows = np.arange(got.shape[0]) != (spot.at[0] if call.op in SHARES_A_SCALE else -1)
        differ &= rows.reshape(-1, *(1,) * (got.ndim - 1))
    if differ.any():
        at = place(differ)
        return Verdict(
            [f"{int(differ.sum())} codes that do not depend on it differ; first {list(at)}"],
            worst={"element": list(at)},
        )
    return Verdict()


def judge_others(call: Call, results: list[Host], depends: Host, session: Session) -> Verdict:
    """Of an op that routes tokens, those that the spot does not touch, judged as if alone."""
    kept = ~depends.any(-1)
    operands = [
        o[kept] if isinstance(o, np.ndarray) and OPS[call.op].axes[n].split()[0] == "tokens" else o
        for n, o in call.named().items()
    ]
    return judge_discrete(replace(call, operands=operands), [r[kept] for r in results], session.oracle, session.backend)


class NonFinite(LawOnCase):
    """The law on one case of one op."""

    def nonfinite(self, call: Call, session: Session) -> Verdict:
        """Try every spot."""
        call = replace(call, views=False, seed=seed_of(self.id, session.repeat))
        verdict = Verdict()
        for spot in spots(call):
            verdict.add(judge_spot(call, spot, session), "")
            if not verdict.ok:
                break
        return verdict


def cases(spec: OpSpec) -> list[Case]:
    """What the law is tried with: every variant of scalars and formats at smoke, and those with
    padding, also where a part is absent; and the first of them with full tiles of rows.
    """
    found: dict[Any, Case] = {}
    for case in cases_of(spec):
        if optional(case) or case.tier == "full" or case.views or case.name.startswith(("flash", "pro")):
            continue
        ordinary = case.tier == "smoke" and case.data == "normal" and case.sizes.get("tokens", 2) > 1
        if ordinary or case.data in {"padding", "other_ranks"}:
            absent = tuple(axis for axis, size in case.sizes.items() if not size)
            kind = tuple(sorted(case.scalars.items())), tuple(sorted(case.dtypes.items())), case.data, absent
            found.setdefault(kind, case)
    first = next(iter(found.values()))
    if {"ratio", "slots"} & first.sizes.keys():
        return list(found.values())
    tiles: dict[str, Any] = {a: n for a, n in (("rows", 3 * ROWS), ("picks", 2 * ROWS)) if a in first.sizes}
    return [*found.values(), first.but(f"{first.name}_in_tiles", **{**tiles, rows_of(first): ROWS})]


def checks(numerics: Numerics) -> list[Check]:
    """Every op that computes with numbers."""
    del numerics
    return [
        NonFinite(OpCase(spec, case), "nonfinite", "smoke" if i == 0 else "standard")
        for spec in OPS.values()
        if spec.name not in BY_CHOICE
        for i, case in enumerate(cases(spec))
    ]
