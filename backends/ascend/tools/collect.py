"""Collect what reports prove into ``data/proof.json``, and write the generated part of
docs/ascend.md.

L1 and L2 come from reports/ascend, L3 from the conformance suite's reports of runs on simulated
CANN.

python backends/ascend/tools/collect.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dsv4_backend_ascend import document
from dsv4_backend_ascend.capability import GENERATIONS, Generation, table
from dsv4_backend_ascend.schema import schemas, snapshots
from dsv4_conformance.report.short import whole

from dsv4_core.checkpoint.convert import Options, Tally, convert
from dsv4_core.checkpoint.weights import embedded

ROOT = Path(__file__).resolve().parents[3]
REPORTS = ROOT / "reports" / "ascend"
CONFORMANCE = ROOT / "reports" / "conformance"
NEWEST = snapshots()[-1].wheel.rpartition(" ")[2]
PROOF = ROOT / "backends" / "ascend" / "dsv4_backend_ascend" / "data" / "proof.json"
PAGE = ROOT / "docs" / "ascend.md"


def read(path: Path) -> dict[str, Any]:
    """A report; an absent one proves nothing."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def conformance(generation: Generation) -> dict[str, Any]:
    """The suite's report of a run on simulated CANN, its findings with every key."""
    report = read(CONFORMANCE / f"ascend-{generation}-simulated" / "report.json")
    return report | {"findings": [whole(finding) for finding in report["findings"]]} if report else report


def passed(report: dict[str, Any]) -> dict[str, bool]:
    """Of each call of the table whether every claimed check passed that ran it, in a whole run that
    reached level 3.
    """
    outcome: dict[str, bool] = {}
    if reached(report):
        for finding in report["findings"]:
            for call in finding.get("ran", "").split():
                outcome[call] = outcome.get(call, True) and (finding["status"] == "passed" or not finding["claimed"])
    return outcome


def reached(report: dict[str, Any]) -> bool:
    """Whether a report is of a whole run that passed at level 3 or better."""
    return bool(report) and report["ok"] and not report["partial"] and (report["level"] or 0) >= 3


def proofs() -> dict[str, Any]:
    """Rungs of every call of the table on every generation that it names, and of composed ops."""
    l1, l2 = (read(REPORTS / rung / f"{NEWEST}.json") for rung in ("l1", "l2"))
    cann: dict[str, Any] = {}
    composed: dict[str, Any] = {}
    for generation in GENERATIONS:
        l3 = conformance(generation)
        right = passed(l3)
        runs = [run for title, pair in l2.get("runs", {}).items() if title.endswith(generation) for run in pair]
        device_clean = bool(runs) and not any(
            run["with an operand in host memory"] or run["without an NPU kernel"] for run in runs
        )
        agreed = {call["call"]: True for call in l1.get("calls", {}).get(generation, [])}
        for call in l1.get("calls", {}).get(generation, []):
            agreed[call["call"]] &= call["agrees"]
        ran = {name for run in runs for name in run["calls of the table that ran"]}
        cann[generation] = {
            call.name: [
                rung
                for rung, holds in (
                    ("L0", call.op in schemas() and call.name not in l1.get("drift", {}).get("schemas", {})),
                    ("L1", agreed.get(call.name, False)),
                    ("L2", device_clean and call.name in ran),
                    ("L3", right.get(call.name, False)),
                )
                if holds
            ]
            for call in _claimed(generation)
        }
        composed[generation] = [rung for rung, holds in (("L2", device_clean), ("L3", reached(l3))) if holds]
    return {"versions": l1.get("versions", {}), "cann": cann, "composed": composed}


def _claimed(generation: Generation) -> list[Any]:
    return [call for call in table().calls if any(generation in cell.generations for cell in call.cells)]


def proof_text() -> str:
    """``data/proof.json``."""
    return json.dumps(proofs(), indent=1) + "\n"


def page() -> str:
    """docs/ascend.md."""
    runs = {chip: report for chip in GENERATIONS if (report := conformance(chip))}
    selftests = {chip: report for chip in GENERATIONS if (report := read(REPORTS / f"selftest-{chip}.json"))}
    planted = read(REPORTS / "planted.json")
    l1, l2 = (
        {s.cann: read(REPORTS / rung / f"{s.wheel.rpartition(' ')[2]}.json") for s in snapshots()}
        for rung in ("l1", "l2")
    )
    return document.page(
        PAGE.read_text(encoding="utf-8"),
        proofs(),
        runs,
        selftests,
        planted,
        l1,
        l2,
        w8a8_errors(),
        read(REPORTS / "launches.json"),
        read(REPORTS / "kernels.json"),
        read(REPORTS / "replayed.json"),
        read(REPORTS / "planted_kernels.json"),
    )


def w8a8_errors() -> dict[str, dict[str, float]]:
    """Error of the embedded checkpoint's weights as W8A8, by kind of tensor."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        convert(embedded(), Path(folder) / "w8a8", Options(int8=True), tally=tally)
    return tally.errors()


def main() -> None:
    """Write both files."""
    PROOF.write_text(proof_text(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PROOF.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
