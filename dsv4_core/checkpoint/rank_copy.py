"""Copies that hold one rank's parts alone (``dsv4 convert --tp --ep``): found, checked and opened
by the rank they are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from dsv4_core.checkpoint import manifest
from dsv4_core.checkpoint.findings import CheckpointError, Finding
from dsv4_core.checkpoint.layout import unpacked
from dsv4_core.checkpoint.rank_part import Place
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.files.reading import FileError

if TYPE_CHECKING:
    from pathlib import Path


def own_directory(directory: Path, rank: int, ranks: int) -> Path:
    """Give this rank's directory inside one that ``convert`` wrote; any other directory as it is.

    Raises ``ValueError`` where it was written for another number of ranks.
    """
    mine = directory / f"rank-{rank}-of-{ranks}"
    if mine.is_dir():
        return mine
    if found := sorted(path.name for path in directory.glob("rank-*-of-*")):
        count = found[0].rpartition("-")[2]
        raise ValueError(
            f"{directory} was cut for {count} ranks, and {ranks} was started; start {count}, or cut it again"
        )
    return directory


def cut_for(directory: Path) -> Place | None:
    """Give the place whose parts a directory holds; None where it holds a whole model. Raises
    ``FileError`` for a manifest that names none.
    """
    made = manifest.read(directory)
    if made is None:
        return None
    place = Place(made.options.tp or 1, made.options.ep or 1, made.options.rank)
    if place.rank >= place.ranks:
        raise FileError(
            f"{directory / manifest.MANIFEST}: rank {place.rank} is none of tp {place.tp} x ep {place.ep}; "
            "remove this copy, and convert again"
        )
    return place if place.ranks > 1 else None


def origin(directory: Path) -> str:
    """Say what a rank's copy was made of and how, in words that are the same for all ranks of one
    conversion.
    """
    made = manifest.read(directory)
    assert made is not None
    options = ", ".join(f"{key} {value}" for key, value in msgspec.to_builtins(made.options).items() if key != "rank")
    return f"{made.source.identity}, {options}"


def open_copy(directory: Path, place: Place) -> Checkpoint:
    """Open a rank's copy; raise ``CheckpointError`` where it is for another place, or a part is
    missing or has another shape.
    """
    cut = cut_for(directory)
    if cut != place:
        made = f"--tp {cut.tp} --ep {cut.ep}, rank {cut.rank}" if cut else "no rank"
        text = f"was cut for {made}; this is --tp {place.tp} --ep {place.ep}, rank {place.rank}"
        raise CheckpointError(directory, [Finding("another place", "", "", text)])
    checkpoint = Checkpoint(directory, check=False)
    if wrong := faults(checkpoint, place):
        raise CheckpointError(directory, wrong)
    return checkpoint


def faults(checkpoint: Checkpoint, place: Place) -> list[Finding]:
    """What is wrong with a copy as the part of a model that ``place`` holds."""
    wrong: list[Finding] = []
    for spec in checkpoint.layout.values():
        part = unpacked(spec._replace(shape=place.part(spec, checkpoint.config)))
        there = spec.name in checkpoint
        unscaled = (
            spec.dtype == "F8_E8M0" and not there
        )  # its weight may be stored as BF16; a missing scale is found below
        if 0 in part or unscaled:
            continue
        shape = unpacked(checkpoint.spec(spec.name)) if there else None
        if shape != part:
            found = f"shape {list(shape)} must be {list(part)}" if shape else f"missing: {list(part)}"
            wrong.append(Finding("a rank's part", spec.name, "", f"{found} at this place; convert it again"))
    damage = {
        "missing scale",
        "shard unreadable",
        "shard missing",
        "corrupt index",
        "index and shards disagree",
        "not as converted",
    }
    return wrong + [f for f in checkpoint.errors if f.rule in damage]
