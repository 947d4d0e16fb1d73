"""How far a backend is: per op what its smoke cases say, per level what is missing, and the op to
write next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv4_conformance.cases.checks import level_of
from dsv4_conformance.check import BAD, Check, Finding, Session
from dsv4_conformance.run.catalogue import collect
from dsv4_conformance.run.runner import LEVELS, run_check
from dsv4_core.contract.spec import OPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dsv4_core.contract.backend import Backend

FLOW = (
    "embedding", "rms_norm", "linear", "apply_rope", "hadamard", "sparse_attn", "grouped_linear", "swiglu", "hc_split_sinkhorn",
    "hc_pre", "hc_post", "hc_add", "gate", "gate_hash", "expert_linear", "combine", "compress", "index_scores", "index_select", "hc_head",
    "sample",
)  # fmt: skip
"""Required ops of level 1 in the order in which they are easiest to write: what later ones are made
of comes first.
"""


@dataclass(frozen=True)
class OpState:
    """One op: ``passed`` of ``of`` smoke cases, and the first that failed; ``of`` is 0 where the
    backend has not the op.
    """

    op: str
    level: int
    own: bool
    passed: int = 0
    of: int = 0
    failing: str = ""
    message: str = ""

    @property
    def word(self) -> str:
        """What is said of it."""
        if not self.own:
            return "composed" if OPS[self.op].fused else "missing"
        return "passes smoke" if self.passed == self.of else f"fails {self.of - self.passed} of {self.of}"


def required() -> list[str]:
    """Every required op: level 0 first, then level 1 in the order of :data:`FLOW`."""
    place = {name: i for i, name in enumerate(FLOW)}
    names = [name for name, spec in OPS.items() if not spec.fused]
    return sorted(names, key=lambda name: (level_of(OPS[name]), place.get(name, len(place))))


def states(backend: Backend) -> list[OpState]:
    """Run the smoke cases of every op that the backend brings."""
    session, every = Session(backend, "smoke"), collect("smoke", backend.numerics, backend)
    fused = [name for name, spec in OPS.items() if spec.fused and type(backend).implements(name)]
    found = []
    for name in (*required(), *fused):
        own = type(backend).implements(name)
        checks: Sequence[Check] = [c for c in every if c.op == name and c.group == "op"] if own else ()
        findings: list[Finding] = [f for f in (run_check(c, session) for c in checks) if f.status != "unsupported"]
        bad = next((f for f in findings if f.status in BAD), None)
        found.append(
            OpState(
                name,
                level_of(OPS[name]),
                own,
                sum(f.status == "passed" for f in findings),
                len(findings),
                bad.id if bad else "",
                bad.message if bad else "",
            )
        )
    return found


def lines(found: Sequence[OpState], backend: Backend) -> list[str]:
    """Progress against the levels, and the next thing to do."""
    said = []
    for level in (0, 1):
        here = [s for s in found if s.level == level]
        done = [s for s in here if s.own and s.passed == s.of]
        said.append(f"level {level} ({LEVELS[level]}): {len(done)} of {len(here)} ops pass smoke")
        said += [f"    {s.op:18} {s.word}" for s in here if s not in done]
    fused = [s for s in found if s.level == 3]
    said += [f"    {s.op:18} {s.word} (fused)" for s in fused]
    run = f"dsv4 conformance run --backend {backend.name}"
    wrong = next((s for s in found if s.own and s.failing), None)
    missing = next((s for s in found if not s.own and not OPS[s.op].fused), None)
    if wrong:
        said += [f"next: mend {wrong.op}: {wrong.failing}", f"    {wrong.message}", f"    {run} --case {wrong.failing}"]
    elif missing:
        spec = OPS[missing.op]
        scalars = ["*", *spec.scalars] if spec.scalars else []
        said.append(f"next: write {missing.op}({', '.join(['self', *spec.arrays, *scalars])})")
        said += [f"    {name}: [{axes}] {spec.dtypes.get(name, '')}" for name, axes in spec.axes.items()]
        given = [spec.dtypes.get(f"return.{i}", spec.dtypes.get("return", "")) for i in range(len(spec.returns))]
        said += [
            f"    returns [{axes}] {dtype}, {kind}"
            for axes, dtype, kind in zip(spec.returns, given, spec.judged, strict=True)
        ]
        said += [f"    {line}" for line in spec.doc.splitlines()]
        said.append(f"    then: {run} --op {missing.op} --watch")
    else:
        said.append(f"next: every required op is there: {run} --tier standard says which level it comes to")
    return said
