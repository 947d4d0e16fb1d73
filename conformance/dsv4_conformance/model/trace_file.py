"""Traces of a model's run as files: ``trace.safetensors`` and ``trace.json``, named as the recorded
traces are.

Tensors: ``{prefill|decodeNNN}.{layer{i}|embedding|head}.{op}[@n].{operand}``, results as ``.out``
(several: ``.out.0`` ...), of an op that may write an operand in place as ``.after.{operand}``;
weights once each, as ``weights.{n}``. ``trace.json``: numerics, and per call its name, the
positions of its tokens, and the description of ``stored_calls``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_conformance.files import tensorfile
from dsv4_conformance.files.forms import Trace, hold_call
from dsv4_conformance.files.stored_calls import Packer, unpack
from dsv4_conformance.model.record import Recorded
from dsv4_core.checkpoint.identity import of_file
from dsv4_core.checkpoint.shards import Shard
from dsv4_core.files import writing as files
from dsv4_core.files.reading import FileError, fitting, json_file
from dsv4_core.files.writing import free_bytes, writing_alone

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dsv4_core.contract.spec import Numerics

TENSORS, CALLS = "trace.safetensors", "trace.json"


@dataclass
class Packed(Packer):
    """A trace before it is written."""

    numerics: Numerics = "native"
    checkpoint: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


def pack(calls: Sequence[Recorded], numerics: Numerics, checkpoint: str) -> Packed:
    """Name everything; nothing is written. ``checkpoint``: its identity."""
    packed = Packed(numerics=numerics, checkpoint=checkpoint)
    for recorded in calls:
        prefix, call = f"{recorded.name}.", recorded.call
        description = packed.call(prefix, call, share=True)
        returned = len(recorded.results)
        names = [f"{prefix}out" if returned == 1 else f"{prefix}out.{i}" for i in range(returned)]
        names = [f"{prefix}after.{name}" for name in call.spec.mutates] or names
        packed.tensors.update(zip(names, recorded.results, strict=True))
        where = {"time": recorded.time, "place": recorded.place, "number": recorded.number, "seed": call.seed}
        packed.calls.append({**where, "positions": recorded.positions.tolist(), "results": names, "call": description})
    return packed


def write(packed: Packed, directory: Path) -> None:
    """Write a trace; raise ``OSError`` where the disk has no room for it, before anything is
    written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (free := free_bytes(directory)) < packed.nbytes:
        raise OSError(
            f"{directory}: the trace needs {packed.nbytes} bytes and the disk has {free} free; choose fewer --layers or --positions"
        )
    with writing_alone(directory):
        (directory / CALLS).unlink(missing_ok=True)  # last to come: a directory without it was not finished
        tensorfile.write(directory / TENSORS, packed.tensors)
        described = {"numerics": packed.numerics, "checkpoint": packed.checkpoint, "calls": packed.calls}
        described["tensors"] = of_file(directory / TENSORS)
        files.write(directory / CALLS, json.dumps(described) + "\n")


ADVICE = "record it again: dsv4 conformance localise --dump DIR"


def stated(directory: Path) -> Trace:
    """Read a trace's description and hold it to its form; raise ``FileError``, also where the
    tensors are another trace's.
    """
    try:
        trace = json_file(directory / CALLS, Trace, ADVICE, most=1 << 30)
    except FileNotFoundError:
        raise FileError(f"{directory}: holds no {CALLS}, so it is no trace that was finished; {ADVICE}") from None
    if of_file(directory / TENSORS) != trace.tensors:
        raise FileError(f"{directory / TENSORS}: not the tensors that {CALLS} was written with; {ADVICE}")
    return trace


def read(directory: Path, numerics: Numerics) -> list[Recorded]:
    """Read a trace; raise ``ValueError`` where it was recorded in other numerics than are
    judged.
    """
    trace = stated(directory)
    if trace.numerics != numerics:
        raise ValueError(f"{directory}: recorded in {trace.numerics}; judge it with --numerics {trace.numerics}")
    with fitting(f"{directory / TENSORS}", ADVICE):
        shard = Shard(directory / TENSORS)
    calls = []
    for i, c in enumerate(trace.calls):
        name = f"{directory / CALLS}: calls[{i}]"
        hold_call(c.call, name, ADVICE)
        with fitting(name, ADVICE):
            call = unpack(c.call, shard.array, c.seed)
            if len(c.results) != len(call.spec.returns):
                raise FileError(f"{name}: {len(c.results)} results, which {call.op} does not have; {ADVICE}")
            results = [shard.array(result) for result in c.results]
            calls.append(Recorded(c.time, c.place, c.number, call, results, np.array(c.positions, np.int64)))
    return calls
