"""Plant every fault of tests/ascend/kernel_faults.py in a copy of the package, let the conformance
suite judge the copy with the kernels interpreted, write a report.

python backends/ascend/tools/plant_kernels.py --report reports/ascend/planted_kernels.json
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "backends" / "ascend" / "dsv4_backend_ascend"
sys.path.insert(0, str(ROOT / "tests" / "ascend"))

from kernel_faults import FAULTS, Fault  # noqa: E402


def planted(fault: Fault, path: Path) -> None:
    """Copy the package with a fault into ``path``."""
    copy = shutil.copytree(PACKAGE, path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    source = copy / "kernels" / f"{fault.module}.py"
    text = source.read_text(encoding="utf-8")
    if text.count(fault.found) != 1:
        raise SystemExit(f"{source.name} has {fault.found!r} {text.count(fault.found)} times; a fault is planted once")
    source.write_text(text.replace(fault.found, fault.planted), encoding="utf-8")


def noticed(fault: Fault) -> str:
    """The first case of the op that fails; empty where the suite passes."""
    with tempfile.TemporaryDirectory() as path:
        planted(fault, Path(path))
        command = [sys.executable, "-m", "dsv4_core", "conformance", "run", "--backend", "ascend", "--simulate", "910B"]
        command += ["--option", "prefer=triton", "--tier", fault.tier, "--op", fault.op, "--quiet"]
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    first = re.search(rf"^(?:FAILED|ERROR) ({fault.op}/\S+)", done.stdout, re.MULTILINE)
    return f"`{first[1]}`" if done.returncode == 1 and first else ""


def main() -> int:
    """Command line; fails where a fault goes unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("names", nargs="*", help="these alone; the others' rows stay as they are")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in FAULTS]:
        parser.error(f"no fault {unknown[0]!r}; they are {', '.join(FAULTS)}")
    known = json.loads(args.report.read_text(encoding="utf-8"))["faults"] if args.names and args.report.exists() else {}
    for name in args.names or FAULTS:
        fault = FAULTS[name]
        known[name] = {
            "what": fault.what,
            "module": fault.module,
            "op": fault.op,
            "tier": fault.tier,
            "noticed": noticed(fault),
        }
        print(f"{name}: {known[name]['noticed'] or 'NOT NOTICED'}", flush=True)
    faults = {name: known[name] for name in FAULTS if name in known}
    report = {
        "says": "each fault is one change to a kernel's source, in a copy of the package that the suite judged, interpreted; nothing "
        "ran on an NPU",
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "faults": faults,
    }
    args.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    missed = [name for name, fault in faults.items() if not fault["noticed"]]
    print(f"{len(faults)} faults, {len(faults) - len(missed)} noticed; missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
