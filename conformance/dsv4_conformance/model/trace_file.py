"""Traces of a model's run as files: ``trace.safetensors`` and ``trace.json``, named as the recorded traces are.

Tensors: ``{prefill|decodeNNN}.{layer{i}|embedding|head}.{op}[@n].{operand}``, results as ``.out`` (several: ``.out.0``
...), operands that the op mutates as
``.after.{operand}``; weights once each, as ``weights.{n}``. ``trace.json``: numerics, and per call its name, the
positions of its tokens, and the description
of ``stored_calls``.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.files import tensorfile
from dsv4_conformance.files.stored_calls import Packer, unpack
from dsv4_conformance.model.record import Recorded
from dsv4_core.checkpoint.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dsv4_core.contract.spec import Numerics

TENSORS, CALLS = "trace.safetensors", "trace.json"


@dataclass
class Packed(Packer):
    """A trace before it is written."""

    numerics: Numerics = "native"
    calls: list[dict[str, Any]] = field(default_factory=list)


def pack(calls: Sequence[Recorded], numerics: Numerics) -> Packed:
    """Name everything; nothing is written."""
    packed = Packed(numerics=numerics)
    for recorded in calls:
        prefix, call = f"{recorded.name}.", recorded.call
        description = packed.call(prefix, call, share=True)
        returned = len(recorded.results) - len(call.spec.mutates)
        names = [f"{prefix}out" if returned == 1 else f"{prefix}out.{i}" for i in range(returned)]
        names += [f"{prefix}after.{name}" for name in call.spec.mutates]
        packed.tensors.update(zip(names, recorded.results, strict=True))
        where = {"time": recorded.time, "place": recorded.place, "number": recorded.number, "seed": call.seed}
        packed.calls.append({**where, "positions": recorded.positions.tolist(), "results": names, "call": description})
    return packed


def write(packed: Packed, directory: Path) -> None:
    """Write a trace; raise ``OSError`` where the disk has no room for it, before anything is written."""
    directory.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(directory).free) < packed.nbytes:
        raise OSError(
            f"{directory}: the trace needs {packed.nbytes} bytes and the disk has {free} free; choose fewer --layers or --positions"
        )
    tensorfile.write(directory / TENSORS, packed.tensors)
    (directory / CALLS).write_text(json.dumps({"numerics": packed.numerics, "calls": packed.calls}) + "\n")


def read(directory: Path, numerics: Numerics) -> list[Recorded]:
    """Read a trace; raise ``ValueError`` where it was recorded in other numerics than are judged."""
    stated = json.loads((directory / CALLS).read_text())
    if stated["numerics"] != numerics:
        raise ValueError(
            f"{directory}: recorded in {stated['numerics']}; judge it with --numerics {stated['numerics']}"
        )
    shard = Shard(directory / TENSORS)
    return [
        Recorded(
            c["time"],
            c["place"],
            c["number"],
            unpack(c["call"], shard.array, c["seed"]),
            [shard.array(name) for name in c["results"]],
            np.array(c["positions"], np.int64),
        )
        for c in stated["calls"]
    ]
