"""Recorded vectors: what the published model definition computes on three small checkpoints,
shipped with the suite.
"""

from __future__ import annotations

import functools
import json
import lzma
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dsv4_conformance.files import tensorfile
from dsv4_core.checkpoint.weights import embedded

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host

Model = Literal["tiny-flash", "tiny-pro", "tiny-jargon"]
MODELS: tuple[Model, ...] = ("tiny-flash", "tiny-pro", "tiny-jargon")
_GOLDEN = Path(str(resources.files("dsv4_conformance"))) / "data" / "golden"


def checkpoint_path(model: Model) -> Path:
    """Give the directory of a checkpoint that vectors were recorded on."""
    return embedded() if model == "tiny-jargon" else _GOLDEN / model


@functools.cache
def load(model: Model, which: Literal["golden", "trace"]) -> dict[str, Host]:
    """Read recorded tensors by name, read-only; FP8 as uint8. Names and shapes:
    ``data/golden/README.md``.

    tiny-jargon has no trace: ``FileNotFoundError``.
    """
    return tensorfile.decode(lzma.decompress((_GOLDEN / model / f"{which}.safetensors.xz").read_bytes()))


@functools.cache
def names(model: Model, which: Literal["golden", "trace"]) -> frozenset[str]:
    """Names of recorded tensors, from the file's header alone."""
    with lzma.open(_GOLDEN / model / f"{which}.safetensors.xz") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return frozenset(header.keys() - {"__metadata__"})
