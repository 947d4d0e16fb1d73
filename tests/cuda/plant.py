"""Mutants of kernels and of what is around them: copies of a package with one fault each, judged by
the suite as it stands, interpreted, or by tests of this folder, in processes of their own.

python tests/cuda/plant.py [NAME ...]   # minutes; writes docs/cuda-faults.md, exit status 1 if a
fault goes unnoticed

With names, those faults alone are planted, and the others' rows stay as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dsv4_backend_cuda
import dsv4_backend_torch
from faults import FAULTS, Fault

from dsv4_core.files.markdown import in_lines

PACKAGES = {p.__name__: Path(p.__file__).parent for p in (dsv4_backend_cuda, dsv4_backend_torch)}
TESTS = Path(__file__).parent
DOCUMENT = Path(__file__).parents[2] / "docs" / "cuda-faults.md"
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads cost an interpreter more than they give
HEAD = """# Faults planted in the Triton kernels

Each row is one change to the source of a kernel or of what is around it, of a kind that has shipped somewhere. `tests/cuda/plant.py` plants it in a copy of
the package and lets the conformance suite judge the copy in Triton's repaired interpreter, in a process of its own; the run must fail in the named op. Where
no case of the suite can reach it (sums that wait, graphs' buffers, other libraries), tests of `tests/cuda` judge it. The list is
`tests/cuda/faults.py`. Nothing here ran on a GPU. Written by

    python tests/cuda/plant.py        # minutes; `make cuda` runs it

| fault | kernel | tier | noticed first by |
|---|---|---|---|
"""


def planted(fault: Fault, path: Path) -> Path:
    """A copy of the package with a fault, in ``path``."""
    package, _, module = fault.module.rpartition("/")
    package, module = (package, module) if package else ("dsv4_backend_cuda", f"kernels/{module}")
    copy = shutil.copytree(PACKAGES[package], path / package, ignore=shutil.ignore_patterns("__pycache__"))
    source = copy / f"{module}.py"
    text = source.read_text()
    assert text.count(fault.found) == 1, (
        f"{source.name} has {fault.found!r} {text.count(fault.found)} times; the fault must be planted once"
    )
    source.write_text(text.replace(fault.found, fault.planted))
    return path


def judged(fault: Fault, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """What a Python module, run as a program, says of a copy with the fault."""
    with tempfile.TemporaryDirectory() as path:
        env = {**os.environ, **ALONE, "PYTHONPATH": str(planted(fault, Path(path)))}
        command = [sys.executable, "-m", module, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=TESTS.parents[1])


def noticed(fault: Fault) -> str:
    """The first case that fails, with how it did unless by its numbers, or the first test; empty
    where all pass.
    """
    if fault.op.endswith(".py"):
        return noticed_by_tests(fault)
    chosen = ["--case", f"{fault.op}/{fault.case}"] if fault.case else ["--op", fault.op]
    command = ["dsv4_core", "conformance", "run", "--backend", "cuda", "--interpret", "--tier", fault.tier, *chosen]
    done = judged(fault, *command, "--quiet", "--isolate")
    first = re.search(rf"^(FAILED|ERROR|CRASHED) ({fault.op}/\S+)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not first:
        return ""
    return f"`{first[2]}`" + (" (ends the process)" if first[1] == "CRASHED" else "")


def noticed_by_tests(fault: Fault) -> str:
    """The first test that fails; empty where all pass."""
    done = judged(fault, "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", str(TESTS / fault.op))
    first = re.search(r"^FAILED \S+?::(\w+)", done.stdout, re.MULTILINE)
    return f"`{fault.op}::{first[1]}`" if done.returncode == 1 and first else ""


def row(fault: Fault) -> str:
    """A fault's row of the document, without who noticed."""
    return f"| {fault.what} | {fault.module} | {'tests' if fault.op.endswith('.py') else fault.tier} | "


def main(names: list[str]) -> int:
    """Plant the faults named, or all, two at a time."""
    if unknown := [n for n in names if n not in FAULTS]:
        sys.exit(f"plant.py: no fault {unknown[0]!r}; they are {', '.join(FAULTS)}")
    chosen = {n: FAULTS[n] for n in names or FAULTS}
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for name, by in zip(chosen, pool.map(noticed, chosen.values()), strict=True):
            found[name] = by
            print(f"{name}: {by or 'UNNOTICED'}", flush=True)
    missed = [name for name, by in found.items() if not by]
    print(f"{len(found) - len(missed)} of {len(found)} noticed")
    before = DOCUMENT.read_text().splitlines()
    lines = {n: f"{row(FAULTS[n])}{by} |" for n, by in found.items()}
    for name, fault in FAULTS.items():
        kept = [line for line in before if line.startswith(row(fault))]
        if name not in lines and kept:
            lines[name] = kept[0]
    if absent := [n for n in FAULTS if n not in lines]:
        print(f"not planted yet, so nothing is written: {', '.join(absent)}")
    elif not missed:
        DOCUMENT.write_text(in_lines(HEAD) + "".join(f"{lines[n]}\n" for n in FAULTS))
    return bool(missed or absent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
