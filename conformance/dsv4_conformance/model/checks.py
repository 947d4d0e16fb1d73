"""The model as a whole: exact modes against the recorded vectors, native mode by its distance from
exact logits.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from dsv4_conformance.check import Check, Finding, Group, Session
from dsv4_conformance.model import golden, stored_logits
from dsv4_conformance.verdict.ties import to_the_lower
from dsv4_core.checkpoint.convert import Options, convert
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.graph.evaluate import teacher_forced
from dsv4_core.graph.model import Model

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dsv4_core.contract.backend import Backend
    from dsv4_core.contract.dtypes import Host
    from dsv4_core.contract.spec import Numerics, Tier

EXACT: tuple[Numerics, ...] = ("float64", "float32")
LIMIT: dict[Numerics, float] = {"float64": 3e-6, "float32": 1e-5}
"""The vectors are float32 and were made with another frequency table, which moves logits by up to
5e-7; float32 adds what six layers make of its unit.
"""
PREFILL = 300  # of the recorded prompts' 320 tokens
WORST = 3  # times the limit for a single position, so that a bad decode step cannot hide in the mean
ALLOWED = 1.1  # times the reference's own native distance
BLOCK = 8  # neighbouring positions share what they read, so they are drawn together
DRAWS = 2000  # of the bootstrap: the 5 % quantile to about a tenth of its distance from the middle


def in_mode(session: Session, numerics: Numerics) -> Backend:
    """The session's backend in a mode, made once."""
    backend = session.backend
    if numerics == backend.numerics:
        return backend
    key = f"backend {numerics}"
    if key not in session.shared:
        session.shared[key] = type(backend)(
            numerics=numerics, **{o.name: getattr(backend, o.name) for o in backend.options}
        )
    return cast("Backend", session.shared[key])


def relative(got: Host, want: Host) -> float:
    """Relative L2 distance."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64)))


@dataclass(frozen=True)
class ExactModel:
    """One recorded model in every exact mode that the backend has (or the one that is judged)."""

    model: golden.Model
    what: Literal["logits", "mtp_logits"]
    modes: tuple[Numerics, ...]
    group: Group = "model"

    @property
    def id(self) -> str:
        """``model/NAME/exact_logits``."""
        return f"model/{self.model}/exact_{self.what}"

    @property
    def op(self) -> str:
        """The recorded model's name."""
        return self.model

    @property
    def tier(self) -> Tier:
        """The smallest model at ``smoke``."""
        return "smoke" if self.model == "tiny-flash" else "standard"

    @property
    def level(self) -> int:
        """2, or 3 for the MTP block."""
        return 2 if self.what == "logits" else 3

    def run(self, session: Session) -> Finding:
        """Prefill and decode both prompts, compare."""
        finding = Finding(self.id, self.op, self.group, self.level, "passed")
        modes = [m for m in self.modes if m in session.backend.numerics_modes]
        problems: list[str] = []
        for mode in modes:
            found = self.compare(session, mode, finding)
            if found and (moved := self.tied(session, mode)) is not None:
                if session.backend.ties == "any":
                    finding.metrics[f"{mode} ties moved"] = float(moved)
                    finding.used = min(finding.used, 1.0)
                    continue
                found = (
                    f"{found}; with ties of the indexer's scores to the lower row it passes ({moved} choices moved): break them so, "
                    "or declare ties = 'any'"
                )
            problems += [found] if found else []
        if problems:
            finding.status, finding.message = "failed", "; ".join(problems)
        finding.dtypes = "+".join(modes)
        return finding

    def tied(self, session: Session, mode: Numerics) -> int | None:
        """How many choices change where ties go to the lower row, if the logits are right then;
        None if they are not.
        """
        with to_the_lower(in_mode(session, mode)) as moved:
            again = Session(session.backend, session.tier)
            again.shared.update({k: v for k, v in session.shared.items() if k.startswith("backend ")})
            wrong = self.compare(again, mode, Finding(self.id, self.op, self.group, self.level, "passed"))
        return None if wrong or not moved else len(moved)

    def compare(self, session: Session, mode: Numerics, finding: Finding) -> str:
        """Say how far one mode's logits are off, if they are; note the figures."""
        want = golden.load(self.model, "golden")[f"exact.{self.what}"]
        got = self.results(session, mode)[self.what]
        steps = 1 if self.what == "mtp_logits" else want.shape[1]
        total = relative(got, want)
        each = (
            [relative(g, w) for g, w in zip(np.split(got, steps, 1), np.split(want, steps, 1), strict=True)]
            if steps > 1
            else [total]
        )
        at = int(np.argmax(each))
        finding.metrics[f"{mode} relative error"] = total
        share = max(total / LIMIT[mode], each[at] / (WORST * LIMIT[mode]))
        if not share <= finding.used:
            finding.used, finding.worst = (
                share,
                {"numerics": mode, "position": PREFILL - 1 + at, "relative error": each[at]},
            )
        if share <= 1:
            return ""
        return (
            f"{mode}: {self.what} are {total:.3g} from the recorded ones (limit {LIMIT[mode]:.0e}), "
            f"worst at position {PREFILL - 1 + at}: {each[at]:.3g}"
        )

    def results(self, session: Session, mode: Numerics) -> dict[str, Host]:
        """Teacher-forced logits, computed once for both checks of a model."""
        key = f"{self.model} {mode}"
        if key not in session.shared:
            model = Model(Checkpoint(golden.checkpoint_path(self.model)), in_mode(session, mode))
            prompt = golden.load(self.model, "golden")["prompt"]
            session.shared[key] = teacher_forced(model, prompt, prefill=PREFILL, mtp=True)
        return cast("dict[str, Host]", session.shared[key])


def ratio_of_means(mine: Host, reference: Host, seed: int = 0) -> tuple[float, float]:
    """Ratio of the means of two paired series [draws], and its lower bound at 95 % confidence, by
    bootstrap.
    """
    picked = np.random.default_rng(seed).integers(0, len(mine), (DRAWS, len(mine)))
    ratios = mine[picked].mean(1) / reference[picked].mean(1)
    return float(mine.mean() / reference.mean()), float(np.quantile(ratios, 0.05))


def ratio_bound(mine: Host, reference: Host) -> tuple[float, float]:
    """:func:`ratio_of_means` of two series [sequences, positions], drawn in blocks of neighbouring
    positions.
    """
    a, b = (x.reshape(-1, BLOCK).mean(1) for x in (mine, reference))
    return ratio_of_means(a, b)


def share_of_excess(least: float) -> float:
    """How much of what a distance may exceed the reference's own by is used: none at or below its
    own, all at ``ALLOWED``.
    """
    return 0.0 if least <= 1 else (least - 1) / (ALLOWED - 1)


def judge_distance(logits: Host, prefix: str = "") -> tuple[list[str], float, dict[str, float]]:
    """Problems, share of what is allowed, and figures of native logits [2, 160, vocab] at the
    stored positions.

    ``prefix``: of the reference's stored distances.
    """
    stored = stored_logits.load()
    exact = stored["exact"].astype(np.float64)
    kl, l2 = stored_logits.distances(logits, exact)
    problems: list[str] = []
    figures: dict[str, float] = {}
    used = 0.0
    for name, mine, reference in (("KL", kl, stored[f"{prefix}kl"]), ("relative L2", l2, stored[f"{prefix}l2"])):
        ratio, least = ratio_bound(mine, reference.astype(np.float64))
        figures |= {
            f"{name}": float(mine.mean()),
            f"{name} of the reference": float(reference.mean()),
            f"{name} ratio": ratio,
            f"{name} ratio at least": least,
        }
        if not (share := share_of_excess(least)) <= used:
            used = share
        if not least <= ALLOWED:
            problems.append(
                f"{name} from the exact logits is {mine.mean():.4g}, the reference's native mode {reference.mean():.4g}: "
                f"{ratio:.3g} times as far, at least {least:.3g} with 95 % confidence; {ALLOWED} is allowed"
            )
    picked, best = logits.argmax(-1), exact.argmax(-1)
    top = np.sort(exact, -1)
    margin = np.where(picked == best, 0.0, top[..., -1] - top[..., -2])
    return (
        problems,
        used,
        figures
        | {"top-1 agreement": float((picked == best).mean()), "largest margin of a disagreement": float(margin.max())},
    )


@dataclass(frozen=True)
class NativeDistance:
    """How far native logits of the trained checkpoint lie from the exact ones, against the
    reference's own distance.
    """

    id: str = "model/tiny-jargon/native_distance"
    op: str = "tiny-jargon"
    group: Group = "model"
    tier: Tier = "smoke"
    level: int = 2

    def run(self, session: Session) -> Finding:
        """Feed 320 tokens of two prompts, prefill and decode; judge positions 160 .. 319."""
        model = Model(Checkpoint(golden.checkpoint_path("tiny-jargon")), in_mode(session, "native"))
        logits = stored_logits.teacher_forced(model, stored_logits.CHUNKINGS[0])[:, stored_logits.FIRST :]
        problems, used, figures = judge_distance(logits)
        worst: dict[str, Any] = {}
        return Finding(
            self.id,
            self.op,
            self.group,
            self.level,
            "failed" if problems else "passed",
            "; ".join(problems),
            "bfloat16",
            used,
            figures,
            worst,
        )


@dataclass(frozen=True)
class Int8Distance:
    """What W8A8 costs: the trained checkpoint is converted, and its native logits are held against
    the published one's exact ones.

    The format is lossy by declaration, so what is judged is the backend: it may lie no further away
    than W8A8 itself does, which is the reference's own distance on the same converted checkpoint.
    """

    id: str = "model/tiny-jargon/w8a8_int8_distance"
    op: str = "tiny-jargon"
    group: Group = "model"
    tier: Tier = "standard"
    level: int = 3

    def run(self, session: Session) -> Finding:
        """Convert, feed 320 tokens of two prompts, judge positions 160 .. 319."""
        with tempfile.TemporaryDirectory() as folder:
            convert(golden.checkpoint_path("tiny-jargon"), Path(folder) / "w8a8", Options(int8=True))
            checkpoint = Checkpoint(Path(folder) / "w8a8")
            model = Model(checkpoint, in_mode(session, "native"))
            logits = stored_logits.teacher_forced(model, stored_logits.CHUNKINGS[0])[:, stored_logits.FIRST :]
        problems, used, figures = judge_distance(logits, "w8a8_int8_")
        for name in ("KL", "relative L2"):
            lossless = f"{name} of the lossless reference"
            figures[lossless] = float(stored_logits.load()[{"KL": "kl"}.get(name, "l2")].mean())
            figures[f"{name} beside lossless"] = figures[name] / figures[lossless]
        return Finding(
            self.id,
            self.op,
            self.group,
            self.level,
            "failed" if problems else "passed",
            "; ".join(problems),
            "int8",
            used,
            figures,
        )


def checks(numerics: Numerics, backend: Backend | None = None) -> list[Check]:
    """The recorded models in the exact modes (all of them in a native run), and the native
    distance. A backend that has no exact mode is judged by its native model alone: call by call
    (``shadowed``), and by its distance.
    """
    has = backend.numerics_modes if backend else EXACT
    modes = tuple(m for m in (EXACT if numerics == "native" else (numerics,)) if m in has)
    if not modes:
        return [NativeDistance()]
    found: list[Check] = [ExactModel(m, w, modes) for m in golden.MODELS for w in ("logits", "mtp_logits")]
    return [*found, NativeDistance()] if numerics == "native" else found


def declared(formats: Iterable[str], numerics: Numerics) -> list[Check]:
    """What is checked of a backend that declares weight formats beside the published ones."""
    return [Int8Distance()] if "int8" in formats and numerics == "native" else []
