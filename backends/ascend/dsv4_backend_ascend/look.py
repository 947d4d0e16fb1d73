"""What of the ascend backend is here, told by files alone: neither torch nor torch-npu is
imported.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from dsv4_core.contract.diagnosis import Diagnosis, Look

SIMULATE = "without an NPU: --simulate 910B, 910C or 950 computes on a CPU, --soc plans"


def look() -> Look:
    """Look for torch-npu, CANN and an NPU's device node."""
    home = os.environ.get("ASCEND_HOME_PATH")
    has = {
        "torch-npu": find_spec("torch_npu") is not None,
        "CANN": bool(home and Path(home).is_dir()),
        "NPU": any(Path("/dev").glob("davinci[0-9]*")),
    }
    advice = {
        "torch-npu": "pip install 'dsv4[ascend]' on a machine with CANN",
        "CANN": "source CANN's set_env.sh",
        "NPU": "no /dev/davinci*: load Ascend's driver",
    }
    lines = tuple(
        Diagnosis(what, "found" if there else "not found", "" if there else advice[what]) for what, there in has.items()
    )
    if all(has.values()):
        return Look("runs", "", lines)
    missing = ", ".join(what for what, there in has.items() if not there)
    return Look("simulates only", f"no {missing}; {SIMULATE}", lines)
