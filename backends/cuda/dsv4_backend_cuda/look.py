"""What of the cuda backend is here, told by files alone: neither torch nor Triton is imported."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from dsv4_core.contract.diagnosis import Diagnosis, Look

DRIVER = Path("/proc/driver/nvidia/version")
INTERPRET = "on a CPU its kernels can be interpreted: --interpret (minutes, for proofs)"


def look() -> Look:
    """Look for NVIDIA's driver and for a torch that was built for CUDA."""
    driver, built = DRIVER.exists(), built_for_cuda()
    lines = (
        Diagnosis(
            "NVIDIA driver",
            DRIVER.read_text().splitlines()[0] if driver else "not loaded",
            "" if driver else "install NVIDIA's driver, or use --interpret",
        ),
        Diagnosis(
            "torch",
            f"built for CUDA {built}" if built else "built without CUDA",
            "" if built else "install a CUDA build of torch, or use --interpret",
        ),
    )
    if driver and built:
        return Look("runs", "", lines)
    missing = " and ".join(["no NVIDIA driver"] * (not driver) + ["a torch without CUDA"] * (not built))
    return Look("simulates only", f"{missing}; {INTERPRET}", lines)


def built_for_cuda() -> str:
    """Give the CUDA version that torch was built for, as its version.py says; empty for none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    version = Path(spec.origin).with_name("version.py")
    found = re.search(
        r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version.read_text() if version.is_file() else "", re.MULTILINE
    )
    return found[1] if found else ""
