"""Failures that a vendor expects: each with a reason and a date on which it expires.

[[xfail]]
case = "linear/fp4_*"        # a case's id, or a pattern of them
reason = "FP4 kernel still truncates, ticket 123"
expires = 2027-06-30
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dsv4_core.files.reading import toml_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True)
class Xfail:
    """An expected failure."""

    case: str
    reason: str
    expires: datetime.date

    def matches(self, case_id: str) -> bool:
        """Say whether it covers a case."""
        return self.case == case_id or fnmatchcase(case_id, self.case)


def load(path: Path) -> list[Xfail]:
    """Read a file of them; raise ``ValueError`` naming the entry and what it lacks."""
    document = toml_file(path, dict[str, Any], "write [[xfail]] tables with case, reason and expires")
    entries = document.pop("xfail", [])
    if document or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{path}: holds {', '.join(document) or 'an xfail that is no list'}; write [[xfail]] tables only"
        )
    found = []
    for i, entry in enumerate(entries):
        for key, kind, example in (
            ("case", str, '"linear/fp4"'),
            ("reason", str, '"why"'),
            ("expires", datetime.date, "2027-06-30"),
        ):
            if not isinstance(entry.get(key), kind) or isinstance(entry[key], datetime.datetime) or not entry[key]:
                raise ValueError(f"{path}: [[xfail]] number {i + 1} needs {key} = {example}, has {entry.get(key)!r}")
        if more := entry.keys() - {"case", "reason", "expires"}:
            raise ValueError(f"{path}: [[xfail]] number {i + 1} has {min(more)!r}; it takes case, reason and expires")
        found.append(Xfail(entry["case"], entry["reason"], entry["expires"]))
    return found


def stale(xfails: Iterable[Xfail], known: set[str], today: datetime.date) -> list[str]:
    """Name those that have expired or match no case of the suite."""
    problems = []
    for x in xfails:
        if x.expires < today:
            problems.append(f"xfail {x.case!r} expired on {x.expires}: fix it, or extend it with a new reason")
        if not any(x.matches(k) for k in known):
            problems.append(f"xfail {x.case!r} matches no case; remove it (ids: dsv4 conformance run --list)")
    return problems
