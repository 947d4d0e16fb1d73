"""``convert.json``: what a converted copy was made of, how, and which shards it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from dsv4_core.checkpoint import identity
from dsv4_core.files.forms import Converted
from dsv4_core.files.reading import json_file
from dsv4_core.files.writing import write

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = "convert.json"


def read(directory: Path) -> Converted | None:
    """Read a copy's manifest; None where there is none. Raises ``FileError`` for one that is
    damaged.
    """
    try:
        return json_file(directory / MANIFEST, Converted, "remove this copy, and convert again")
    except (FileNotFoundError, NotADirectoryError):
        return None


def save(directory: Path, manifest: Converted) -> None:
    """Write it, whole."""
    write(directory / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def other_than_written(directory: Path, file: str, manifest: Converted) -> str:
    """Say what is wrong with a shard that a manifest lists, by its header and samples; nothing
    where it is as it was written.
    """
    known = manifest.shards.get(file)
    if known is None:
        return f"{MANIFEST} does not list it; this copy is mixed with another"
    if identity.of_file(directory / file) != known.identity:
        return f"is not the file that `dsv4 convert` wrote here ({MANIFEST} has another checksum); convert again"
    return ""
