"""Mutants of kernels: a copy of the package with one fault in it, judged by the suite as it stands, in the interpreter, in a process of its own.

Slow: run only where this file is named, as ``make cuda`` does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dsv4_backend_cuda
import pytest
from faults import FAULTS

PACKAGE = Path(dsv4_backend_cuda.__file__).parent
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads cost an interpreter more than they give


def judge(path: Path, op: str, tier: str) -> subprocess.CompletedProcess[str]:
    """The suite on the package under ``path``."""
    command = [
        sys.executable,
        "-m",
        "dsv4_core",
        "conformance",
        "run",
        "--backend",
        "cuda",
        "--interpret",
        "--tier",
        tier,
        "--op",
        op,
        "--quiet",
        "--isolate",
    ]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **ALONE, "PYTHONPATH": str(path)}
    )


def planted(name: str, path: Path) -> Path:
    """A copy of the package with a fault."""
    fault = FAULTS[name]
    copy = shutil.copytree(PACKAGE, path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    source = copy / "kernels" / f"{fault.module}.py"
    text = source.read_text()
    assert text.count(fault.found) == 1, (
        f"{source.name} has {fault.found!r} {text.count(fault.found)} times; the fault must be planted once"
    )
    source.write_text(text.replace(fault.found, fault.planted))
    return path


@pytest.fixture
def named(request):
    if not any("test_faults" in argument for argument in request.config.args):
        pytest.skip("minutes; run pytest tests/cuda/test_faults.py")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_can_be_planted(name, tmp_path):
    planted(name, tmp_path)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("name", FAULTS)
def test_the_suite_notices(name, tmp_path):
    fault = FAULTS[name]
    done = judge(planted(name, tmp_path), fault.op, fault.tier)
    assert done.returncode == 1, f"{fault.what} went unnoticed:\n{done.stdout}{done.stderr}"
    assert re.search(rf"^(FAILED|ERROR|CRASHED) {fault.op}/", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("op", sorted({(f.op, f.tier) for f in FAULTS.values()}))
def test_without_a_fault_it_passes(op, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    done = judge(tmp_path, *op)
    assert done.returncode == 0, done.stdout + done.stderr
