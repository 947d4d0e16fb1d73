"""What is installed here: torch-npu, CANN, the chip. Nothing is imported until it is asked for, and every failure says
what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsv4_backend_ascend import proof
from dsv4_backend_ascend.capability import GENERATIONS, Generation, table
from dsv4_backend_ascend.schema import schemas
from dsv4_core.contract.backend import BackendError, Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAN = "plan without an NPU: --soc 910B, 910C or 950; compute on a CPU: --simulate CHIP"

_SOCS: tuple[tuple[str, Generation], ...] = (
    (r"Ascend910B\d?.*", "910B"),
    (r"Ascend910_?93\d*.*|Ascend910C.*", "910C"),
    (r"Ascend950.*|Ascend910_?95.*", "950"),
)
"""SoC names as torch-npu and CANN give them: Atlas A2, Atlas A3, Ascend 950."""


def generation_of(soc: str) -> Generation:
    """Generation of a SoC name. Raises ``BackendError`` for one that the capability table does not cover."""
    for pattern, generation in _SOCS:
        if re.fullmatch(pattern, soc):
            return generation
    raise BackendError(
        f"backend 'ascend': SoC {soc!r} is none that the capability table covers ({', '.join(GENERATIONS)}); "
        "if it is one of them under another name, say so with --soc"
    )


def import_torch_npu() -> Any:
    """Import torch-npu. Raises ``BackendError`` where it is missing, or where it is there and CANN is not."""
    if importlib.util.find_spec("torch_npu") is None:
        raise BackendError(f"backend 'ascend' needs torch-npu, not found here: pip install 'dsv4[ascend]'; {PLAN}")
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(
            f"backend 'ascend': torch-npu is installed and does not import: {reason}. Its libraries come with CANN: "
            f"source CANN's set_env.sh, or {PLAN}"
        ) from error


def npus() -> list[str]:
    """SoC name of every NPU that torch-npu finds; import it first. Raises ``BackendError`` where CANN fails over the question."""
    npu: Any = torch.npu  # type: ignore[attr-defined]
    try:
        return [npu.get_device_name(i) for i in range(npu.device_count())] if npu.is_available() else []
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(
            f"backend 'ascend': torch-npu imports, and fails when it is asked for NPUs: {reason}. Is CANN, "
            f"{cann_version() or 'of unknown version'}, the one that torch-npu {_installed_version()} was built for? Or {PLAN}"
        ) from error


def cann_version() -> str | None:
    """CANN's version from its install.info under ASCEND_HOME_PATH; None where there is none."""
    home = os.environ.get("ASCEND_HOME_PATH")
    for info in sorted(Path(home).glob("**/ascend_*_install.info")) if home else ():
        if found := re.search(r"^version=(\S+)", info.read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    return None


def drift() -> dict[str, str]:
    """Ops that the installed torch-npu (or the simulator) lacks, or has under another schema than the table's."""
    found = {}
    for op, committed in schemas().items():
        packet = getattr(torch.ops.npu, op, None)
        if packet is None:
            found[op] = "is missing in the installed torch-npu"
        elif str(packet.default._schema) != committed:  # noqa: SLF001
            found[op] = f"has another schema than the table's: {packet.default._schema}"  # noqa: SLF001
    return found


def diagnose() -> Iterator[Diagnosis]:
    """What `dsv4 doctor` shows. Raises nothing: each thing that is missing is a line with what to do."""
    chips = []
    for line in _installation():
        chips += [
            generation for generation in GENERATIONS if line.what == "NPU" and line.found.endswith(f": {generation}")
        ]
        yield line
    for generation in chips or GENERATIONS:
        for tier, reached in proof.summary(generation):
            yield Diagnosis(f"{generation} {tier}", reached)
    yield Diagnosis(
        "on hardware", "not run: no rung above L3 is recorded; `dsv4 ascend selftest` on an NPU asks every op"
    )


def _installation() -> Iterator[Diagnosis]:
    """torch-npu, CANN, ops and chips."""
    home = os.environ.get("ASCEND_HOME_PATH")
    version = cann_version()
    yield Diagnosis(
        "CANN",
        version or (f"no install.info under {home}" if home else "not found (ASCEND_HOME_PATH is not set)"),
        "" if version else f"source CANN's set_env.sh; {PLAN}",
    )
    if importlib.util.find_spec("torch_npu") is None:
        yield Diagnosis("torch-npu", "not installed", f"pip install 'dsv4[ascend]' on a machine with CANN; {PLAN}")
        return
    try:
        import_torch_npu()
    except BackendError as error:
        yield Diagnosis(
            "torch-npu",
            f"{_installed_version()}, does not import: {error.__cause__}".splitlines()[0],
            f"source CANN's set_env.sh; {PLAN}",
        )
        return
    yield Diagnosis(
        "torch-npu",
        f"{_installed_version()}, imports",
        "" if _installed_version() in table().wheel else f"the table was written for {table().wheel}",
    )
    missing = drift()
    for op, problem in missing.items():
        yield Diagnosis(
            "op",
            f"npu::{op} {problem}",
            "what it serves is composed; install the torch-npu that the table was written for",
        )
    if not missing:
        yield Diagnosis("ops", f"all {len(table().ops)} that are called are there, under the table's schemas")
    try:
        found = npus()
    except BackendError as error:
        yield Diagnosis("NPU", "could not be asked for", str(error))
        return
    if not found:
        yield Diagnosis("NPU", "none found", f"npu-smi info lists them; {PLAN}")
        return
    counted = f"{len(found)} x {found[0]}"
    try:
        yield Diagnosis("NPU", f"{counted}: {generation_of(found[0])}")
    except BackendError as error:
        yield Diagnosis("NPU", counted, str(error))


def _installed_version() -> str:
    try:
        return metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        return "of unknown version"
