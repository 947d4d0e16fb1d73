"""What can be said of a backend without loading its libraries: `dsv4 backends` and `dsv4 doctor`
both say this.
"""

from __future__ import annotations

from typing import cast

from dsv4_core.contract import registry
from dsv4_core.contract.diagnosis import Diagnosis, Look
from dsv4_core.contract.spec import BackendError


def look(name: str) -> Look:
    """Look at an installed backend: its requirements by metadata, then what it says itself. Raises
    nothing.
    """
    backend = registry.installed()[name]
    if backend.problem:
        return Look("cannot run", backend.problem)
    advice = backend.install_command if backend.missing else ""
    lines = tuple(
        Diagnosis(
            need, "missing" if need in backend.missing else "installed", advice if need in backend.missing else ""
        )
        for need in backend.beyond
    )
    if backend.missing:
        return Look("cannot run", f"needs {', '.join(backend.missing)}: {backend.install_command}", lines)
    own = registry.entries(registry.LOOKS).get(name)
    if not own:
        return Look("runs", "", lines)
    try:
        with registry.blaming(f"the look of backend {name!r}", "failed"):
            found = cast("Look", registry.loaded(own[0])())
            return Look(found.status, found.note, (*lines, *found.lines))
    except BackendError as error:
        return Look("cannot run", str(error), lines)
