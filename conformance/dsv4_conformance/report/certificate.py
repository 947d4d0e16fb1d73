"""A report's certificate: what it is of, so that others can verify it.

Hashes of the suite, of the oracle's and the plug-in's files and of the cases' inputs, versions of
libraries, the device, and the kernels that ran. A hash of files covers each file's name, relative
to its package, and bytes; compiled Python is left out.
"""

from __future__ import annotations

import hashlib
import sys
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_core.contract import registry
from dsv4_core.files.reading import contents

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dsv4_conformance.check import Finding
    from dsv4_conformance.run.runner import Run

LENGTH = 32  # hexadecimal digits that are kept: 128 bits
JUDGES = ("dsv4_conformance", "dsv4_core")  # the suite, with the contracts and the graph that it judges by


def hashed(packages: Iterable[str]) -> str:
    """Hash every file of some packages, by name and content."""
    digest = hashlib.sha256()
    for name in packages:
        spec = util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        every = root.rglob("*") if spec.submodule_search_locations is not None else [Path(spec.origin)]
        for path in sorted(every):
            if path.is_file() and "__pycache__" not in path.parts:
                text = contents(path)
                digest.update(f"{name}/{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()[:LENGTH]


@cache
def suite() -> str:
    """The hash of the suite: its own files and the core's."""
    return hashed(JUDGES)


def inputs(findings: Iterable[Finding]) -> str:
    """One hash of the inputs of every op case, whatever the order in which they ran."""
    text = "\n".join(sorted(f"{f.id} {f.inputs}" for f in findings if f.inputs))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def plugin(name: str) -> dict[str, str]:
    """The plug-in of a backend: who distributes it, and its files."""
    known = registry.installed()[name]
    package = known.module.partition(":")[0].partition(".")[0]
    return {"distribution": known.distribution, "version": known.version, "module": package, "files": hashed([package])}


def oracle() -> dict[str, str]:
    """The oracle that judged: who distributes it, and its files."""
    who = registry.oracle_entry()
    package = who.point.module.partition(".")[0]
    return {"distribution": who.distribution, "version": who.version, "module": package, "files": hashed([package])}


def libraries() -> dict[str, str]:
    """Versions of the distributions whose modules the run had imported."""
    owners = metadata.packages_distributions()
    names = {d for module in list(sys.modules) if "." not in module for d in owners.get(module, ())}
    return {name: metadata.version(name) for name in sorted(names)}


def of_run(run: Run, arguments: Sequence[str]) -> dict[str, Any]:
    """The certificate of a run; ``arguments``: the words that give its numerics and the backend's
    options again.
    """
    kernels = sorted({kernel for f in run.findings for kernel in f.ran.split()})
    return {
        "suite": suite(),
        "oracle": oracle(),
        "plugin": plugin(run.backend),
        "inputs": inputs(run.findings),
        "arguments": list(arguments),
        "libraries": libraries(),
        "kernels": kernels,
    }
