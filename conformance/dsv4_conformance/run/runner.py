"""A run: which checks, what was claimed, what it comes to."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4_conformance.check import BAD, TIERS, Check, Finding, Session, Status, claimed, describe, environment
from dsv4_conformance.run import catalogue
from dsv4_conformance.run import xfails as expected
from dsv4_core.contract.backend import Backend
from dsv4_core.contract.spec import OPS, UnsupportedOpError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from dsv4_core.contract.spec import Numerics, Tier

PROVES = 3  # the level at which a run counts as proof of the kernels that it ran
LEVELS = (
    "codecs and data movement",
    "all required ops",
    "the model, prefill and decode",
    "laws, fused ops and MTP",
    "bitwise determinism and batch invariance",
)


def run_check(check: Check, session: Session) -> Finding:
    """Run one check; an exception of the backend becomes a finding that names it and its line. An
    op that the backend does not have is not prepared for.
    """
    begin = time.perf_counter()
    backend = session.backend
    backend.kernels_ran()  # what ran before is not this check's
    if check.op in OPS and not OPS[check.op].fused and not type(backend).implements(check.op):
        reason = backend.supports(check.op).reason
        return Finding(check.id, check.op, check.group, check.level, "unsupported", reason)
    try:
        finding = check.run(session)
    except UnsupportedOpError as error:
        refused = refuses(check, backend)
        status: Status = "unsupported" if refused else "error"
        text = str(error) if refused else f"supports() said yes, and then it {describe(error)}; refuse it in supports()"
        used = 0.0 if refused else float("inf")
        finding = Finding(check.id, check.op, check.group, check.level, status, text, used=used)
    except MemoryError as error:
        finding = Finding(check.id, check.op, check.group, check.level, "memory", str(error) or "MemoryError")
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the backend raises is its result
        finding = Finding(check.id, check.op, check.group, check.level, "error", describe(error), used=float("inf"))
    finding.duration = time.perf_counter() - begin
    finding.ran = " ".join(backend.kernels_ran())
    return finding


def refuses(check: Check, backend: Backend) -> bool:
    """Say whether the backend's own ``supports`` explains that a check could not run: it refuses
    the op, or for a fused op that is composed and for checks of a whole model any op that the
    contract requires.
    """
    required = [name for name, spec in OPS.items() if not spec.fused]
    if check.op in OPS:
        composed = OPS[check.op].fused and not all(type(backend).implements(name) for name in required)
        return not type(backend).implements(check.op) and (composed or not OPS[check.op].fused)
    if not all(type(backend).implements(name) for name in required):
        return True
    try:
        return not all(backend.supports(name) for name in required)
    except Exception:  # noqa: BLE001  an answer that takes operands is no refusal of the op as such
        return False


def brought(check: Check, backend: Backend) -> bool:
    """Say whether a check tests an implementation of the backend's own: what is there is to be
    right, claimed or not.
    """
    return (
        check.group != "invariance"
        and check.op in OPS
        and check.op not in backend.departures
        and type(backend).implements(check.op)
    )


@dataclass
class Run:
    """What a run found and what it comes to."""

    backend: str
    tier: Tier
    numerics: Numerics
    findings: list[Finding] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    require: int | None = None
    partial: bool = False
    asked: bool = False
    """Cases were named: whatever fails of them fails the run, claimed or not."""
    claims_level: int | None = None
    claims: tuple[str, ...] = ()
    narrower: dict[str, tuple[str, ...]] = field(default_factory=dict)
    device: str = "cpu"
    version: str = "not stated"
    date: str = field(default_factory=lambda: str(datetime.datetime.now(datetime.timezone.utc).date()))
    duration: float = 0.0
    proof: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=environment)
    departures: dict[str, str] = field(default_factory=dict)
    flushes_subnormals: bool = False
    ties: str = "lower"

    def failures(self) -> list[Finding]:
        """Findings that fail the run: bad ones, and unsupported ones, that were claimed or
        required.
        """
        return [f for f in self.findings if self.fails(f)]

    def fails(self, finding: Finding) -> bool:
        """Say whether one finding fails the run."""
        if finding.status == "xpassed":
            return True
        counts = finding.counts or self.asked or (self.require is not None and finding.level <= self.require)
        if finding.status == "unsupported":
            by_level = self.claims_level is not None and finding.level <= self.claims_level
            refused = finding.op in self.claims and not any(
                f.op == finding.op and f.status != "unsupported" for f in self.findings
            )  # named in claims, and run in no case at all
            return by_level or refused or (self.require is not None and finding.level <= self.require)
        return finding.status in BAD and counts

    @property
    def level(self) -> int | None:
        """The highest level at and below which every check passed; None where level 0 already
        fails, or not everything was run.
        """
        return None if self.partial else level_of_statuses([(f.level, f.status) for f in self.findings])

    @property
    def ok(self) -> bool:
        """All that was claimed or required passed, and no xfail is stale; a required level must
        have been reached.
        """
        short = self.require is not None and not self.partial and (self.level is None or self.level < self.require)
        return not (self.failures() or self.stale or short)

    def counts(self) -> Counter[str]:
        """Findings by status."""
        return Counter(f.status for f in self.findings)

    def untested(self) -> list[str]:
        """Ops that no finding judged."""
        judged = {f.op for f in self.findings if f.status != "unsupported"}
        return [name for name in OPS if name not in judged]

    def summary(self) -> list[str]:
        """Closing lines; the last names what was not tested."""
        counts = self.counts()
        lines = [
            f"{sum(counts.values())} checks at tier {self.tier}, {self.numerics}: "
            + ", ".join(f"{n} {s}" for s, n in counts.most_common())
        ]
        unclaimed = [f for f in self.findings if f.status in BAD - {"xpassed"} and not self.fails(f)]
        if unclaimed:
            lines.append(f"not claimed and failing: {len(unclaimed)} ({', '.join(sorted({f.op for f in unclaimed}))})")
        lines += self.unclaimed_passes({f.op for f in self.findings if f.status in BAD - {"xpassed"}})
        lines += self.stale
        if not self.partial:
            reached = f"level {self.level} ({LEVELS[self.level]})" if self.level is not None else "no level"
            waived = f", {counts['xfailed']} failures expected" if counts["xfailed"] else ""
            needed = f"; level {self.require} was required" if self.require is not None else ""
            claim = f"; claims level {self.claims_level}" if self.claims_level is not None else "; claims no level"
            lines.append(f"backend {self.backend}: {reached}{waived}{claim}{needed}")
        if self.flushes_subnormals:
            lines.append(
                "judged within the least normal number of float32, as declared: subnormal numbers count as zero"
            )
        if self.ties == "any":
            lines.append("judged with ties broken in any way, as declared")
        for op, formats in self.narrower.items():
            lines.append(f"judged by narrower intermediates, as declared: {op}: {'; '.join(formats)}")
        for what in dict.fromkeys(self.departures.values()):
            ops = ", ".join(op for op, said in self.departures.items() if said == what)
            lines.append(f"departs from the contract by option, and claims nothing of it: {ops}: {what}")
        if self.proof:
            lines.append(f"proof: {said_once(self.proof)}")
        lines.append(("PASSED" if self.ok else "FAILED") + ". " + self.not_tested())
        return lines

    def unclaimed_passes(self, missed: set[str]) -> list[str]:
        """What passed and was not claimed, with what would claim it: a level where it was reached,
        else the names.
        """
        above = sorted({f.op for f in self.findings if f.status == "passed" and not f.claimed} - missed)
        if not above or self.asked:
            return []
        if self.level is not None and self.level > (-1 if self.claims_level is None else self.claims_level):
            return [f"passed but not claimed: level {self.level}; write claims_level = {self.level}"]
        own = {f.op for f in self.findings if f.counts}  # what a backend inherits is not its to claim
        named = [op for op in above if op in OPS and op in own]
        return [f"passed but not claimed: {', '.join(named)}; name them in claims"] if named else []

    def not_tested(self) -> str:
        """What this run says nothing about."""
        parts = []
        if names := self.untested():
            parts.append(f"{len(names)} ops" + ("" if self.partial else f": {', '.join(names)}"))
        parts += self.not_run
        return "Not tested: " + ("; ".join(parts) if parts else "nothing that this suite knows") + "."


def level_of_statuses(findings: Iterable[tuple[int, str]]) -> int | None:
    """The highest level at and below which every check passed, from levels and statuses; None where
    level 0 fails or is missing.
    """
    statuses: dict[int, set[str]] = {}
    for level, status in findings:
        statuses.setdefault(level, set()).add(status)
    reached = None
    for level in range(len(LEVELS)):
        if statuses.get(level) != {"passed"}:
            break
        reached = level
    return reached


def said_once(proof: Mapping[str, str]) -> str:
    """How many implementations are proven how far."""
    return "; ".join(
        f"{n} of {len(proof)} implementations {reached}" for reached, n in Counter(proof.values()).most_common()
    )


def passing(result: Run) -> dict[str, bool]:
    """Of each kernel whether every check that ran it passed (what is not claimed aside); nothing of
    a run that proves nothing.
    """
    if result.partial or not result.ok or (result.level or 0) < PROVES:
        return {}
    outcome: dict[str, bool] = {}
    for finding in result.findings:
        for kernel in finding.ran.split():
            outcome[kernel] = outcome.get(kernel, True) and (finding.status == "passed" or not finding.counts)
    return outcome


def select(every: Sequence[Check], ops: Iterable[str], cases: Iterable[str]) -> list[Check]:
    """Checks of the named ops (or laws) and ids; raise ``ValueError`` for a name that none has."""
    cases_in_order = list(cases)
    ops, cases = set(ops), set(cases_in_order)
    if unknown := ops - {c.op for c in every}:
        raise ValueError(
            f"--op {min(unknown)!r}: no check of this tier has that name; names: {', '.join(dict.fromkeys(c.op for c in every))}"
        )
    if unknown := cases - {c.id for c in every}:
        raise ValueError(
            f"--case {min(unknown)!r}: no such case; `dsv4 conformance run --tier full --list` prints all ids"
        )
    if not ops and not cases:
        return list(every)
    if not ops:  # in the order in which they were named: a failure may need an earlier call
        by_id = {c.id: c for c in every}
        return [by_id[c] for c in dict.fromkeys(cases_in_order)]
    return [c for c in every if c.op in ops or c.id in cases]


def run(
    session: Session,
    *,
    ops: Sequence[str] = (),
    cases: Sequence[str] = (),
    require: int | None = None,
    xfails: Sequence[expected.Xfail] = (),
    execute: Callable[[Sequence[Check]], Iterator[Finding]] | None = None,
    progress: Callable[[Finding, int, int], None] | None = None,
    today: datetime.date | None = None,
    version: str = "",
) -> Run:
    """Run a selection of checks on a session's backend. ``execute`` replaces the plain loop
    (isolation).
    """
    backend = session.backend
    begin = time.perf_counter()
    every = catalogue.collect("full", session.numerics, backend)
    every += [c for c in map(catalogue.find, dict.fromkeys(cases)) if c]  # saved calls, single examples of laws
    at_tier = [c for c in every if TIERS.index(c.tier) <= TIERS.index(session.tier)]
    chosen = select(every if cases else at_tier, ops, cases)
    by_id = {c.id: c for c in chosen}
    result = Run(
        backend=backend.name,
        tier=session.tier,
        numerics=session.numerics,
        require=require,
        partial=bool(ops or cases),
        asked=bool(cases),
        claims_level=backend.claims_level,
        claims=tuple(backend.claims),
        narrower=dict(backend.narrower),
        version=version or "not stated",
        departures=dict(backend.departures),
        flushes_subnormals=backend.flushes_subnormals,
        ties=backend.ties,
        device=str(getattr(backend, "device", "cpu")),
        environment={**environment(), **backend.environment()},
    )
    today = today or datetime.datetime.now(datetime.timezone.utc).date()
    result.stale = expected.stale(xfails, {c.id for c in every}, today)
    loop = execute or (lambda todo: (run_check(c, session) for c in todo))
    for finding in loop(chosen):
        check = by_id[finding.id]
        finding.claimed = claimed(check, backend)
        finding.counts = finding.claimed or brought(check, backend)
        matching = [x for x in xfails if x.matches(finding.id) and x.expires >= today]
        if matching:
            if finding.status in BAD:
                finding.status, finding.message = (
                    "xfailed",
                    f"expected: {matching[0].reason} (until {matching[0].expires}); {finding.message}",
                )
            elif finding.status == "passed":
                finding.status, finding.message = (
                    "xpassed",
                    f"passes, but is expected to fail ({matching[0].reason}); remove the xfail",
                )
        result.findings.append(finding)
        if progress:
            progress(finding, len(result.findings), len(chosen))
    left = len(every) - len(at_tier)
    if left and not cases:
        result.not_run.append(f"{left} checks above tier {session.tier}")
    if result.partial:
        result.not_run.append(f"{len(at_tier) - len(chosen)} checks outside the selection")
    result.proof = dict(backend.proof(passing(result)))
    result.duration = time.perf_counter() - begin
    return result


def to_json(run: Run) -> dict[str, Any]:
    """A run as plain data."""
    from dataclasses import asdict

    return {
        **{k: v for k, v in asdict(run).items() if k != "findings"},
        "level": run.level,
        "ok": run.ok,
        "findings": [{k: v for k, v in asdict(f).items() if k not in {"ran", "inputs"} or v} for f in run.findings],
    }
