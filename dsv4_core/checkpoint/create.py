"""Random checkpoints in the published layout, at any size: written tensor by tensor, never held in
memory.

Every tensor depends on its name and the seed alone, so that two machines, other shard sizes or a
cut with the same shapes give the same bytes. Values are drawn through a table of 65536 quantiles of
the normal distribution: one table per format and width, one lookup per stored element, codes and
scales of quantised weights drawn directly.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsv4_core.checkpoint.config import ModelConfig
from dsv4_core.checkpoint.layout import QUANTISED, TensorSpec, tensor_specs, unpacked
from dsv4_core.checkpoint.shards import BITS
from dsv4_core.checkpoint.spellings import ConfigError
from dsv4_core.checkpoint.tensors import INDEX, Progress
from dsv4_core.contract.dtypes import BFLOAT16, FORMAT_MAX, Format, Host, encode, pack_fp4
from dsv4_core.files.writing import free_bytes, whole, write, writing_alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHUNK = 1 << 21  # elements drawn at a time: 16 MiB of indices at most
BLOCK_STEP = 0.5  # half of all scale blocks are this much smaller, so that a scale applied to the wrong block shows
_SPREAD = math.sqrt((1 + BLOCK_STEP**2) / 2)  # root mean square of the blocks' factors
_HEADROOM: dict[Format, float] = {"e4m3": 4.0, "e2m1": 2.1}
"""At least so many standard deviations fit under a format's maximum: about the amax of 128 x 128,
and of 32, of them.
"""

_MOMENTS = (  # suffix, mean, standard deviation; every other tensor has mean 0 and deviation 1 / sqrt(in)
    ("norm.weight", 1.0, 0.1),
    ("embed.weight", 0.0, 1.0),  # the streams start at the size of what the sub-layers add to them
    ("gate.bias", 0.0, 0.05),  # moves some picks, and leaves every expert in use
    ("attn_sink", 0.0, 0.1),
    (".ape", 0.0, 0.1),
    ("_base", 0.0, 0.1),
    ("_scale", 0.75, 0.1),  # hc_*_scale: trained values lie between 0.5 and 1
)


def create(
    path: Path,
    config: ModelConfig,
    *,
    seed: int,
    expert_format: Format = "e2m1",
    shard_size: int = 4 << 30,
    filled: Callable[[TensorSpec], bool] = lambda _: True,
    progress: Progress | None = None,
) -> int:
    """Write a checkpoint to ``path`` and give its tensors' bytes; shards close before they exceed
    ``shard_size`` bytes.

    Tensors that are not ``filled`` are left as holes: they have their place in a sparse file, read
    as zeros and take no room on the disk. ``progress`` is called with bytes. Raises
    ``FileExistsError`` where ``path`` holds anything, and ``OSError`` where the disk has no room
    for it, before anything is written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path}: not an empty directory; give a new one, nothing is ever overwritten")
    specs = tensor_specs(config, expert_format)
    total = sum(map(stored_bytes, specs.values()))
    needed = sum(stored_bytes(spec) for spec in specs.values() if filled(spec))
    if (free := free_bytes(path)) < needed:
        raise OSError(
            f"{path}: this checkpoint needs {needed} bytes and the disk has {free} free; cut layers or experts, or "
            "let `dsv4 rehearse` write it with holes"
        )
    shards = _shards(list(specs.values()), shard_size)
    weight_map: dict[str, str] = {}
    done = 0
    with writing_alone(path):
        if path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path}: not an empty directory; another process has written it meanwhile")
        path.mkdir(parents=True, exist_ok=True)
        write(path / "config.json", config.to_json())
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            with whole(path / file) as out:
                out.write(header(shard))
                for spec in shard:
                    weight_map[spec.name] = file
                    if filled(spec):
                        for chunk in tensor(spec, specs, config, seed=seed):
                            out.write(chunk.view(np.uint8).data)
                    else:
                        out.truncate(out.seek(stored_bytes(spec), os.SEEK_CUR))
                    done += stored_bytes(spec)
                    if progress:
                        progress(done, total)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write(path / INDEX, json.dumps(index, indent=1) + "\n")  # last: a directory without it was not finished
    return total


def preset(
    config: ModelConfig,
    *,
    layers: int | None,
    experts: int | None,
    ratios: tuple[int, ...] | None,
    max_position: int | None,
    expert_dtype: str,
) -> ModelConfig:
    """Cut a preset down; ``ratios`` replace the kept layers' compress ratios. Raises
    ``ConfigError``.
    """
    values = json.loads(config.cut(layers=layers, experts=experts).to_json()) | {"expert_dtype": expert_dtype}
    if max_position is not None:
        if max_position < 1:
            raise ConfigError(f"max_position_embeddings = {max_position} must be at least 1")
        values["max_position_embeddings"] = max_position
    if ratios is not None:
        kept = values["num_hidden_layers"]
        if len(ratios) != kept:
            raise ConfigError(f"ratios {list(ratios)}: {len(ratios)} of them for {kept} layers; give one per layer")
        values["compress_ratios"] = [*ratios, *values["compress_ratios"][kept:]]
    return ModelConfig.from_dict(values)


def tensor(spec: TensorSpec, specs: dict[str, TensorSpec], config: ModelConfig, *, seed: int) -> Iterator[Host]:
    """Draw a tensor piece by piece, flat, in its stored dtype (quantised data as uint8)."""
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    bits = np.random.SFC64(np.random.SeedSequence(int.from_bytes(digest, "little")))
    count = math.prod(spec.shape)
    if spec.dtype == "I64":
        yield from _expert_ids(np.random.Generator(bits), count, config)
        return
    table = _table(spec, specs)
    for at in range(0, count, CHUNK):
        n = min(CHUNK, count - at)
        yield table[bits.random_raw(-(-n // 4)).view(np.uint16)[:n]]


def _table(spec: TensorSpec, specs: dict[str, TensorSpec]) -> Host:
    """Give what a stored element may be: 65536 equally likely ones."""
    if spec.dtype == "F8_E8M0":
        weight = specs[spec.name.removesuffix("scale") + "weight"]
        exponent = _exponent(unpacked(weight)[-1], QUANTISED[weight.dtype])
        both = np.array([exponent, exponent + round(math.log2(BLOCK_STEP))])
        return np.repeat((both + 127).astype(np.uint8), 1 << 15)
    cols = unpacked(spec)[-1]
    if spec.dtype in QUANTISED:
        return _codes(cols, QUANTISED[spec.dtype])
    mean, std = next(((m, s) for suffix, m, s in _MOMENTS if spec.name.endswith(suffix)), (0.0, cols**-0.5))
    return _numbers(mean, std, spec.dtype)


def _exponent(cols: int, fmt: Format) -> int:
    """Scale exponent of the larger blocks of a weight of ``cols`` inputs: its headroom just fits
    under the maximum.
    """
    return math.ceil(math.log2(_HEADROOM[fmt] * cols**-0.5 / _SPREAD / FORMAT_MAX[fmt]))


@functools.cache
def _codes(cols: int, fmt: Format) -> Host:
    """Codes of N(0, 1 / cols) under the larger blocks' scale; for FP4 pairs of codes, a byte
    each.
    """
    std = cols**-0.5 / _SPREAD / 2.0 ** _exponent(cols, fmt)
    normal = _normal() if fmt == "e4m3" else _normal()[128::256]  # 256 quantiles for each nibble
    codes = encode(normal * std, fmt)  # clamping FP4 costs at most 2 % of the deviation
    if fmt == "e4m3":
        return codes
    return pack_fp4(np.stack([np.tile(codes, 256), np.repeat(codes, 256)], axis=1))[:, 0]


@functools.cache
def _numbers(mean: float, std: float, dtype: str) -> Host:
    return (mean + std * _normal()).astype(BFLOAT16 if dtype == "BF16" else np.float32)


@functools.cache
def _normal() -> npt.NDArray[np.float64]:
    """The 65536 quantiles of N(0, 1) at the middles of equal steps: the outermost are at 4.3
    deviations.
    """
    inverse = NormalDist().inv_cdf
    half = np.array([inverse((i + 0.5) / 65536) for i in range(32768)])
    return np.concatenate([half, -half[::-1]])


def _expert_ids(rng: np.random.Generator, count: int, config: ModelConfig) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of distinct experts in random order, [vocab, k]."""
    k, experts = config.num_experts_per_tok, config.n_routed_experts
    rows = max(1, CHUNK // experts)
    for at in range(0, count // k, rows):
        n = min(rows, count // k - at)
        yield np.argsort(rng.random((n, experts), np.float32), axis=1)[:, :k].astype(np.int64).reshape(-1)


def stored_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor in a file."""
    return math.prod(spec.shape) * BITS[spec.dtype] // 8


def _shards(specs: list[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    """Split in order; a tensor larger than ``shard_size`` gets a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    held = 0
    for spec in specs:
        if shards[-1] and held + stored_bytes(spec) > shard_size:
            shards.append([])
            held = 0
        shards[-1].append(spec)
        held += stored_bytes(spec)
    # widest elements first within a shard, so that every tensor is aligned to its own element
    return [sorted(shard, key=lambda spec: -BITS[spec.dtype]) for shard in shards]


def header(specs: list[TensorSpec]) -> bytes:
    """Give what stands before the bytes of these tensors in a safetensors file, padded to 8
    bytes.
    """
    entries, at = {}, 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + stored_bytes(spec)]}
        at += stored_bytes(spec)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
