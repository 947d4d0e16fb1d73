"""What CANN does for which contract, on which chip, with which CANN: answers from
``data/capabilities.toml``.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Generation = Literal["910B", "910C", "950"]
GENERATIONS: tuple[Generation, ...] = ("910B", "910C", "950")
Standing = Literal["documented", "source", "assumed"]
Tier = Literal["cann", "vendor"]
"""torch-npu's ops, and ops of an extension that may be installed beside it."""
Dtypes = Mapping[str, str]
"""Dtype name of each operand of a contract."""

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(?:RC(\d+)|(\d+)))?(.*)", re.IGNORECASE)
_EARLY = re.compile(r"alpha|beta|rc", re.IGNORECASE)


def cann_version(text: str) -> tuple[int, ...]:
    """Order CANN versions: ``8.2.RC1 < 8.5.0 < 9.1.0_beta.1 < 9.1.0``.

    What follows the leading numbers does not count, but for words that say "before the release":
    patch, build and service numbers (``8.2.RC1.1``, ``9.0.0.SPC001``, ``9.1.0.B080``) are of the
    version that they follow. Raises ``ValueError`` where no version is at the front.
    """
    match = _VERSION.match(text.strip().removeprefix("V").removeprefix("v"))
    if match is None:
        raise ValueError(
            f"CANN version {text!r} does not begin like 8.2.RC1 or 9.1.0; see the `version` line of CANN's install.info"
        )
    major, minor, candidate, patch, rest = match.groups()
    released = candidate is not None or not _EARLY.search(rest)
    return (int(major), int(minor), 0 if candidate else 1 + int(patch or 0), int(candidate or 0), int(released))


class Cell(NamedTuple):
    """Where one way of calling an op may be used."""

    generations: tuple[Generation, ...]
    operands: Mapping[str, tuple[str, ...]]
    min_cann: str
    standing: Standing
    source: str


@dataclass(frozen=True)
class Call:
    """One npu op in one way of calling it, the arguments that are passed by name, and the contracts
    that it serves. ``departs``: how it differs from them; such a call has to be asked for.
    """

    name: str
    op: str
    passes: tuple[str, ...]
    serves: tuple[str, ...]
    rounding: str
    cells: tuple[Cell, ...]
    tier: Tier = "cann"
    departs: str = ""


class Absence(NamedTuple):
    """Contracts that no npu op serves on some generation."""

    contracts: tuple[str, ...]
    generations: tuple[Generation, ...]
    reason: str
    operands: Mapping[str, tuple[str, ...]] = {}


class Answer(NamedTuple):
    """Tier of one contract: ``cann`` or ``vendor`` with the calls that make it up, or ``composed``
    with the reason why not better.
    """

    tier: Literal["cann", "composed", "triton", "vendor"]
    calls: tuple[Call, ...] = ()
    cells: tuple[Cell, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """The capability table."""

    wheel: str
    calls: tuple[Call, ...]
    absent: tuple[Absence, ...]
    unused: Mapping[str, str]

    def claimed(self, generation: Generation) -> tuple[Call, ...]:
        """Calls that may be made on a generation."""
        return tuple(call for call in self.calls if any(generation in cell.generations for cell in call.cells))

    @property
    def ops(self) -> tuple[str, ...]:
        """The npu ops that are called, each once."""
        return tuple(dict.fromkeys(call.op for call in self.calls))

    def _serving(self, tier: Tier, contract: str, generation: Generation, *, asked: bool) -> list[Call]:
        """Calls of a tier for a contract; those that depart from it alone where they are asked for
        and there.
        """
        calls = [call for call in self.calls if call.tier == tier and contract in call.serves]
        departing = [call for call in calls if call.departs and asked and call in self.claimed(generation)]
        return departing or [call for call in calls if not call.departs]

    def extension(
        self, contract: str, generation: Generation, dtypes: Dtypes, *, cann: str | None = None, asked: bool = False
    ) -> Answer:
        """Say which op of an extension serves a contract, if one does; else as ``answer``, without
        its absences. ``asked``: whether an op that departs from the contract may.
        """
        serving = self._serving("vendor", contract, generation, asked=asked)
        return _serve(serving, contract, generation, dtypes, cann)

    def answer(
        self, contract: str, generation: Generation, dtypes: Dtypes, *, cann: str | None = None, asked: bool = False
    ) -> Answer:
        """Say how a contract runs for operands of these dtypes: the table's part of it, before
        shapes are looked at.

        A contract of several calls (quantise, multiply) is served when all of them are; calls that
        differ in dtypes only are alternatives. ``cann`` None: any. ``asked``: as in ``extension``.
        """
        serving = self._serving("cann", contract, generation, asked=asked)
        for absence in () if any(call.departs for call in serving) else self.absent:
            if contract in absence.contracts and generation in absence.generations and _fits(absence.operands, dtypes):
                return Answer("composed", reason=absence.reason)
        return _serve(serving, contract, generation, dtypes, cann)


def _serve(serving: Sequence[Call], contract: str, generation: Generation, dtypes: Dtypes, cann: str | None) -> Answer:
    """Which of these calls serve a contract for operands of these dtypes."""
    if not serving:
        return Answer("composed", reason=f"no npu op serves {contract}")
    found = [
        (call, cell)
        for call in serving
        for cell in call.cells
        if generation in cell.generations and _fits(cell.operands, dtypes)
    ]
    if not found:
        named = ", ".join(f"{name}={dtype}" for name, dtype in dtypes.items())
        return Answer(
            "composed",
            reason=f"{' and '.join(dict.fromkeys(call.op for call in serving))}: not for {named} on {generation}",
        )
    for call, cell in found:
        if cann is not None and cann_version(cann) < cann_version(cell.min_cann):
            return Answer("composed", reason=f"{call.op} needs CANN {cell.min_cann} on {generation}, found {cann}")
    return Answer(serving[0].tier, tuple(call for call, _ in found), tuple(cell for _, cell in found))


def _fits(operands: Mapping[str, Sequence[str]], dtypes: Dtypes) -> bool:
    """Whether every operand that is named on both sides has a dtype that is listed."""
    return all(dtypes[name] in allowed for name, allowed in operands.items() if name in dtypes)


def _cell(raw: Mapping[str, Any]) -> Cell:
    operands = {name: tuple(allowed) for name, allowed in raw["operands"].items()}
    return Cell(tuple(raw["generations"]), operands, raw["min_cann"], raw["standing"], raw["source"])


@functools.cache
def table() -> Table:
    """Load the capability table."""
    raw = tomllib.loads(resources.files(__package__).joinpath("data/capabilities.toml").read_text(encoding="utf-8"))
    return Table(
        wheel=raw["wheel"],
        calls=tuple(
            Call(
                call["name"],
                call["op"],
                tuple(call["passes"]),
                tuple(call["serves"]),
                call["rounding"],
                tuple(map(_cell, call["cell"])),
                call.get("tier", "cann"),
                call.get("departs", ""),
            )
            for call in raw["call"]
        ),
        absent=tuple(
            Absence(tuple(entry["contracts"]), tuple(entry["generations"]), entry["reason"], entry.get("operands", {}))
            for entry in raw["absent"]
        ),
        unused={entry["op"]: f"{entry['reason']} (instead of {entry['instead_of']})" for entry in raw["unused"]},
    )
