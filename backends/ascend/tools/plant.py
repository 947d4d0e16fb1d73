"""Plant every vendor bug of tests/ascend/vendor_bugs.py in simulated CANN, run the self-test on
each, write a report.

python backends/ascend/tools/plant.py --report reports/ascend/planted.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
from pathlib import Path
from typing import Any

from dsv4_backend_ascend import selftest
from dsv4_backend_ascend.selftest_cases import CASES

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "ascend"))

from vendor_bugs import BUGS, faulty


def main() -> int:
    """Command line; fails where a bug is not found, or found under another op's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    bugs: dict[str, Any] = {}
    for name, (generation, op, contract, fault) in BUGS.items():
        backend = faulty(generation, op)
        with backend.chip.planted(op, fault):
            outcomes = list(selftest.run(backend, [case for case in CASES if case.contract == contract], small=True))
        differ = [o for o in outcomes if o.found]
        bugs[name] = {
            "chip": generation,
            "op": op,
            "cases that differ": [f"{o.contract}/{o.case}" for o in differ],
            "first": differ[0].found if differ else "",
            "named": bool(differ) and all(op in o.ops and o.found.startswith(f"{backend.tier} tier") for o in differ),
        }
        print(f"{name}: {bugs[name]['first'] or 'NOT FOUND'}")
    report = {
        "says": "bugs planted in simulated CANN, found by the self-test; no vendor kernel ran",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "bugs": bugs,
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    missed = [name for name, bug in bugs.items() if not bug["named"]]
    print(
        f"{len(bugs)} bugs, {len(bugs) - len(missed)} found with op and tier named; missed: {', '.join(missed) or 'none'}"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
