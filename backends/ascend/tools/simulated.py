"""Rung L3: the conformance suite and the self-test on simulated CANN; write a report.

Which calls of the capability table ran is taken from the plans that the backend made, so that a call that no case reached
claims nothing.

    python backends/ascend/tools/simulated.py --chip 910B --report reports/ascend/l3-910B.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from dsv4_backend_ascend import selftest
from dsv4_backend_ascend.backend import AscendBackend
from dsv4_backend_ascend.capability import GENERATIONS, table
from dsv4_conformance import checks, runner


def main() -> int:
    """Command line; fails where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=GENERATIONS, required=True)
    parser.add_argument("--tier", choices=checks.TIERS, default="standard")
    parser.add_argument("--report", type=Path, required=True)
    args = parser.parse_args()
    backend = AscendBackend(simulate=args.chip)
    session = checks.Session(backend, args.tier)
    run = runner.run(session, require=3)
    differ = [o for o in selftest.run(backend) if o.found]
    used = resource.getrusage(resource.RUSAGE_SELF)
    served: dict[str, Any] = {call.name: call.op for plan in backend.plans.values() for call in plan.calls}
    report = {
        "rung": "L3",
        "says": "the conformance suite passes on simulated CANN; no NPU was present, and no vendor kernel ran",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "versions": {"torch": torch.__version__, "table": table().wheel},
        "chip": args.chip,
        "tier": args.tier,
        "level": run.level,
        "claims level": run.claims_level,
        "checks": dict(run.counts()),
        "failures": [f.id for f in run.failures()],
        "not claimed and failing": sorted({f.op for f in run.findings if f.status in checks.BAD and not f.claimed}),
        "calls of the table that ran": dict(sorted(served.items())),
        "npu op calls": dict(sorted(backend.chip.calls.items())),
        "self-test differences": [f"{o.contract} {o.case}: {o.found}" for o in differ],
        "CPU seconds": round(used.ru_utime + used.ru_stime),
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        "\n".join(run.summary()), f"\n{len(served)} calls of the table ran, {len(differ)} differences in the self-test"
    )
    return 0 if run.ok and not differ else 1


if __name__ == "__main__":
    sys.exit(main())
