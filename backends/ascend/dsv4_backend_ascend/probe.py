"""What is installed here: torch-npu, CANN, the chip. Nothing is imported until it is asked for, and
every failure says what to do.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsv4_backend_ascend import capability, proof
from dsv4_backend_ascend.capability import GENERATIONS, Generation, table
from dsv4_backend_ascend.schema import incompatible, namespace, overload, schemas, snapshots
from dsv4_core.contract.backend import BackendError, Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator

EXTENSION = "cann_ops_transformer"
VLLM = "vllm_ascend.vllm_ascend_C"
"""Where the ``_C_ascend`` ops come from: vLLM's own extension, loaded for a departure alone."""
SET_ENV = "source CANN's set_env.sh (cann/set_env.sh from 8.5 on, ascend-toolkit/set_env.sh before)"
PLAN = "plan without an NPU: --soc 910B, 910C or 950; compute on a CPU: --simulate CHIP"

_SOCS: tuple[tuple[str, Generation], ...] = (
    (r"Ascend910B\d?.*", "910B"),
    (r"Ascend910_?93\d*.*|Ascend910C.*", "910C"),
    (r"Ascend950.*|Ascend910_?95.*", "950"),
)
"""SoC names as torch-npu and CANN give them: Atlas A2, Atlas A3, Ascend 950."""


def generation_of(soc: str) -> Generation:
    """Generation of a SoC name. Raises ``BackendError`` for one that the capability table does not
    cover.
    """
    for pattern, generation in _SOCS:
        if re.fullmatch(pattern, soc):
            return generation
    raise BackendError(
        f"backend 'ascend': SoC {soc!r} is none that the capability table covers ({', '.join(GENERATIONS)}); "
        "if it is one of them under another name, say so with --soc"
    )


def import_torch_npu() -> Any:
    """Import torch-npu. Raises ``BackendError`` where it is missing, or where it is there and CANN
    is not.
    """
    if importlib.util.find_spec("torch_npu") is None:
        raise BackendError(f"backend 'ascend' needs torch-npu, not found here: pip install 'dsv4[ascend]'; {PLAN}")
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(
            f"backend 'ascend': torch-npu is installed and does not import: {reason}. Its libraries come with CANN: "
            f"{SET_ENV}, or {PLAN}"
        ) from error


def prepare(device: str) -> None:
    """Before anything opens a device: make this process's its own, load the operators' extension
    where it is installed, and have float32 products in float32.
    """
    npu: Any = torch.npu  # type: ignore[attr-defined]
    _, _, index = device.partition(":")
    if index.isdecimal() and hasattr(npu, "set_device"):  # without it every rank would open npu:0 first
        try:
            npu.set_device(int(index))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise BackendError(
                f"backend 'ascend': device {device!r} cannot be opened: {reason}; npu-smi info lists them (a 910C card is two)"
            ) from error
    if hasattr(getattr(npu, "matmul", None), "allow_hf32"):
        npu.matmul.allow_hf32 = False  # the router and hyper-connections depend on float32
    extension()


def extension(module: str = EXTENSION) -> str:
    """Load ``cann_ops_transformer``, or another extension; say why not where it is missing or does
    not load.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"does not import: {str(error).strip().splitlines()[0]}"
    return ""


def npus() -> list[str]:
    """SoC name of every NPU that torch-npu finds; import it first. Raises ``BackendError`` where
    CANN fails over the question.
    """
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
    """CANN's version as torch-npu tells it, else from an install.info under ASCEND_HOME_PATH; None
    where neither says.
    """
    told = getattr(getattr(sys.modules.get("torch_npu"), "npu", None), "utils", None)
    if told is not None and hasattr(told, "get_cann_version"):
        try:
            if version := str(told.get_cann_version("CANN") or ""):
                return version
        except (
            RuntimeError,
            ValueError,
            OSError,
        ):  # it reads the same files, and fails where they are not as it expects
            pass
    home = os.environ.get("ASCEND_HOME_PATH")
    toolkit_first = sorted(
        Path(home).glob("**/ascend_*_install.info") if home else (), key=lambda p: ("toolkit" not in p.name, str(p))
    )
    for info in toolkit_first:
        if found := re.search(r"^version=(\S+)", info.read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    return None


def drift() -> dict[str, str]:
    """Calls of the table that the installed torch-npu (or the simulator) cannot take: its op, and
    what is wrong with it.
    """
    found = {}
    for call in table().calls:
        op = overload(call.op)
        if op is None:
            owner = "torch-npu" if call.tier == "cann" else VLLM if call.departs else EXTENSION
            found[call.name] = f"{namespace(call.op)}::{call.op} is missing in the installed {owner}"
        elif problem := incompatible(str(op._schema), schemas()[call.op], call.passes):  # noqa: SLF001
            found[call.name] = f"{namespace(call.op)}::{call.op} {problem}"
    return found


def diagnose() -> Iterator[Diagnosis]:
    """What `dsv4 doctor` shows. Raises nothing: each thing that is missing is a line with what to
    do.
    """
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
        _doubt(version) if version else f"{SET_ENV}; {PLAN}",
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
            f"{SET_ENV}; {PLAN}",
        )
        return
    wheels = [snapshot.wheel.rpartition(" ")[2] for snapshot in snapshots()]
    yield Diagnosis(
        "torch-npu",
        f"{_installed_version()}, imports",
        "" if _installed_version() in wheels else f"compared with {', '.join(wheels)}, not with this one",
    )
    why = extension()
    missing = drift()
    vendors = {call.name for call in table().calls if call.tier == "vendor" and not call.departs}
    short = [name for name in vendors if name in missing]
    yield Diagnosis(
        "extension",
        f"{EXTENSION} {why}" if why else f"{EXTENSION}, {len(vendors) - len(short)} of {len(vendors)} calls",
        "optional: torch_extension of cann/ops-transformer brings ops of the vendor tier (docs/ascend.md)"
        if short
        else "",
    )
    served = {call.name: ", ".join(call.serves) for call in table().calls}
    used = {call.name for call in table().calls if call.tier == "cann" and not call.departs}
    missing = {name: problem for name, problem in missing.items() if name in used}
    for name, problem in missing.items():
        yield Diagnosis("op", problem, f"{served[name]}: composed where it would be called ({name})")
    if not missing:
        called = {call.op for call in table().calls if call.tier == "cann"}
        yield Diagnosis("ops", f"all {len(called)} of torch-npu that are called are there, and take the calls")
    try:
        found = npus()
    except BackendError as error:
        yield Diagnosis("NPU", "could not be asked for", str(error))
        return
    if not found:
        yield Diagnosis("NPU", "none found", f"npu-smi info lists them; {PLAN}")
        return
    yield from _hccl()
    counted = f"{len(found)} x {found[0]}"
    try:
        yield Diagnosis("NPU", f"{counted}: {generation_of(found[0])}")
    except BackendError as error:
        yield Diagnosis("NPU", counted, str(error))


HCCL = {
    "HCCL_BUFFSIZE": "megabytes of a collective's buffer: 512 to 2048 for expert parallelism, 200 where it is not set",
    "HCCL_OP_EXPANSION_MODE": "AIV: collectives of a decode step run on AI Core, and can be captured",
    "HCCL_CONNECT_TIMEOUT": "seconds: more than ranks differ by in loading, 120 where it is not set",
    "HCCL_IF_IP": "or HCCL_SOCKET_IFNAME, between hosts: which network",
}
"""What HCCL reads of the environment, and what for."""


def _hccl() -> Iterator[Diagnosis]:
    """HCCL's environment: what is set, what is not, and values that cannot be right."""
    for name, purpose in HCCL.items():
        value = os.environ.get(name)
        wrong = ""
        if value is not None and name in {"HCCL_BUFFSIZE", "HCCL_CONNECT_TIMEOUT"} and not value.isdecimal():
            wrong = f"a whole number: {purpose}"
        if value is not None and name == "HCCL_OP_EXPANSION_MODE" and value not in {"AIV", "AI_CPU", "HOST", "HOST_TS"}:
            wrong = f"AIV, AI_CPU, HOST or HOST_TS; {purpose}"
        yield Diagnosis("HCCL", f"{name}={value}" if value is not None else f"{name} is not set: {purpose}", wrong)


def _doubt(version: str) -> str:
    """What to say of a CANN version that cannot be read; nothing of one that can."""
    try:
        capability.cann_version(version)
    except ValueError as error:
        return f"{error}; ops are used as if it were new enough, or say with --cann which one it is like"
    return ""


def _installed_version() -> str:
    try:
        return metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        return "of unknown version"
