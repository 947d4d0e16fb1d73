"""What must be there before a kernel can run: Triton, a GPU that it compiles for, or the repaired
interpreter. And what `dsv4 doctor` says of it.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from dsv4_backend_torch import interpret

from dsv4_backend_cuda import hopper, launch
from dsv4_core.contract.backend import BackendError, Diagnosis

ARITHMETICS = ("exact", "hopper")
DRIVER = Path("/proc/driver/nvidia/version")
ELSEWHERE = "or run on the CPU: --interpret (minutes, for proofs), --backend torch"


def triton_version() -> str:
    """Triton's version, empty where it is not installed; imports nothing."""
    try:
        return version("triton") if find_spec("triton") else ""
    except PackageNotFoundError:  # a module without metadata, e.g. a source tree
        return "unknown"


def require_triton() -> None:
    """Raise ``BackendError`` without Triton."""
    if not triton_version():
        raise BackendError(
            "backend 'cuda' needs triton, not found here; pip install 'dsv4[cuda]', or choose --backend torch"
        )


def require_arithmetic(name: str, *, interpreted: bool) -> None:
    """Raise ``BackendError`` for an arithmetic that there is not, or that a GPU would have to be
    asked for.
    """
    if name not in ARITHMETICS:
        raise BackendError(f"backend 'cuda': arithmetic {name!r} is not one of {', '.join(ARITHMETICS)}")
    if name != "exact" and not interpreted:
        raise BackendError(
            f"backend 'cuda': arithmetic {name!r} is the interpreter's; add --interpret, or leave it out"
        )


def require_interpreter(arithmetic: str = "exact") -> None:
    """Make this process interpret kernels; raise ``BackendError`` where it cannot, or where it
    imitates another arithmetic already.
    """
    try:
        interpret.activate()
    except interpret.InterpreterError as error:
        raise BackendError(f"backend 'cuda' with --interpret: {error}") from error
    if arithmetic == "hopper":
        hopper.install()
    elif hopper.installed():
        raise BackendError(
            "backend 'cuda': this process imitates sm_90's arithmetic, for good; start another for exact arithmetic"
        )


def require_gpu(device: str) -> int:
    """Give the architecture whose configurations a device runs; raise ``BackendError`` where there
    is none.
    """
    if torch.device(device).type != "cuda":
        raise BackendError(f"backend 'cuda': device {device!r} is not a CUDA device; leave --device out, {ELSEWHERE}")
    if interpret.active() or os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendError(
            "backend 'cuda': this process interprets its kernels (TRITON_INTERPRET=1, or an earlier --interpret), so none can be compiled; "
            "unset TRITON_INTERPRET and start another process, or add --interpret"
        )
    if torch.version.cuda is None:
        raise BackendError(
            f"backend 'cuda': torch {torch.__version__} was built without CUDA; install a CUDA build from pytorch.org, {ELSEWHERE}"
        )
    if not torch.cuda.is_available():
        raise BackendError(
            f"backend 'cuda': torch {torch.__version__} finds no GPU (nvidia-smi lists them; driver: {driver()}); {ELSEWHERE}"
        )
    try:
        major, minor = torch.cuda.get_device_capability(device)
        return launch.compatible(10 * major + minor)
    except ValueError as error:
        raise BackendError(
            f"backend 'cuda': {torch.cuda.get_device_name(device)}: {error}; choose --backend torch --device {device}"
        ) from None
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device number that is not there
        raise BackendError(
            f"backend 'cuda': device {device!r} of {torch.cuda.device_count()} cannot be used: {str(error).splitlines()[0]}"
        ) from None


def driver() -> str:
    """The NVIDIA driver's own line, or that there is none."""
    return DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "not loaded"


def environment(index: int | None, arch: int) -> dict[str, str]:
    """What a report says of where kernels ran. ``index``: of the GPU; None where they were
    interpreted or ran dry.
    """
    found = {"torch": torch.__version__, "triton": triton_version(), "configurations": f"sm_{arch}"}
    if index is None:
        how = "kernels were interpreted" + (", with sm_90's arithmetic" if hopper.installed() else "")
        how = how if interpret.active() else "a dry run"
        return found | {"device": f"none: {how}"}
    gpu = torch.cuda.get_device_properties(index)
    return found | {
        "CUDA": str(torch.version.cuda),
        "driver": driver(),
        "device": f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
        f"{gpu.total_memory / 2**30:.0f} GiB",
    }


def diagnose() -> tuple[Diagnosis, ...]:
    """Triton and whether the interpreter's repair knows it, driver, GPUs and their compute
    capability.
    """
    found = triton_version()
    known = f"known to the interpreter's repair: {', '.join(interpret.TESTED_TRITON)}"
    if not found:
        lines = [Diagnosis("triton", "not installed", "pip install 'dsv4[cuda]'")]
    elif found in interpret.TESTED_TRITON:
        lines = [Diagnosis("triton", f"{found}, {known}")]
    else:
        lines = [
            Diagnosis(
                "triton",
                f"{found}; {known}",
                f"--interpret refuses it: pip install triton=={interpret.TESTED_TRITON[-1]}",
            )
        ]
    lines.append(
        Diagnosis("NVIDIA driver", driver(), "" if DRIVER.exists() else "install NVIDIA's driver, or use --interpret")
    )
    built = f"torch {torch.__version__}, " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    )
    lines.append(
        Diagnosis("torch", built, "" if torch.version.cuda else "install a CUDA build of torch, or use --interpret")
    )
    if not torch.cuda.is_available():
        return (*lines, Diagnosis("GPU", "none found"))
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        try:
            runs, advice = f"runs sm_{launch.compatible(10 * major + minor)}'s kernels", ""
        except ValueError as error:
            runs, advice = "has no kernels", str(error)
        lines.append(
            Diagnosis(
                f"GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}, {runs}", advice
            )
        )
    return tuple(lines)
