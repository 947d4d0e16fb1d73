"""``dsv4 conformance localise``: the first op, layer, position and element at which a backend
leaves its budget.

Every op is judged on the inputs that it had in the run, so that errors do not compound: what comes
late in the model is judged as strictly as what comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsv4_conformance.check import Session, describe
from dsv4_conformance.exchange import replay
from dsv4_conformance.model.record import Recorded
from dsv4_conformance.verdict.calls import execute
from dsv4_conformance.verdict.judge import Verdict
from dsv4_core.files.reading import integers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from dsv4_core.checkpoint.config import ModelConfig
    from dsv4_core.contract.dtypes import Host

SAVED = 20  # cases: one per op is enough, and there are 40 ops


@dataclass(frozen=True)
class Judged:
    """A recorded call with its verdict, and another backend's on the same inputs."""

    recorded: Recorded
    verdict: Verdict
    other: Verdict | None = None

    @property
    def used(self) -> float:
        """The worse of both."""
        return max(self.verdict.used, self.other.used if self.other else 0.0)

    @property
    def ok(self) -> bool:
        """Neither is over budget."""
        return self.verdict.ok and (self.other is None or self.other.ok)

    def position(self) -> str:
        """The token's position that the worst element belongs to, where the first axis is one of
        tokens.
        """
        verdict = self.verdict if self.verdict.used >= (self.other.used if self.other else 0.0) else self.other
        element = (verdict.worst if verdict else {}).get("element")
        positions, axes = self.recorded.positions, self.recorded.call.spec.returns[0].split()
        if not isinstance(element, list) or not axes or axes[0] not in {"tokens", "batch"}:
            return "-"
        row, rows = int(element[0]), self.recorded.results[0].shape[0]
        if axes[0] == "batch":
            row, rows = row * self.recorded.results[0].shape[1] + int(element[1]), len(positions)
        return (
            str(int(positions[row * len(positions) // rows]))
            if len(positions) and rows and rows % len(positions) == 0
            else "-"
        )


def judge_all(
    calls: Iterable[Recorded], session: Session, against: Session | None = None, *, again: bool = False
) -> list[Judged]:
    """Judge recorded results, and what ``against`` computes from the same inputs. ``again``: the
    session's backend computes, too.
    """
    judged = []
    for recorded in calls:
        call = recorded.call
        if again:
            judged.append(
                Judged(recorded, _executed(recorded, session), replay.judge_recorded(call, recorded.results, session))
            )
            continue
        other = _executed(recorded, against) if against else None
        judged.append(Judged(recorded, replay.judge_recorded(call, recorded.results, session), other))
    return judged


def _executed(recorded: Recorded, session: Session) -> Verdict:
    """A backend's verdict on recorded inputs; its results are to have the recorded shapes."""
    call = recorded.call
    try:
        with np.errstate(all="ignore"):
            outcome = execute(call, session.backend, [r.shape for r in recorded.results])
    except Exception as error:  # noqa: BLE001  whatever the backend raises is its result
        return Verdict([describe(error)], float("inf"))
    return (
        Verdict(outcome.problems, float("inf"))
        if outcome.problems
        else replay.judge_recorded(call, outcome.results, session)
    )


def report(judged: Sequence[Judged], names: tuple[str, str]) -> list[str]:
    """The first call over budget, then the worst call of each op after it."""
    over = next((i for i, j in enumerate(judged) if not j.ok), None)
    if over is None:
        worst = max(judged, key=lambda j: j.used, default=None)
        text = f"; nearest: {worst.recorded.name}, {worst.used:.3g} of its budget" if worst else ""
        return [f"{len(judged)} calls, all within budget{text}"]
    first = judged[over]
    at = first.recorded
    lines = [f"first over budget: op {at.call.op}, {at.place}, {at.time}, position {first.position()}  ({at.name})"]
    for name, verdict in zip(names, (first.verdict, first.other), strict=True):
        if verdict:
            lines.append(f"  {name}: {'; '.join(verdict.problems) or f'within budget ({verdict.used:.3g} of it)'}")
    worst_of: dict[str, Judged] = {}
    for j in judged[over:]:
        op = j.recorded.call.op
        if op not in worst_of or j.used > worst_of[op].used:
            worst_of[op] = j
    lines.append("worst of each op from there on (share of budget used):")
    for op, j in worst_of.items():
        shares = ", ".join(f"{name} {v.used:.3g}" for name, v in zip(names, (j.verdict, j.other), strict=True) if v)
        where = f"{j.recorded.time}, {j.recorded.place}, position {j.position()}, element {j.verdict.worst.get('element', '-')}"
        lines.append(f"  {'' if j.ok else 'OVER '}{op}: {shares}; {where}")
    return lines


def save_findings(judged: Sequence[Judged], directory: Path, numerics: str) -> list[Path]:
    """Save the first call over budget of each op."""
    paths: dict[str, Path] = {}
    for j in judged:
        op = j.recorded.call.op
        if not j.ok and op not in paths and len(paths) < SAVED:
            paths[op] = directory / f"{j.recorded.name}{replay.SUFFIX}"
            problems = j.verdict.problems or (j.other.problems if j.other else [])
            replay.save(paths[op], j.recorded.call, numerics, "; ".join(problems))
    return list(paths.values())


def ranges(text: str | None) -> Callable[[int], bool]:
    """``0,2-5`` as a predicate; nothing given takes all."""
    if text is None:
        return lambda _: True
    try:
        pairs = [(int(a), int(b or a)) for a, _, b in (part.partition("-") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"{text!r}: write numbers and ranges, e.g. 0,2-5") from None
    return lambda n: any(a <= n <= b for a, b in pairs)


def chosen(layers: str | None, positions: str | None, prefill: int) -> Callable[[str, str], bool]:
    """Which steps and layers are recorded: layers by number (embedding and head always), steps by a
    position that they feed.
    """
    layer, position = ranges(layers), ranges(positions)

    def keep(time: str, place: str) -> bool:
        fed = range(prefill) if time == "prefill" else [int(time.removeprefix("decode"))]
        return (not place.startswith("layer") or layer(int(place.removeprefix("layer")))) and any(
            position(p) for p in fed
        )

    return keep


def text_of(tokens: str, config: ModelConfig) -> Host:
    """Token ids [1, total]: from a .npy file, or so many random ones."""
    if tokens.isdecimal() and tokens.isascii():
        if not 1 <= int(tokens[:9]) == int(tokens) <= config.max_position_embeddings:
            raise ValueError(f"--tokens {tokens}: the model takes 1 to {config.max_position_embeddings}")
        return np.random.default_rng(0).integers(0, config.vocab_size, (1, int(tokens)))
    try:
        ids = integers(Path(tokens), "--tokens takes a number, or a .npy file of token ids [total] or [batch, total]")
    except OSError as error:
        raise ValueError(f"--tokens {tokens}: neither a number nor a .npy file of token ids ({error})") from None
    if not ids.ndim:
        raise ValueError(f"--tokens {tokens}: a single number; it takes token ids, [total] or [batch, total]")
    return ids.reshape(-1, ids.shape[-1])
