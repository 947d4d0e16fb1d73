"""Collect what the reports of rungs L1 to L3 prove into ``data/proof.json``, and write the generated part of docs/ascend.md.

python backends/ascend/tools/collect.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv4_backend_ascend import document
from dsv4_backend_ascend.capability import GENERATIONS, Generation, table
from dsv4_backend_ascend.schema import schemas

ROOT = Path(__file__).resolve().parents[3]
REPORTS = ROOT / "reports" / "ascend"
PROOF = ROOT / "backends" / "ascend" / "dsv4_backend_ascend" / "data" / "proof.json"
PAGE = ROOT / "docs" / "ascend.md"


def read(name: str) -> dict[str, Any]:
    """A report; an absent one proves nothing."""
    path = REPORTS / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def proofs() -> dict[str, Any]:
    """Rungs of every call of the table on every generation that it names, and of composed ops."""
    l1, l2 = read("l1"), read("l2")
    cann: dict[str, Any] = {}
    composed: dict[str, Any] = {}
    for generation in GENERATIONS:
        l3 = read(f"l3-{generation}")
        runs = [run for title, pair in l2.get("runs", {}).items() if title.endswith(generation) for run in pair]
        device_clean = bool(runs) and not any(
            run["with an operand in host memory"] or run["without an NPU kernel"] for run in runs
        )
        passed = (l3.get("level") or 0) >= 3 and not l3["failures"] and not l3["self-test differences"]
        agreed = {call["call"]: True for call in l1.get("calls", {}).get(generation, [])}
        for call in l1.get("calls", {}).get(generation, []):
            agreed[call["call"]] &= call["agrees"]
        ran = {name for run in runs for name in run["calls of the table that ran"]}
        cann[generation] = {
            call.name: [
                rung
                for rung, reached in (
                    ("L0", call.op in schemas() and call.op not in l1.get("drift", {}).get("schemas", {})),
                    ("L1", agreed.get(call.name, False)),
                    ("L2", device_clean and call.name in ran),
                    ("L3", passed and call.name in l3["calls of the table that ran"]),
                )
                if reached
            ]
            for call in _claimed(generation)
        }
        composed[generation] = [rung for rung, reached in (("L2", device_clean), ("L3", passed)) if reached]
    return {"versions": l1.get("versions", {}), "cann": cann, "composed": composed}


def _claimed(generation: Generation) -> list[Any]:
    return [call for call in table().calls if any(generation in cell.generations for cell in call.cells)]


def proof_text() -> str:
    """``data/proof.json``."""
    return json.dumps(proofs(), indent=1) + "\n"


def page() -> str:
    """docs/ascend.md."""
    l3 = {chip: report for chip in GENERATIONS if (report := read(f"l3-{chip}"))}
    return document.page(PAGE.read_text(encoding="utf-8"), proofs(), l3)


def main() -> None:
    """Write both files."""
    PROOF.write_text(proof_text(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PROOF.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
