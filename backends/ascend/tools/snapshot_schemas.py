"""Write the schemas of the npu ops that the backend calls, as the installed torch-npu registers them, to
``data/npu_schemas.json``.

Run in the environment of ``npu_venv.py``. ``--check`` compares instead of writing and fails on a difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch_npu  # registers the ops
from torch_npu import version

PACKAGE = Path(__file__).resolve().parents[1] / "dsv4_backend_ascend"
sys.path.insert(0, str(PACKAGE.parent))

from dsv4_backend_ascend.capability import table  # noqa: E402

SNAPSHOT = PACKAGE / "data" / "npu_schemas.json"


def snapshot() -> dict[str, object]:
    """Schemas as printed by the dispatcher; an op that the wheel lacks is an error that names it."""
    schemas = {}
    for op in sorted(table().ops):
        found = torch._C._jit_get_schemas_for_operator(f"npu::{op}")  # noqa: SLF001
        if not found:
            raise SystemExit(f"torch-npu {torch_npu.__version__} has no npu::{op}; the capability table names it")
        schemas[op] = str(next(schema for schema in found if not schema.overload_name))
    return {
        "wheel": f"torch-npu {version.__version__}",
        "commit": version.git_version,
        "torch": torch.__version__.partition("+")[0],
        "schemas": schemas,
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = json.dumps(snapshot(), indent=1) + "\n"
    if args.check:
        same = SNAPSHOT.read_text(encoding="utf-8") == text
        print("the snapshot matches the wheel" if same else "the snapshot differs from the wheel; run without --check")
        return 0 if same else 1
    SNAPSHOT.write_text(text, encoding="utf-8")
    print(f"{len(table().ops)} schemas -> {SNAPSHOT.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
