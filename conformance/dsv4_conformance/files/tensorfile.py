"""Safetensors files of host arrays: 8 bytes of header length, a JSON header, the tensors' bytes.

``dsv4_core.checkpoint.shards`` maps them; ``decode`` reads one that is in memory (unpacked from an
archive).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.checkpoint.shards import VIEWS
from dsv4_core.files.writing import whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from dsv4_core.contract.dtypes import Host

KINDS = {VIEWS[name]: name for name in ("F64", "F32", "I64", "I32", "U8", "BF16", "F16")}
READABLE = frozenset(VIEWS)
"""safetensors dtypes that ``dsv4_core.checkpoint.shards`` gives as arrays."""


def encode(tensors: Mapping[str, Host], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file's bytes."""
    return b"".join(_pieces(tensors, metadata or {}))


def _pieces(tensors: Mapping[str, Host], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """Header, then tensors, widest elements first, so that every tensor is aligned to its own
    element.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in ordered:
        t = tensors[name]
        header[name] = {"dtype": KINDS[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        yield np.ascontiguousarray(tensors[name]).tobytes()


def decode(data: bytes) -> dict[str, Host]:
    """Tensors by name, read-only views of ``data``; FP8 as uint8."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            data, VIEWS[entry["dtype"]], math.prod(entry["shape"]), begin + entry["data_offsets"][0]
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


def write(path: Path, tensors: Mapping[str, Host], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, whole or not at all; its directory too."""
    with whole(path) as file:
        for piece in _pieces(tensors, metadata or {}):
            file.write(piece)
