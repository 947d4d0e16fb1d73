"""Verdicts on results: bit for bit, or within the budget. Picks are judged in ``discrete``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dsv4_conformance.verdict import metrics
from dsv4_conformance.verdict.budget import SAFETY, Expected, smallest, unit
from dsv4_core.contract.dtypes import Host

NEIGHBOURS = 2  # on either side of a failing element, in reports
FEW = 4  # elements from which no common factor is read
NEAR = 0.01  # of a result's length: how well a common factor explains it, before it is spoken of
ROUNDING = 2.0  # units on average: more than any way of rounding, or two in a row, leans to a side
STANDARD_ERRORS = 8  # of the bias beyond which chance is no explanation, in a run of a thousand cases


@dataclass
class Verdict:
    """What was found. ``used``: share of the budget of the worst element; exact results use 0, or
    infinity where they differ.
    """

    problems: list[str] = field(default_factory=list)
    used: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    worst: dict[str, Any] = field(default_factory=dict)
    got: list[Host] = field(default_factory=list)
    """Of an op case that failed: what the backend returned ..."""
    want: list[Expected] = field(default_factory=list)
    """... and what was expected."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def add(self, other: Verdict, where: str) -> None:
        """Join another result's verdict; its figures stand if they are worse."""
        self.problems += [f"{where}{p}" for p in other.problems]
        if other.used >= self.used or not self.metrics:
            self.used, self.metrics, self.worst = (
                max(self.used, other.used),
                other.metrics or self.metrics,
                other.worst or self.worst,
            )


def place(mask_or_share: Host) -> tuple[int, ...]:
    """Index of the largest element."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask_or_share)), mask_or_share.shape))


def judge_exact(got: Host, want: Expected) -> Verdict:
    """Equal in every element: NaN equals NaN, and for floats -0 equals 0."""
    a, b = np.asarray(got), want.value
    with np.errstate(invalid="ignore"):
        differ = (a != b) & ~((a != a) & (b != b))  # noqa: PLR0124  NaN is what is not itself
        if want.flushed is not None:
            differ &= a != want.flushed
            if a.dtype.kind not in "iu":
                differ &= ~(np.abs(a.astype(np.float64) - b.astype(np.float64)) <= want.least)
    if not differ.any():
        return Verdict()
    at = place(differ)
    worst = {"element": list(at), "got": _number(a[at]), "want": _number(b[at]), "budget": 0.0, **around(at, a, b)}
    text = f"{int(differ.sum())} of {a.size} elements differ where every bit is fixed; first {list(at)}: got {worst['got']}, want {worst['want']}, budget 0"
    return Verdict([text], math.inf, {}, worst)


def judge_rounded(got: Host, want: Expected) -> Verdict:
    """Every element within its budget, NaN exactly where the oracle has NaN, no bias that the
    budget's own noise cannot explain.
    """
    assert want.budget is not None
    assert want.spread is not None
    value, x = want.value, got.astype(np.float64)
    verdict = Verdict()
    if not value.size:
        return verdict
    wrong_nan = np.isnan(x) != np.isnan(value)
    if wrong_nan.any():
        at = place(wrong_nan)
        verdict.worst = {
            "element": list(at),
            "got": _number(x[at]),
            "want": _number(value[at]),
            "budget": _number(want.budget[at]),
            **around(at, x, value),
        }
        verdict.problems.append(
            f"{int(wrong_nan.sum())} of {x.size} elements are NaN on one side only; first {list(at)}: got {x[at]}, want {value[at]}"
        )
        verdict.used = math.inf
        return verdict
    with np.errstate(invalid="ignore", over="ignore"):
        same = (x == value) | np.isnan(value)
        share = np.where(same, 0.0, np.abs(x - value) / want.budget)
    share = np.where(np.isnan(share), np.inf, share)
    at = place(share)
    verdict.used = float(share[at])
    verdict.worst = {
        "element": list(at),
        "got": _number(x[at]),
        "want": _number(value[at]),
        "budget": _number(want.budget[at]),
        **(around(at, x, value) if verdict.used > 1 else {}),
    }
    finite = np.isfinite(x) & np.isfinite(value)
    a, b = x[finite], value[finite]
    mean, error = metrics.bias(a, b, want.dtype)
    verdict.metrics = {
        "similarity_loss": metrics.similarity_loss(a, b),
        "bias_units": mean,
        "bias_standard_error": error,
        "largest_units": metrics.largest_units(a, b, want.dtype),
    }
    if want.noise is not None:
        verdict.metrics["factor"] = factor(x, want)
    if verdict.used > 1:
        over = int((share > 1).sum())
        digits = 17 if want.dtype == "float64" else 9
        verdict.problems.append(
            f"{over} of {x.size} elements over budget; worst {list(at)}: got {x[at]:.{digits}g}, want {value[at]:.{digits}g}, "
            f"off by {abs(x[at] - value[at]):.3g}, budget {want.budget[at]:.3g} ({verdict.used:.{3 if verdict.used > 1.01 else 6}g} times that)"
        )
    noise = want.spread if want.noise is None else want.noise  # of elements that share an intermediate: not independent
    explained = float(SAFETY * np.mean(noise[finite] / unit(np.abs(b), want.dtype))) if b.size else 0.0
    of_rounding = abs(mean) <= ROUNDING or verdict.used <= 1  # what is further off is another fault, which says more
    if of_rounding and abs(mean) > STANDARD_ERRORS * error + explained:
        truncated = (
            abs(mean) <= 1 and verdict.metrics["largest_units"] <= 2
        )  # truncation costs half a unit, never more than one
        verdict.problems.append(
            f"biased: results lie {mean:+.3f} units {'away from' if mean > 0 else 'towards'} zero on average (standard error {error:.3f})"
            + ("; round to nearest, ties to even, instead of truncating" if truncated else "")
        )
    if verdict.problems:
        verdict.problems += hints(a, b)
    return verdict


def flushed(value: Expected, other: Expected) -> Expected:
    """What a device that flushes subnormal numbers may give: budgets that reach what the oracle
    makes of flushed operands too.
    """
    least = smallest("float32")
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(value.value.astype(np.float64) - other.value.astype(np.float64)))
    if value.budget is None:
        return replace(value, flushed=np.asarray(other.value), least=least)
    assert value.noise is not None
    return replace(value, budget=value.budget + apart + least, noise=value.noise + apart)  # a flushed result is biased


def around(at: tuple[int, ...], got: Host, want: Host) -> dict[str, Any]:
    """An element with its neighbours along the last axis: where they begin, and both sides'
    values.
    """
    if not at:
        return {}
    first = max(0, at[-1] - NEIGHBOURS)
    part: tuple[Any, ...] = (*at[:-1], slice(first, at[-1] + NEIGHBOURS + 1))
    return {"around": {"from": first, "got": [_number(x) for x in got[part]], "want": [_number(x) for x in want[part]]}}


def hints(got: Host, want: Host) -> list[str]:
    """What a failing result looks like: the wanted one times a number, or its sign turned."""
    energy, product = float(np.vdot(want, want)), float(np.vdot(got, want))
    if not energy or not product or got.size < FEW:
        return []
    scale = product / energy
    rest = np.linalg.norm(got - scale * want) / np.linalg.norm(want)
    if rest < NEAR * abs(scale) and abs(scale - 1) > 4 * NEAR:
        return [f"all of it is {scale:.4g} times what is wanted: a scale, not a rounding"]
    return []


def factor(got: Host, want: Expected) -> float:
    """The safety factor that this result needs: its largest error beyond half a unit, over the
    noise that the factor multiplies.
    """
    assert want.budget is not None
    assert want.noise is not None
    with np.errstate(invalid="ignore", divide="ignore"):
        rest = np.abs(got - want.value) - (want.budget - SAFETY * want.noise)
        needed = np.where((rest > 0) & np.isfinite(rest), rest / want.noise, 0.0)
    return float(np.max(needed, initial=0.0))


def _number(x: object) -> float | int:
    value = float(x)  # type: ignore[arg-type]
    return int(value) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else value
