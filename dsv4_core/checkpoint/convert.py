"""Copies of a checkpoint in another form: the share of each rank, experts in FP8 instead of FP4,
everything in BF16, or W8A8.

A copy is written beside its place, in ``<out>.partial``, shard by shard, each under a temporary
name until it is whole, and renamed to ``<out>`` when all are done; the source is only read.
``convert.json`` in the copy holds the source's identity and every shard's SHA-256. An interrupted
conversion that is started again keeps the shards whose checksums hold, and none of another
source's.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4_core.checkpoint import manifest as manifest_file
from dsv4_core.checkpoint.create import header, stored_bytes
from dsv4_core.checkpoint.identity import of_file
from dsv4_core.checkpoint.layout import QUANTISED, TensorSpec, becomes_int8, scale_shape
from dsv4_core.checkpoint.manifest import MANIFEST
from dsv4_core.checkpoint.rank_part import Place, ShardedSource
from dsv4_core.checkpoint.shards import BITS
from dsv4_core.checkpoint.tensors import INDEX, Progress
from dsv4_core.checkpoint.weights import Checkpoint
from dsv4_core.contract.dtypes import (
    BFLOAT16,
    FORMAT_MAX,
    FP4_GROUP,
    FP8_BLOCK,
    Host,
    ScaledArray,
    decode,
    encode,
    quantise_int8,
)
from dsv4_core.files.forms import Converted, ConvertOptions, Source, Written
from dsv4_core.files.reading import contents
from dsv4_core.files.writing import free_bytes, settle, whole, write, writing_alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

LOSSLESS_SPREAD = 14
"""Scales that differ by no more always fit: E2M1 times 2^k is exact in E4M3 from k = -8 (0.5 * 2^-8
is the least subnormal) to 6 (384).
"""


class ConvertError(ValueError):
    """A conversion that would lose something, or that the source does not allow; the message says
    what, how often and where.
    """


@dataclass(frozen=True)
class Options:
    """A copy for each of ``tp`` x ``ep`` ranks; ``experts`` in "fp8"; all in ``bf16``, or in
    ``int8`` (W8A8: lossy, and measured). ``allow_lossy``: round what FP8 cannot hold.
    """

    tp: int | None = None
    ep: int | None = None
    experts: str = ""
    bf16: bool = False
    int8: bool = False
    allow_lossy: bool = False


class Piece(NamedTuple):
    """A tensor of the copy: as it is stored, and how to make it."""

    spec: TensorSpec
    make: Callable[[], Host]


class Tally(dict[str, list[float]]):
    """By kind of tensor: the sums of squared errors and of squared weights, and the largest
    relative error of one tensor.
    """

    def add(self, kind: str, weight: Host, requantised: Host) -> None:
        """Count one tensor."""
        error, size = (
            float(np.sum(np.square(requantised - weight), dtype=np.float64)),
            float(np.sum(np.square(weight), dtype=np.float64)),
        )
        self.merge(kind, [error, size, (error / size) ** 0.5 if size else 0.0])

    def merge(self, kind: str, counted: list[float]) -> None:
        """Count what was counted elsewhere."""
        have = self.setdefault(kind, [0.0, 0.0, 0.0])
        have[:] = [have[0] + counted[0], have[1] + counted[1], max(have[2], counted[2])]

    def errors(self) -> dict[str, dict[str, float]]:
        """Relative root-mean-square error of all tensors of a kind, and of the worst one."""
        return {
            kind: {"relative_rms": (error / size) ** 0.5 if size else 0.0, "worst_tensor": worst}
            for kind, (error, size, worst) in sorted(self.items())
        }


def convert(
    source: Path,
    out: Path,
    options: Options,
    *,
    progress: Progress | None = None,
    tally: Tally | None = None,
    verify: bool = False,
) -> dict[str, int]:
    """Write the copy, or one per rank in ``rank-R-of-N``; give counts (files written and kept,
    tensors, blocks that were rounded).

    ``tally`` receives what W8A8 loses, which the copy's index and ``config.json`` carry, too.
    ``verify``: the source's identity covers every byte of it (else headers and samples), so that no
    other source is taken for it when an interrupted conversion goes on.

    Raises ``FileError`` where another process is writing ``out``. Raises ``ConvertError`` before
    anything is written: where ``out`` exists or lies in the source, nothing was asked for, a scale
    byte is 255, or FP8 would lose something and ``allow_lossy`` is not set.
    """
    refuse_existing(out)
    refuse_inside(out, source)
    checkpoint = Checkpoint(source)
    check_room(checkpoint, out, options)
    world = Place(options.tp or 1, options.ep or 1)
    world.check(checkpoint.config)
    if world.ranks == 1 and not (options.experts or options.bf16 or options.int8):
        raise ConvertError("nothing to convert: give --tp or --ep, --experts fp8, --to bf16 or --to w8a8-int8")
    if checkpoint.is_int8:
        raise ConvertError(
            f"{source} is W8A8 already, and what was lost does not come back; convert the published checkpoint"
        )
    if options.int8:
        check_published(checkpoint)
    lossy = check_scales(checkpoint, to_fp8=bool(options.experts) and not options.bf16)
    if lossy and not options.allow_lossy:
        worst = max(lossy, key=lossy.__getitem__)
        found = f"{sum(lossy.values())} blocks of 128 x 128 in {len(lossy)} tensors (most: {lossy[worst]} in {worst})"
        raise ConvertError(f"{found} have values that FP8 under one scale cannot hold; --allow-lossy rounds them")
    partial = out.with_name(f"{out.name}.partial")
    counts = {"written": 0, "kept": 0, "tensors": 0, "lossy_blocks": sum(lossy.values())}
    made_of = Source(path=str(source.resolve()), identity=checkpoint.identity(whole=verify))
    with writing_alone(out):
        refuse_existing(out)  # another process may have finished it meanwhile
        for rank in range(world.ranks):
            directory = partial / f"rank-{rank}-of-{world.ranks}" if world.ranks > 1 else partial
            place = replace(world, rank=rank)
            _write_copy(
                checkpoint, made_of, directory, options, place, counts, progress, Tally() if tally is None else tally
            )
        checkpoint.hold()
        partial.rename(out)
        settle(out.parent)
    return counts


def refuse_existing(out: Path) -> None:
    """Raise ``ConvertError`` where ``out`` is there."""
    if out.exists():
        raise ConvertError(f"{out} exists; give a new directory, a conversion never overwrites")


def refuse_inside(out: Path, source: Path) -> None:
    """Raise ``ConvertError`` where ``out`` would be a part of the checkpoint that is read."""
    if out.resolve().is_relative_to(source.resolve()):
        raise ConvertError(f"{out} is inside {source}, which is read; give a directory beside it")


def check_room(checkpoint: Checkpoint, out: Path, options: Options) -> None:
    """Raise ``ConvertError`` where the disk has no room for the copy, what was written of it
    before counted in. Holes of the source's files (a rehearsal's) stay holes.
    """
    needed = 0
    for name in checkpoint.names:
        stored, fmt = checkpoint.stored(name), checkpoint.format(name)
        count = math.prod(stored.shape) * (2 if fmt == "e2m1" and stored.dtype != "F4" else 1)
        if options.bf16 and (fmt or name.endswith(".scale")):
            needed += 2 * count if fmt else 0
        elif (options.experts or options.int8) and fmt == "e2m1":
            needed += count
        else:
            needed += stored.end - stored.begin
    needed -= sum(_hole(file) for file in {checkpoint.file(name) for name in checkpoint.names})
    written = sum(f.stat().st_size - _hole(f) for f in out.with_name(f"{out.name}.partial").glob("**/*") if f.is_file())
    if (free := free_bytes(out)) < needed - written:
        raise ConvertError(
            f"{out}: the copy needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; write it to another disk"
        )


def _hole(file: Path) -> int:
    """Bytes of a file that are not on the disk, and read as zero."""
    stat = file.stat()
    return max(0, stat.st_size - stat.st_blocks * 512)


def check_published(checkpoint: Checkpoint) -> None:
    """Raise ``ConvertError`` where a linear layer is not FP8 or FP4: W8A8 is made from the
    published formats alone.
    """
    for name, spec in checkpoint.layout.items():
        found = checkpoint.format(name) if spec.dtype in QUANTISED else "e4m3"
        if found not in {"e4m3", "e2m1"}:
            raise ConvertError(
                f"{name}: {found or checkpoint.stored(name).dtype}; W8A8 is made from FP8 and FP4 weights: convert the published checkpoint"
            )


def check_scales(checkpoint: Checkpoint, *, to_fp8: bool) -> dict[str, int]:
    """Count expert blocks that FP8 cannot hold, by tensor (none unless ``to_fp8``); raise
    ``ConvertError`` for a scale byte of 255.
    """
    lossy: dict[str, int] = {}
    for name in checkpoint.names:
        if not name.endswith(".scale") or checkpoint.stored(name).dtype != "F8_E8M0":
            continue
        scale = checkpoint.array(name)
        if wrong := int((scale == 255).sum()):
            raise ConvertError(
                f"{name}: {wrong} scale bytes are 255, which is NaN; run `dsv4 inspect {checkpoint.path}`"
            )
        if to_fp8 and ".experts." in name and _spread(scale).max(initial=0) > LOSSLESS_SPREAD:
            weight = checkpoint.weight(_stem(name))
            if isinstance(weight, ScaledArray) and weight.format == "e2m1" and (blocks := fp4_to_fp8(weight)[1]):
                lossy[_stem(name)] = blocks
    return lossy


def _spread(scale: Host) -> Host:
    """Largest less smallest exponent of the FP4 scales [out, in / 32] under each 128 x 128
    block.
    """
    rows, columns = range(0, scale.shape[0], FP8_BLOCK), range(0, scale.shape[1], FP8_BLOCK // FP4_GROUP)
    wide = scale.astype(np.int16)
    high = np.maximum.reduceat(np.maximum.reduceat(wide, rows, axis=0), columns, axis=1)
    low = np.minimum.reduceat(np.minimum.reduceat(wide, rows, axis=0), columns, axis=1)
    return np.asarray(high - low)


def fp4_to_fp8(weight: ScaledArray) -> tuple[ScaledArray, int]:
    """Give an FP4 weight in FP8 with 128 x 128 scales, and in how many blocks a value was rounded.

    A block's scale is the least power of two under which its largest value fits (448), so that its
    small values keep all that E4M3 has.
    """
    out, cols = weight.shape
    values = weight.dequantise("float64")
    rows, columns = scale_shape((out, cols), "e4m3")
    padded = np.zeros((rows * FP8_BLOCK, columns * FP8_BLOCK))
    padded[:out, :cols] = values
    blocks = padded.reshape(rows, FP8_BLOCK, columns, FP8_BLOCK)
    largest = np.abs(blocks).max((1, 3))
    mantissa, exponent = np.frexp(largest / FORMAT_MAX["e4m3"])  # mantissa in [0.5, 1): a power of two has exactly 0.5
    byte = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent) + 127, 0, 254)
    byte = np.where(largest == 0, 127, byte).astype(np.uint8)
    scale = np.ldexp(1.0, byte.astype(np.int32) - 127)[:, None, :, None]
    codes = encode(blocks / scale, "e4m3")
    lossy = (decode(codes, "e4m3").astype(np.float64) * scale != blocks).any((1, 3))
    data = np.ascontiguousarray(codes.reshape(padded.shape)[:out, :cols])
    return ScaledArray(data, byte, "e4m3"), int(lossy.sum())


def pieces(
    source: ShardedSource, checkpoint: Checkpoint, name: str, options: Options, tally: Tally | None = None
) -> Iterator[Piece]:
    """Give what becomes of a tensor on a rank: nothing where it holds none of it, weight and scale
    together under the weight's name.
    """
    spec, at, place, config = checkpoint.spec(name), _stem(name), source.place, checkpoint.config
    shape = place.part(spec, config)
    if shape == (0,) or (spec.dtype == "F8_E8M0" and name.endswith(".scale")):
        return
    fmt = QUANTISED.get(spec.dtype) if name.endswith(".weight") else None
    routed = ".experts." in name  # held whole or not at all
    if fmt is None:
        part = None if routed else place.range(at, config)
        cut = () if part is None else (slice(None),) * part[0] + (part[1],)
        yield Piece(spec._replace(shape=shape), lambda: checkpoint.array(name)[cut])
        return

    def quantised() -> ScaledArray:
        weight = (checkpoint if routed else source).weight(at)
        assert isinstance(weight, ScaledArray)
        return weight

    logical = quantised().shape
    if options.bf16:
        yield Piece(TensorSpec(name, logical, "BF16", spec.kind), lambda: _bf16(name, quantised()))
        return
    if options.int8 and becomes_int8(name):

        def codes() -> Host:
            weight = quantised().dequantise()
            made = quantise_int8(weight)
            if tally is not None:
                tally.add(spec.kind, weight, made.dequantise())
            return np.asarray(made.data)

        yield Piece(TensorSpec(name, logical, "I8", spec.kind), codes)
        scale = TensorSpec(f"{at}.scale", logical[:1], "F32", spec.kind)
        yield Piece(scale, lambda: np.asarray(quantise_int8(quantised().dequantise()).scale))
        return
    change = bool(options.experts) and fmt == "e2m1"
    made: Callable[[], ScaledArray] = (lambda: fp4_to_fp8(quantised())[0]) if change else quantised
    scales = scale_shape((logical[0], logical[1]), "e4m3" if change else fmt)
    stored = TensorSpec(name, logical, "F8_E4M3", spec.kind) if change else spec._replace(shape=shape)
    yield Piece(stored, lambda: made().data)
    yield Piece(TensorSpec(f"{at}.scale", scales, "F8_E8M0", spec.kind), lambda: made().scale)


def _stem(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".scale")


def _bf16(name: str, weight: ScaledArray) -> Host:
    wide = weight.dequantise()
    if not np.isfinite(wide).all():
        raise ConvertError(f"{name}: a value is too large for BF16 (its scale is near 2^127)")
    return wide.astype(BFLOAT16)  # exact: four significant bits and a power of two


def _write_copy(
    checkpoint: Checkpoint,
    made_of: Source,
    directory: Path,
    options: Options,
    place: Place,
    counts: dict[str, int],
    progress: Progress | None,
    tally: Tally,
) -> None:
    """Write one rank's directory, keeping shards that an earlier run finished."""
    directory.mkdir(parents=True, exist_ok=True)
    wanted = Converted(made_of, ConvertOptions(rank=place.rank, **asdict(options)))
    manifest = manifest_file.read(directory) or wanted
    if manifest.options != wanted.options:
        raise ConvertError(f"{directory} was begun with other options ({manifest.options}); remove it or repeat those")
    if manifest.source.identity != made_of.identity:
        raise ConvertError(
            f"{directory} was begun from another checkpoint (identity {manifest.source.identity}, from "
            f"{manifest.source.path}); {made_of.path} is {made_of.identity} now: remove {directory}, or convert that one"
        )
    for left in directory.glob(".*.tmp"):  # of a run that was killed: this one alone writes here
        left.unlink()
    source = ShardedSource(checkpoint, place)
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.names:
        by_file[checkpoint.file(name).name].append(name)
    weight_map: dict[str, str] = {}
    total = 0
    lost: dict[str, Tally] = {}
    for done, (file, names) in enumerate(sorted(by_file.items())):
        lost[file] = Tally()
        made = [piece for name in names for piece in pieces(source, checkpoint, name, options, lost[file])]
        made.sort(key=lambda piece: -BITS[piece.spec.dtype])  # so that every tensor is aligned to its own element
        weight_map.update(dict.fromkeys((piece.spec.name for piece in made), file))
        total += sum(stored_bytes(piece.spec) for piece in made)
        counts["tensors"] += len(made)
        known = manifest.shards.get(file)
        if known and (directory / file).is_file() and _digest(directory / file) == known.sha256:
            counts["kept"] += 1
            lost[file] = (
                Tally({kind: list(error) for kind, error in known.int8_error.items()}) if options.int8 else lost[file]
            )
        elif made:
            digest = _write_shard(directory / file, made)
            errors = {kind: (e[0], e[1], e[2]) for kind, e in lost[file].items()} if options.int8 else {}
            manifest.shards[file] = Written(digest, of_file(directory / file), errors)
            manifest_file.save(directory, manifest)
            counts["written"] += 1
        checkpoint.release()
        if progress:
            progress(done + 1 + place.rank * len(by_file), place.ranks * len(by_file))
    here = Tally()
    for kind, counted in (item for each in lost.values() for item in each.items()):
        here.merge(kind, counted)
        tally.merge(kind, counted)
    expert_dtype = (
        "bf16" if options.bf16 else "int8" if options.int8 else options.experts or checkpoint.config.expert_dtype
    )
    config = replace(checkpoint.config, expert_dtype=expert_dtype)
    if options.bf16:
        config = replace(config, quantization_config={})
    metadata: dict[str, object] = {"total_size": total}
    if options.int8:
        declared = {
            "quant_method": "w8a8-int8",
            "weights": "int8 per output channel",
            "activations": "int8 per token, dynamic",
            "lossy": True,
            "error": here.errors(),
        }
        config, metadata["w8a8_int8"] = replace(config, quantization_config=declared), declared
    write(directory / "config.json", config.to_json())
    for other in checkpoint.path.iterdir():
        if other.is_file() and other.suffix != ".safetensors" and other.name not in {"config.json", INDEX, MANIFEST}:
            write(directory / other.name, contents(other, 1 << 30))  # tokenizer, generation settings, licence
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write(directory / INDEX, json.dumps(index, indent=1) + "\n")


def _write_shard(path: Path, made: list[Piece]) -> str:
    """Write a shard under a temporary name, then rename it; give its SHA-256. A tensor of zeros
    becomes a hole.
    """
    digest = hashlib.sha256()
    with whole(path) as out:
        pieces: Iterable[bytes | memoryview] = chain([header([piece.spec for piece in made])], map(_bytes, made))
        for data in pieces:
            if np.frombuffer(data, np.uint8).any():
                out.write(data)
            else:
                out.seek(len(data), os.SEEK_CUR)
            digest.update(data)
        out.truncate()
    return digest.hexdigest()


def _bytes(piece: Piece) -> memoryview:
    return np.ascontiguousarray(piece.make()).reshape(-1).view(np.uint8).data


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
