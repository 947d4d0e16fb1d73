"""Reports of a run: JSON, JUnit XML and one HTML page; and the support matrix, made from JSON
reports.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from dsv4_conformance.report import certificate
from dsv4_conformance.report.html import page
from dsv4_conformance.report.junit import junit
from dsv4_conformance.report.short import short
from dsv4_conformance.run.runner import Run, to_json
from dsv4_core.files import writing as files
from dsv4_core.files.writing import writing_alone

if TYPE_CHECKING:
    from pathlib import Path

    from dsv4_core.cli.options import BackendFlags


def write(run: Run, directory: Path, command: str, rerun: str, flags: BackendFlags | None) -> None:
    """Write ``junit.xml``, ``report.html`` and, last, ``report.json``: a directory without it was
    not finished.

    ``command``: what was run; ``rerun``: what one more ``--case`` can be added to; ``flags``: the
    backend's, none where a program's results were judged, which leaves out the certificate.
    """
    data = finite(to_json(run))
    options = flags.options if flags else {}
    data |= {"command": command, "rerun": rerun, "options": {name: str(value) for name, value in options.items()}}
    if flags:
        data["certificate"] = certificate.of_run(run, flags.arguments())
    with writing_alone(directory):
        (directory / "report.json").unlink(missing_ok=True)  # an earlier run's must not stand beside the new pages
        files.write(directory / "junit.xml", junit(run, rerun))
        files.write(directory / "report.html", page(data, certificate.oracle()))
        files.write(directory / "report.json", text(data))


def text(data: dict[str, Any]) -> str:
    """Give a report's JSON, a line for each finding, without what is usual."""
    head = json.dumps({key: value for key, value in data.items() if key != "findings"}, indent=1, default=str)
    lines = ",\n".join(json.dumps(short(f), separators=(",", ":"), default=str) for f in data["findings"])
    return f'{head[:-2]},\n "findings": [\n{lines}\n ]\n}}\n'


def finite(value: Any) -> Any:
    """Spell infinities and NaN as strings, which JSON has no words for; a ``used`` that is no
    number is null.
    """
    if isinstance(value, dict):
        spelt = {k: finite(v) for k, v in value.items()}
        return {k: None if k == "used" and isinstance(v, str) else v for k, v in spelt.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
