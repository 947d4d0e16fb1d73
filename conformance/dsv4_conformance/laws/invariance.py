"""Bits: the same call twice, a row alone or among others, and a result that the next call leaves
alone.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.cases.case import Case, cases_of
from dsv4_conformance.cases.checks import LawOnCase, OpCase, optional
from dsv4_conformance.cases.every_size import sized
from dsv4_conformance.cases.pairs import variants
from dsv4_conformance.check import Check, Session
from dsv4_conformance.verdict.calls import Call, Outcome, as_tuple, copied, place
from dsv4_conformance.verdict.judge import Verdict
from dsv4_conformance.verdict.judge import place as first_of
from dsv4_core.contract.dtypes import Host
from dsv4_core.contract.spec import OPS

if TYPE_CHECKING:
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics

AGAIN = 6  # calls whose bits are compared with the first one's: an atomic sum differs now and then
LONG = 1.0  # seconds after which a large case is not called again
FURTHER = 6  # calls after which a result must still be there: buffers that take turns are few
CHUNK = 512  # rows
WHOLE = frozenset({"dispatch", "combine", "expert_linear", "cached_sparse_attn", "cached_index_topk", "compress"})
"""Ops whose operands refer to each other's rows, so that no part of them stands alone; the model's
laws cover them.
"""


class FormError(TypeError):
    """A result has not the form that the contract gives it."""


def plain_run(call: Call, backend: Backend) -> tuple[Any, list[Host]]:
    """Run a call without guards; give what was returned, and its results as copies on the host.
    Raise ``FormError`` where it has not the contract's form.
    """
    placed = [place(backend, n, o, lambda _, x: backend.from_numpy(copied(x))) for n, o in call.named().items()]
    with np.errstate(all="ignore"):
        returned = getattr(backend, call.op)(*placed, **call.scalars)
    outcome = Outcome()
    results = as_tuple(call, returned, outcome)
    if outcome.problems:
        raise FormError("; ".join(outcome.problems))
    return results, [np.array(backend.to_numpy(r)) for r in results]


def bits_differ(a: Host, b: Host) -> Host:
    """Where two arrays of one dtype differ in any bit."""
    if not a.size:
        return np.zeros(a.shape, bool)
    one, two = (np.ascontiguousarray(x).reshape(*x.shape, 1).view(np.uint8) for x in (a, b))
    return (one != two).any(-1)


class Bitwise(LawOnCase):
    """``determinism`` and ``batch_invariance`` of a case's bits; ``buffer_reuse`` and
    ``another_thread``, where the op is simply wrong.
    """

    @property
    def op(self) -> str:
        """The law; for buffers and threads the op."""
        return self.law if self.group == "invariance" else self.case.op

    @property
    def level(self) -> int:
        """The op's, or 4."""
        return 4 if self.group == "invariance" else super().level

    def determinism(self, call: Call, session: Session) -> Verdict:
        """Same call, same bits, however often, and in another thread."""
        begin = time.perf_counter()
        _, first = plain_run(call, session.backend)
        verdict = Verdict()
        for i in range(AGAIN):
            if i > 1 and time.perf_counter() - begin > LONG:
                break
            verdict = _compare(first, plain_run(call, session.backend)[1], f"call {i + 2} with the same operands")
            if not verdict.ok:
                break
        return verdict

    def another_thread(self, call: Call, session: Session) -> Verdict:
        """What another thread computes is what the first one does, and stays when that thread goes
        on; the backend was made and first called in the first one.
        """

        def there() -> tuple[list[Host], list[Host]]:
            returned, found = plain_run(call, session.backend)
            plain_run(self.case.call(session.numerics, session.repeat + 1), session.backend)
            return found, [np.array(session.backend.to_numpy(r)) for r in returned]

        _, first = plain_run(call, session.backend)
        with ThreadPoolExecutor(1) as pool:
            second, kept = pool.submit(there).result()
        verdict = _compare(second, kept, "the next call of another thread overwrote it:")
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            wide = [np.nan_to_num(x.astype(np.float64)) for x in (a, b)]
            if not np.allclose(wide[0], wide[1], rtol=2.0**-6, atol=2.0**-6):
                verdict.problems.append(
                    f"result {i}: another thread's call gives something else; what the first thread set up is missing there"
                )
                verdict.used = float("inf")
        return verdict

    def buffer_reuse(self, call: Call, session: Session) -> Verdict:
        """Further calls leave an earlier result as it is."""
        returned, first = plain_run(call, session.backend)
        for i in range(FURTHER):
            plain_run(self.case.call(session.numerics, session.repeat + 1 + i), session.backend)
        kept = [np.array(session.backend.to_numpy(r)) for r in returned]
        return _compare(first, kept, f"one of the next {FURTHER} calls overwrote it:")

    def batch_invariance(self, call: Call, session: Session) -> Verdict:
        """One row alone, and half of the rows, as they are among all."""
        axis = call.spec.returns[0].split()[0]
        rows = self.case.case.sizes[axis]
        _, everything = plain_run(call, session.backend)
        verdict = Verdict()
        for start, stop in ((0, 1), (rows // 2, rows // 2 + 1), (rows // 3, rows // 3 + max(1, rows // 2))):
            part = tuple(
                o[start:stop] if isinstance(o, np.ndarray) and call.spec.axes[n].split()[0] == axis else o
                for n, o in call.named().items()
            )
            _, alone = plain_run(Call(call.op, part, call.scalars, seed=call.seed), session.backend)
            what = f"rows {start} to {stop - 1} of {rows} on their own"
            verdict = _compare([e[start:stop] for e in everything], alone, what)
            if not verdict.ok:
                break
        return verdict


def _compare(want: list[Host], got: list[Host], what: str) -> Verdict:
    verdict = Verdict()
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        differ = bits_differ(a, b)
        if differ.any():
            at = first_of(differ)
            verdict.problems.append(
                f"result {i}: {what} differs in {int(differ.sum())} of {differ.size} elements, first {list(at)}: {a[at]} and {b[at]}; "
                "tiles and splits of fixed size make the order of summation independent of the batch"
                if "rows" in what
                else f"result {i}: {what} differs in {int(differ.sum())} of {differ.size} elements, first {list(at)}: {a[at]} and {b[at]}"
            )
            verdict.used, verdict.worst = (
                float("inf"),
                {"element": list(at), "got": float(b[at]), "want": float(a[at]), "budget": 0.0},
            )
    return verdict


def chunks(op: str, case: Case, rows: int) -> list[Case]:
    """The case with a chunk's rows, where the op takes so many."""
    return [c for name, c in sized(op, case) if name.endswith(f"={rows}")] if op != "concat" else []


def checks(numerics: Numerics) -> list[Check]:
    """Determinism, buffers and threads of every variant of scalars and formats that an op has;
    invariance of cases with rows enough; buffers, determinism and invariance at a chunk's rows too.
    """
    del numerics
    found: list[Check] = []
    for spec in OPS.values():
        cases = [c for c in cases_of(spec) if c.tier != "full" and not c.views]
        axis = (spec.returns[0].split() or [""])[0]
        every = {v.name: v for v in (cases[0], *variants(cases)) if not optional(v)}
        for i, case in enumerate(every.values()):
            found.append(Bitwise(OpCase(spec, case), "buffer_reuse", "standard" if i else "smoke"))
            found.append(Bitwise(OpCase(spec, case), "another_thread"))
            for chunk in chunks(spec.name, case, CHUNK):  # large results have memory, and sums an order, of their own
                found.append(Bitwise(OpCase(spec, chunk), "buffer_reuse"))
                found.append(Bitwise(OpCase(spec, chunk), "determinism", group="invariance"))
        found += [
            Bitwise(OpCase(spec, c), "determinism", group="invariance")
            for c in {**every, cases[-1].name: cases[-1]}.values()
        ]
        if spec.name not in WHOLE and axis in {"tokens", "rows", "batch"}:
            many = [c for c in cases if c.sizes.get(axis, 0) >= (2 if axis == "batch" else 17) or c is cases[0]]
            several = [c for case in every.values() for c in chunks(spec.name, case, CHUNK)]
            found += [Bitwise(OpCase(spec, c), "batch_invariance", group="invariance") for c in (*many, *several)]
    return found


def cost(backend: Backend) -> str:
    """What a batch-invariant mode costs: CPU time of the real-size cases against the same backend
    without it.
    """
    options = {o.name: getattr(backend, o.name) for o in backend.options}
    other = type(backend)(numerics=backend.numerics, **{**options, "batch_invariant": False})
    parts = []
    for op in ("linear", "expert_linear", "sparse_attn", "index_scores", "logits"):
        case = next(c for c in cases_of(OPS[op]) if c.name.startswith("flash"))
        call = OpCase(OPS[op], case).call(backend.numerics)
        seconds = []
        for judged in (backend, other):
            plain_run(call, judged)  # weights are dequantised once
            begin = time.process_time()
            plain_run(call, judged)
            seconds.append(time.process_time() - begin)
        parts.append(f"{op} {seconds[0] / max(seconds[1], 1e-6):.2f}x")
    return "cost of batch invariance, CPU time at the Flash model's sizes and few tokens: " + ", ".join(parts)
