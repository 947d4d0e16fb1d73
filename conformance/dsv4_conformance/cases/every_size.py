"""Numbers of rows that servers batch and no declared case has: an op's small cases at each of them.

A kernel is often chosen by the number of rows, captured for multiples of eight, and prompts are cut
into chunks of some hundreds or thousands. Declared cases have powers of two up to 128 and one past
a tile; here are the numbers up to 16, the multiples of eight up to 128, one short of a tile, and
chunks up to 4096.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4_conformance.cases.case import Case, cases_of
from dsv4_conformance.cases.checks import LawOnCase, OpCase, judge_call, optional, refused
from dsv4_conformance.cases.pairs import BUCKETS, MOST, rows_of, variants
from dsv4_conformance.check import Check, Finding, Session
from dsv4_conformance.verdict.budget import expect
from dsv4_conformance.verdict.judge import Verdict
from dsv4_core.contract.spec import OPS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4_core.contract.spec import Numerics

SHORT = (31, 63, 127)  # one short of a tile
SIZES = tuple(n for n in (*range(5, 17), *range(24, 129, 8), *SHORT) if n not in BUCKETS)
CHUNKS = (160, 192, 200, 256, 320, 384, 512, 768, 1024, 2048, 4096)
SMALLER = {"heads": 1, "seq": 1}  # axes that stay small beside a chunk
FIRST = 4  # samples of a budget before all are asked for: most calls need no more


def sized(op: str, base: Case) -> Iterator[tuple[str, Case]]:
    """A small case at each size, named ``axis=n``: of sequences where the op has a batch, else of
    rows.
    """
    axis = "batch" if "batch" in base.sizes else rows_of(base)
    for n in (*SIZES, *CHUNKS):
        if n <= MOST.get(op, n):
            slots = {"slots": max(base.sizes["slots"], n + 1)} if {"slots", "n"} <= base.sizes.keys() else {}
            few = {name: size for name, size in SMALLER.items() if n in CHUNKS and name in base.sizes}
            yield f"{axis}={n}", base.but(f"{base.name}_{axis}={n}", **{**few, axis: n}, **slots)


class EverySize(LawOnCase):
    """One small case of an op at every size."""

    def run(self, session: Session) -> Finding:
        """Run the case at each size; the first that is wrong is the finding's."""
        worst, dtypes = Verdict(), ""
        for where, case in sized(self.op, self.case.case):
            one = OpCase(self.case.spec, case)
            call, dtypes = one.call(session.numerics, session.repeat), one.dtypes(session.numerics)
            if finding := refused(self, call, session, dtypes, f"{where}: "):
                return finding
            verdict = judge_call(call, session, expect(call, session.oracle, session.backend, FIRST))
            if not verdict.ok:
                verdict.problems[0] = f"{where}: {verdict.problems[0]}"
                return Finding.of(self, verdict, seed=call.seed, dtypes=dtypes)
            if verdict.used >= worst.used:
                worst = verdict
        return Finding.of(self, worst, dtypes=dtypes)


def checks(numerics: Numerics) -> list[Check]:
    """Each variant of scalars and formats that an op's smoke cases have."""
    del numerics
    return [
        EverySize(OpCase(spec, base), "every_size")
        for spec in OPS.values()
        if spec.name != "concat"
        for base in variants(cases_of(spec))
        if not optional(base)
    ]
