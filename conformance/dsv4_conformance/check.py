"""What can be checked: a list of ``Check``, each run against a session and giving a ``Finding``."""

from __future__ import annotations

import platform
import traceback
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from dsv4_core.contract import registry

if TYPE_CHECKING:
    from dsv4_conformance.verdict.judge import Verdict
    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.spec import Numerics, Tier

Status = Literal["passed", "failed", "error", "crashed", "timeout", "memory", "unsupported", "xfailed", "xpassed"]
Group = Literal["op", "trace", "law", "model", "invariance", "device"]
HERE = str(Path(__file__).parent)
TIERS: tuple[Tier, ...] = ("smoke", "standard", "full")
BAD: frozenset[str] = frozenset({"failed", "error", "crashed", "timeout", "memory", "xpassed"})


@dataclass
class Finding:
    """What a check found; one record of the report."""

    id: str
    op: str
    group: str
    level: int
    status: Status
    message: str = ""
    dtypes: str = ""
    used: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    worst: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    duration: float = 0.0
    claimed: bool = False
    """The backend's own file claims what was checked: by a level, or by name."""
    counts: bool = True
    """A failure fails the run: it was claimed, or the backend brings an implementation of its
    own.
    """
    inputs: str = ""
    """Hash of an op case's operands and scalars."""
    ran: str = ""
    """The vendor's kernels that ran in it, as the backend names them."""

    @classmethod
    def of(cls, check: Check, verdict: Verdict, *, seed: int = 0, dtypes: str = "", inputs: str = "") -> Finding:
        """A finding from a verdict."""
        return cls(
            id=check.id,
            op=check.op,
            group=check.group,
            level=check.level,
            status="passed" if verdict.ok else "failed",
            message="; ".join(verdict.problems),
            dtypes=dtypes,
            used=verdict.used,
            metrics=verdict.metrics,
            worst=verdict.worst,
            seed=seed,
            inputs=inputs,
        )


class Check(Protocol):
    """One thing that a run checks. ``op``: the op, or the law's or model's name. ``level``: which
    claim it belongs to.
    """

    @property
    def id(self) -> str:
        """What ``--case`` takes."""

    @property
    def op(self) -> str:
        """What ``--op`` takes."""

    @property
    def group(self) -> Group:
        """Kind of check."""

    @property
    def tier(self) -> Tier:
        """The least tier that runs it."""

    @property
    def level(self) -> int:
        """The level whose claim it tests."""

    def run(self, session: Session) -> Finding:
        """Check; exceptions are the runner's to report."""


@dataclass
class Session:
    """A backend under judgement and what it is judged by."""

    backend: Backend
    tier: Tier = "standard"
    dump: Path | None = None
    """Where operands, results and wanted results of an op case that fails are written."""
    repeat: int = 0
    """Which of many seeds (full tier, honest variants); 0 is the stable one of every id."""

    @cached_property
    def oracle(self) -> registry.Oracle:
        """The oracle for this backend's mode and declarations."""
        return registry.oracle(self.numerics, self.backend.narrower)

    @property
    def numerics(self) -> Numerics:
        """The mode that is judged."""
        return self.backend.numerics

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What checks of one session share (recorded vectors, loaded models), by a key of
        theirs.
        """
        return {}


def claimed(check: Check, backend: Backend) -> bool:
    """Say whether the backend's own file claims what a check tests: by level, or by name; a bitwise
    law for all ops, or for one as ``LAW/OP``.
    """
    if check.op in backend.departures:
        return False
    level = backend.claims_level
    if level is not None and check.level <= level:
        return True
    if check.group == "invariance":
        whole = backend.batch_invariant if check.op == "batch_invariance" else backend.deterministic
        return whole or check.id.rpartition("/")[0] in backend.claims
    return check.op in backend.claims


def describe(error: BaseException) -> str:
    """An exception as one line: type, text, and the innermost frame outside the suite."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(HERE)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
    text = str(error).strip().split("\n")[0]
    return f"raised {type(error).__name__}: {text}{where}"


def environment() -> dict[str, str]:
    """Where a run took place."""
    from importlib import metadata

    import numpy as np

    return {
        "suite": metadata.version("dsv4"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
    }
