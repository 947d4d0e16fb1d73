"""Which contracts no npu op may run: those that the user names, and those that failed in a
self-test's report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_backend_ascend.plan import IMPLEMENTATIONS
from dsv4_core.contract.backend import BackendError

if TYPE_CHECKING:
    from dsv4_backend_ascend.capability import Generation

CONTRACTS = (*dict.fromkeys(op for tier in IMPLEMENTATIONS.values() for op in tier), "moe")
"""Contracts that some tier of npu ops implements."""


def named(text: str | None) -> dict[str, str]:
    """Contracts of ``-O composed=OP,OP``, each with the reason. Raises ``BackendError`` for one
    that no npu op runs.
    """
    ops = [op.strip() for op in str(text).split(",") if op.strip()] if text else []
    if unknown := [op for op in ops if op not in CONTRACTS]:
        raise BackendError(
            f"backend 'ascend': composed={text}: no npu op runs {', '.join(unknown)}; those that one runs: {', '.join(CONTRACTS)}"
        )
    return dict.fromkeys(ops, f"composed={text} was asked for")


def failed(path: str | None, generation: Generation) -> dict[str, str]:
    """Contracts whose npu ops failed in the report of a self-test, each with the first case that
    did.

    Raises ``BackendError`` for a report that cannot be read, or is of another chip.
    """
    if not path:
        return {}
    report = _read(path)
    if report["chip"] != generation:
        raise BackendError(
            f"backend 'ascend': trust={path} is a self-test on {report['chip']}, this is {generation}: run "
            "`dsv4 ascend selftest --report FILE` here"
        )
    found: dict[str, str] = {}
    for outcome in report["outcomes"]:
        if outcome["found"] and not outcome["skipped"] and outcome["contract"] in CONTRACTS:
            found.setdefault(outcome["contract"], f"{path}: {outcome['case']}: {outcome['found']}")
    return found


def _read(path: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackendError(f"backend 'ascend': trust={path} cannot be read: {error}") from None
    wanted = {"contract": str, "case": str, "found": str, "skipped": str}
    outcomes = report.get("outcomes") if isinstance(report, dict) else None
    sound = isinstance(outcomes, list) and all(
        isinstance(o, dict) and all(isinstance(o.get(key), kind) for key, kind in wanted.items()) for o in outcomes
    )
    if not sound or "chip" not in report:
        raise BackendError(
            f"backend 'ascend': trust={path} is no report of `dsv4 ascend selftest --report FILE`: it has no outcomes of cases"
        )
    return dict(report)
