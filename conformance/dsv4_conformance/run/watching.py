"""Running again whenever a backend's files change: each run in a process of its own, so that it
sees the new ones.
"""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

LOOKS = 0.5  # seconds between two looks at the files


def files_of(module: str) -> Mapping[Path, float]:
    """When each source of a module was last changed: a package's folder with everything below, or
    one file.
    """
    spec = find_spec(module.partition(":")[0])
    if spec is None or spec.origin is None:
        raise ValueError(f"--watch: module {module!r} has no file to be watched; run without it")
    origin = Path(spec.origin)
    every = origin.parent.rglob("*") if spec.submodule_search_locations else [origin]
    found = {}
    for path in every:
        if "__pycache__" not in path.parts and path.suffix not in {".so", ".pyc"} and path.is_file():
            found[path] = path.stat().st_mtime
    return found


def watching(module: str, words: Sequence[str], wait: Callable[[], None] = lambda: time.sleep(LOOKS)) -> int:
    """Run ``dsv4 conformance run WORDS`` now and after every change, until Ctrl-C; give the last
    run's exit status.
    """
    status = 2
    seen: dict[Path, float] = {}
    try:
        while True:
            now = dict(files_of(module))
            if now != seen:
                seen = now
                status = subprocess.run(  # noqa: S603  our own command, with the words that were typed
                    [sys.executable, "-m", "dsv4_core", "conformance", "run", *words], check=False
                ).returncode
                click.echo(
                    f"exit status {status}; waiting for a change of {len(seen)} files of {module}, Ctrl-C ends",
                    err=True,
                )
            wait()
    except KeyboardInterrupt:
        return status
