"""Reports of a run: JSON, JUnit XML and one HTML page; and the support matrix, made from JSON reports."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from dsv4_conformance.report.html import page
from dsv4_conformance.report.junit import junit
from dsv4_conformance.run.runner import Run, to_json

if TYPE_CHECKING:
    from pathlib import Path


def write(run: Run, directory: Path, rerun: str) -> None:
    """Write ``report.json``, ``junit.xml`` and ``report.html``. ``rerun``: the command that one more ``--case`` can be added to."""
    directory.mkdir(parents=True, exist_ok=True)
    data = finite(to_json(run))
    data["rerun"] = rerun
    (directory / "report.json").write_text(json.dumps(data, indent=1, default=str) + "\n")
    (directory / "junit.xml").write_text(junit(run, rerun))
    (directory / "report.html").write_text(page(data))


def finite(value: Any) -> Any:
    """Spell infinities and NaN as strings: JSON has no words for them."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
