"""A small checkpoint to break: shards read into a dictionary, changed, written back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4_core.checkpoint.config import PRESETS
from dsv4_core.checkpoint.create import create, preset
from dsv4_core.checkpoint.shards import Shard
from dsv4_core.checkpoint.weights import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def small(path: Path, *, expert_dtype: str = "fp4", **options) -> Path:
    """One layer of each kind, four experts, two shards."""
    config = preset(
        PRESETS["tiny"], layers=3, experts=4, ratios=(0, 4, 128), max_position=None, expert_dtype=expert_dtype
    )
    options = {"seed": 0, "shard_size": 2_000_000} | options
    create(path, config, expert_format="e4m3" if expert_dtype == "fp8" else "e2m1", **options)
    return path


def shard_names(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors"))


def read(path: Path, file: str) -> dict[str, Tensor]:
    data, shard = (path / file).read_bytes(), Shard(path / file)
    return {name: Tensor(s.dtype, s.shape, data[s.begin : s.end]) for name, s in shard.entries.items()}


def write(path: Path, file: str, tensors: dict[str, Tensor], *, index: bool = True) -> None:
    """Write a shard; unless told otherwise the index follows."""
    header, end = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [end, end + len(t.data)]}
        end += len(t.data)
    text = json.dumps(header).encode()
    data = [len(text).to_bytes(8, "little"), text, *(t.data for t in tensors.values())]
    (path / file).write_bytes(b"".join(data))
    if index and (path / INDEX).exists():
        weights = weight_map(path)
        weights = {name: shard for name, shard in weights.items() if shard != file} | dict.fromkeys(tensors, file)
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


def weight_map(path: Path) -> dict[str, str]:
    return json.loads((path / INDEX).read_text())["weight_map"]


def change(path: Path, name: str, tensor: Tensor | None) -> str:
    """Replace a tensor (None: remove it) where it is; give its file."""
    file = weight_map(path)[name]
    tensors = read(path, file)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    write(path, file, tensors)
    return file


def rename(path: Path, new_name) -> None:
    """Respell every name of every shard."""
    for file in shard_names(path):
        write(path, file, {new_name(name): t for name, t in read(path, file).items()})


def poke(path: Path, name: str, flat_index: int, values: np.ndarray) -> None:
    """Overwrite elements of a tensor in its file."""
    file = path / weight_map(path)[name]
    stored = Shard(file).entries[name]
    with file.open("r+b") as out:
        out.seek(stored.begin + flat_index * values.itemsize)
        out.write(values.tobytes())


def retype(path, change_tensor):
    """Give every tensor to ``change_tensor(name, tensor, array)``, which returns a new one, or None
    to leave it out.
    """
    checkpoint = Checkpoint(path)
    for file in shard_names(path):
        tensors = {}
        for name, tensor in read(path, file).items():
            made = change_tensor(name, tensor, checkpoint.array(name))
            if made is not None:
                tensors[name] = made
        write(path, file, tensors)


def stored(dtype, array):
    return Tensor(dtype, array.shape, np.ascontiguousarray(array).tobytes())


def cut_experts(path, keep, blocks):
    """Cut the experts of some blocks down to ``keep``, as REAP does."""

    def without(name, tensor, array):
        if not name.startswith(tuple(f"{block}.ffn." for block in blocks)):
            return tensor
        if ".experts." in name:
            return tensor if int(name.split(".experts.")[1].split(".")[0]) < keep else None
        return stored(tensor.dtype, array[:keep]) if name.endswith(("gate.weight", "gate.bias")) else tensor

    retype(path, without)
