"""Checkpoints: configuration, index and shards, checked against the layout on opening; bytes are
read when used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_core.checkpoint import foreign, identity, matching, unused
from dsv4_core.checkpoint.config import ModelConfig
from dsv4_core.checkpoint.findings import CheckpointError, Finding, ForeignError
from dsv4_core.checkpoint.layout import QUANTISED, TensorSpec, canonical_name, unpacked
from dsv4_core.checkpoint.readings import ReadingError
from dsv4_core.checkpoint.shards import Shard
from dsv4_core.checkpoint.tensors import Progress, Tensors
from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, Experts, Host, ScaledArray, unpack


class Checkpoint(Tensors):
    """A model directory: ``config.json`` and either an index with its shards or one
    ``model.safetensors``.

    Opening reads headers only and raises ``CheckpointError`` (``ConfigError`` for the
    configuration) before any weight is read; ``check=False`` leaves what is wrong in ``findings``
    instead, for the audit. Names are the published ones, whatever spelling the files use. Arrays
    are read-only views of the mapped files: a byte is read when first used.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        drafter: Path | None = None,
        check: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """``drafter``: a directory whose tensors under ``mtp.`` are used, and not this one's."""
        path = Path(path)
        if problem := foreign.path_problem(path):
            raise ForeignError(problem)
        if not path.is_dir():
            text = "no such directory; give a model directory (config.json and *.safetensors)"
            raise CheckpointError(path, [Finding("no directory", "", "", text)])
        super().__init__(path, ModelConfig.load(path))
        unread = self.open_shards(progress)
        if problem := foreign.names_problem(self.where):
            raise ForeignError(f"{self.path}: {problem}")
        unused.set_aside(self)
        if drafter:
            unread = {name for name in unread if not name.startswith("mtp.")} | unused.take_drafter(self, drafter)
        unused.settle_draft(self, unread)
        matching.count_experts(self)
        matching.match(self, unread)
        matching.find_float_factors(self)
        self._note_readings()
        matching.check_tables(self)
        self.findings += [Finding("note", "", "", note, "note") for note in self.notes]
        if check and (errors := self.errors):
            raise CheckpointError(self.path, errors)

    @property
    def names(self) -> list[str]:
        """Published names of all tensors that are there and belong there."""
        return list(self.where)

    @property
    def nbytes(self) -> int:
        """Bytes of these tensors."""
        return sum(s.end - s.begin for s in map(self.stored, self.where))

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def spec(self, name: str) -> TensorSpec:
        """Give a tensor as it is read: as stored, but for what stands in another dtype than the
        published one.
        """
        stored, spec = self.stored(name), self.layout[name]
        if f"{name[:-7]}.scale" in self.factors:
            return TensorSpec(name, unpacked(spec), "F32", spec.kind)
        if name in self.readings:
            return TensorSpec(name, spec.shape, spec.dtype, spec.kind)
        return TensorSpec(name, stored.shape, stored.dtype, spec.kind)

    @property
    def shards(self) -> list[Shard]:
        """The files that hold these tensors."""
        return list({id(shard): shard for shard, _ in self.where.values()}.values())

    def hold(self) -> None:
        """Raise ``CheckpointError`` where a shard is no longer the file that was opened: what was
        read of it is not one model's.
        """
        text = (
            "was written to since it was opened; what was computed may mix two models: run again once nobody writes it"
        )
        if wrong := [Finding("shard changed", "", shard.path.name, text) for shard in self.shards if shard.changed()]:
            raise CheckpointError(self.path, wrong)

    def release(self) -> None:
        """Give back the memory of every page that was read; views stay valid and read again."""
        for shard in self.shards:
            shard.release()

    def array(self, name: str) -> Host:
        """View a tensor by its full name: BF16 as ml_dtypes' bfloat16; E4M3, E8M0 and packed FP4 as
        uint8.

        A copy where it is stored in another dtype; raises ``CheckpointError`` where that one says
        more than the published.
        """
        shard, spelt = self.where[name]
        array = shard.array(spelt)
        if factors := self.factors.get(f"{name[:-7]}.scale"):
            return self._times_factors(name, array, factors[0].array(factors[1]))
        if (reading := self.readings.get(name)) is None:
            return array
        try:
            return np.asarray(reading.convert(array)).reshape(self.layout[name].shape)
        except ReadingError as error:
            text = f"{error}; dsv4 rounds nothing by itself: use the published checkpoint"
            raise CheckpointError(self.path, [Finding("wrong dtype", name, shard.path.name, text)]) from None

    def weight(self, name: str) -> Host | ScaledArray:
        """View ``name.weight``, joined with ``name.scale`` where its dtype is a quantised one."""
        full = f"{name}.weight"
        fmt = self.format(full)
        if fmt is None:
            return self.array(full)
        codes = self.array(full)
        return ScaledArray(codes.view(np.int8) if fmt == "int8" else codes, self.array(f"{name}.scale"), fmt)

    def experts(self, prefix: str, projection: str) -> Experts:
        """Give ``prefix.experts.{e}.projection`` of every routed expert, each viewed when it is
        first used.
        """
        count = self.config.experts_of(prefix.removesuffix(".ffn"))
        return Experts(_Lazy(self, [f"{prefix}.experts.{e}.{projection}" for e in range(count)]))

    def identity(self, *, whole: bool = False) -> str:
        """Hash the content (``whole``: every byte, which takes as long as reading it); see
        ``identity.py`` for what it covers.
        """
        begins: dict[Path, list[int]] = {}
        for name in self.names:
            found = begins.setdefault(self.file(name), [])
            if ".experts." not in name:
                found.append(self.stored(name).begin)
        return identity.of_checkpoint(self.path, begins, whole=whole)

    def _times_factors(self, name: str, codes: Host, factors: Host) -> Host:
        spec = self.layout[name]
        out, cols = unpacked(spec)
        rows, columns = (1, FP4_GROUP) if spec.dtype == "I8" else (FP8_BLOCK, FP8_BLOCK)
        if factors.dtype == np.uint8:
            factors = np.ldexp(np.float32(1), factors.astype(np.int32) - 127)
        wide = np.repeat(np.repeat(factors.astype(np.float32), rows, axis=0), columns, axis=1)[:out, :cols]
        return np.asarray(unpack(codes, QUANTISED[spec.dtype]) * wide)

    def _note_readings(self) -> None:
        """Say once for each kind what was read in another spelling."""
        respelt = [(n, spelt) for n, (_, spelt) in self.where.items() if n != spelt and n == canonical_name(spelt)]
        if respelt:
            name, spelt = respelt[0]
            self.notes.append(
                f"{len(respelt)} tensors have another name than the published, such as {spelt} for {name}"
            )
        kinds: dict[str, list[str]] = {}
        for name, reading in self.readings.items():
            kinds.setdefault(reading.what, []).append(name)
        self.notes += [f"{len(names)} tensors: {what} (such as {names[0]})" for what, names in kinds.items()]


class _Lazy(Sequence[Any]):
    """Weights by index, each viewed once, when it is first used."""

    def __init__(self, checkpoint: Checkpoint, names: list[str]) -> None:
        self.checkpoint, self.names = checkpoint, names
        self.views: dict[int, Host | ScaledArray] = {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if index not in self.views:
            self.views[index] = self.checkpoint.weight(self.names[index])
        return self.views[index]


def embedded() -> Path:
    """Give the directory of the checkpoint that ships with the package."""
    return Path(str(resources.files("dsv4_core"))) / "data" / "tiny-jargon"
