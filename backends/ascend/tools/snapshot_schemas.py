"""Write the schemas of the npu ops that the backend calls, as the installed torch-npu registers
them, into ``data/npu_schemas.json``: one snapshot a wheel, in place of that wheel's older one.

Run in the environment of ``npu_venv.py``. ``--check`` compares instead of writing and fails on a
difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch_npu  # noqa: F401  registers the ops
from torch_npu import version

PACKAGE = Path(__file__).resolve().parents[1] / "dsv4_backend_ascend"
sys.path.insert(0, str(PACKAGE.parent))

from dsv4_backend_ascend.capability import table  # noqa: E402

SNAPSHOTS = PACKAGE / "data" / "npu_schemas.json"
CANN = {
    "2.9.0.post2": "9.0.0, op-plugin 26.0.0",
    "2.10.0.post4": "9.1.0, op-plugin 26.1.0",
    "2.13.0": "none named yet in torch-npu's table",
}
"""Which CANN a wheel is paired with, by COMPATIBILITY of Ascend/pytorch at 9e73e708
(2026-08-21).
"""


def snapshot() -> dict[str, Any]:
    """Schemas as printed by the dispatcher; an op that the wheel lacks is left out."""
    schemas = {}
    for op in sorted({call.op for call in table().calls if call.tier == "cann"}):
        for found in torch._C._jit_get_schemas_for_operator(f"npu::{op}"):  # noqa: SLF001
            if not found.overload_name:
                schemas[op] = str(found)
    wheel = str(version.__version__)
    return {
        "wheel": f"torch-npu {wheel}",
        "cann": CANN.get(wheel, "not known"),
        "commit": version.git_version,
        "torch": torch.__version__.partition("+")[0],
        "schemas": schemas,
    }


def order(entry: dict[str, Any]) -> list[int]:
    """Sort key: the wheel's version."""
    return [int(part) for part in entry["wheel"].rpartition(" ")[2].replace("post", "").split(".")]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    mine = snapshot()
    kept = json.loads(SNAPSHOTS.read_text(encoding="utf-8"))["wheels"] if SNAPSHOTS.exists() else []
    if args.check:
        same = mine in kept
        print("the snapshot matches the wheel" if same else "the snapshot differs from the wheel; run without --check")
        return 0 if same else 1
    wheels = sorted([*(entry for entry in kept if entry["wheel"] != mine["wheel"]), mine], key=order)
    SNAPSHOTS.write_text(json.dumps({"wheels": wheels}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(mine['schemas'])} schemas of {mine['wheel']} -> {SNAPSHOTS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
