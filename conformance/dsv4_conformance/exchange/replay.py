"""Verdicts on results that somebody else computed, and cases that are not in the catalogue: saved
calls, single examples of laws.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.cases.checks import judge_call, level_of
from dsv4_conformance.check import Finding, Group, Session
from dsv4_conformance.files import forms, tensorfile
from dsv4_conformance.files.stored_calls import Packer, unpack
from dsv4_conformance.verdict.budget import SAMPLES, Expected, expect
from dsv4_conformance.verdict.calls import Call, result_dtype
from dsv4_conformance.verdict.discrete import judge_discrete
from dsv4_conformance.verdict.judge import Verdict, judge_exact, judge_rounded
from dsv4_core.checkpoint.shards import Shard
from dsv4_core.contract.dtypes import dtype_name
from dsv4_core.contract.spec import OPS
from dsv4_core.files.reading import checked, fitting, json_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.registry import Oracle
    from dsv4_core.contract.spec import Tier

SUFFIX = ".case.safetensors"
SECOND_OPINIONS = (
    7  # times the samples of a budget, beside its own: the largest is then below its own scale once in 10^10 elements
)
BEYOND_CHANCE = 100.0  # times the budget: no number of samples would explain it


def judge_results(
    call: Call, results: Sequence[Host], expected: Sequence[Expected], oracle: Oracle, backend: Backend
) -> Verdict:
    """Judge results of a call: number, dtype and shape, then every element."""
    verdict = Verdict()
    if len(results) != len(expected):
        return Verdict([f"{len(results)} results; the contract has {len(expected)}"], float("inf"))
    for i, (got, want) in enumerate(zip(results, expected, strict=True)):
        wanted = result_dtype(call, i, backend)
        if dtype_name(got) != wanted:
            verdict.problems.append(f"result {i} has dtype {dtype_name(got)}; the contract says {wanted}")
        if got.shape != want.value.shape:
            verdict.problems.append(
                f"result {i} has shape {list(got.shape)}; the contract says {list(want.value.shape)}"
            )
    if verdict.problems:
        verdict.used = float("inf")
        return verdict
    if "discrete" in call.spec.judged:
        verdict.add(judge_discrete(call, list(results), oracle, backend), "")
        return verdict
    for i, (got, want) in enumerate(zip(results, expected, strict=True)):
        one = judge_exact(got, want) if want.budget is None else judge_rounded(got, want)
        verdict.add(one, f"result {i}: " if len(expected) > 1 else "")
    return verdict


def judge_recorded(call: Call, results: Sequence[Host], session: Session, samples: int = SAMPLES) -> Verdict:
    """Judge recorded results by the session's oracle; ``samples``: of the first opinion.

    A run has millions of elements, and of a budget's random deviations the largest is now and then
    far below its scale: what is over budget is judged again by more of them before it counts. In
    float64 the oracle's deviations are as coarse as its own numbers, so that all of a few are
    sometimes 0, whatever terms cancel.
    """
    with np.errstate(all="ignore"):
        expected = expect(call, session.oracle, session.backend, samples)
        verdict = judge_results(call, results, expected, session.oracle, session.backend)
        if 1 < verdict.used < BEYOND_CHANCE or (verdict.used > 1 and session.numerics == "float64"):
            for i in range(SECOND_OPINIONS):
                more = expect(replace(call, seed=call.seed + i + 1), session.oracle, session.backend)
                expected = [_wider(a, b) for a, b in zip(expected, more, strict=True)]
            verdict = judge_results(call, results, expected, session.oracle, session.backend)
    return verdict


def _wider(a: Expected, b: Expected) -> Expected:
    """The larger of two budgets for the same result."""
    if (
        a.budget is None
        or b.budget is None
        or a.spread is None
        or b.spread is None
        or a.noise is None
        or b.noise is None
    ):
        return a
    budget, spread, noise = (
        np.maximum(x, y) for x, y in ((a.budget, b.budget), (a.spread, b.spread), (a.noise, b.noise))
    )
    return replace(a, budget=budget, spread=spread, noise=noise)


def save(path: Path, call: Call, numerics: str, note: str) -> None:
    """Write a call as a case that ``run --case PATH`` replays."""
    packer = Packer()
    description = packer.call("", call, share=False)
    metadata = {"call": json.dumps(description), "numerics": numerics, "seed": str(call.seed), "note": note}
    tensorfile.write(path, packer.tensors, metadata)


@dataclass(frozen=True)
class SavedCase:
    """A call in a file, as a check."""

    path: str
    op: str
    group: Group = "trace"
    tier: Tier = "smoke"

    @property
    def id(self) -> str:
        """The file's path."""
        return self.path

    @property
    def level(self) -> int:
        """As the op's other cases."""
        return level_of(OPS[self.op])

    def run(self, session: Session) -> Finding:
        """Run the call on the session's backend and judge it."""
        shard, stated, description = read(Path(self.path))
        if stated.numerics != session.numerics:
            raise ValueError(f"{self.path}: recorded in {stated.numerics}; run it with --numerics {stated.numerics}")
        with fitting(self.path, ADVICE), np.errstate(all="ignore"):
            call = unpack(description, shard.array, int(stated.seed))
            expect(call, session.oracle, session.backend)  # what a damaged file raises is not the backend's
        return Finding.of(self, judge_call(call, session), seed=call.seed)


ADVICE = "save it again: dsv4 conformance localise"


def read(path: Path) -> tuple[Shard, forms.SavedCase, dict[str, Any]]:
    """Read a saved case and hold it to its form: the file, what its metadata state, and the call's
    description.
    """
    shard = Shard(path)
    stated = checked(shard.metadata, forms.SavedCase, f"{path}: metadata", ADVICE)
    description = json_text(stated.call, dict[str, Any], f"{path}: call", ADVICE)
    forms.hold_call(description, f"{path}: call", ADVICE)
    return shard, stated, description
