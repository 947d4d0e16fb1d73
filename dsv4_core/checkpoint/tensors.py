"""The tensors of a directory by published name: opened, held against the index, and where each is
stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_core.checkpoint import manifest
from dsv4_core.checkpoint.config import ModelConfig
from dsv4_core.checkpoint.findings import Finding
from dsv4_core.checkpoint.layout import QUANTISED, TensorSpec, canonical_name
from dsv4_core.checkpoint.readings import Reading
from dsv4_core.checkpoint.shards import VIEWS, Shard, ShardError, Stored
from dsv4_core.contract.dtypes import Format, Host
from dsv4_core.files import forms
from dsv4_core.files.forms import Converted
from dsv4_core.files.reading import FileError, json_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""
_COPIES = ("mtp.0.emb", "mtp.0.head.weight")  # of embed and head: some exports repeat them under the MTP block


class Tensors:
    """An index with its shards, or one file. What is found wrong goes to ``findings``, what is
    worth a word to ``notes``.

    ``where``: shard and name in it of each tensor, by published name. ``readings``: how those are
    read that are stored in another dtype than the published. ``factors``: scales in float32 that
    are no powers of two.
    """

    layout: dict[str, TensorSpec]
    expert_dtype: str
    is_int8: bool

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.path, self.config = path, config
        self.findings: list[Finding] = []
        self.notes: list[str] = list(config.notes)
        self.where: dict[str, tuple[Shard, str]] = {}
        self.readings: dict[str, Reading] = {}
        self.factors: dict[str, tuple[Shard, str]] = {}

    @property
    def errors(self) -> list[Finding]:
        """Findings that keep the checkpoint from running."""
        return [f for f in self.findings if f.severity == "error"]

    def stored(self, name: str) -> Stored:
        """Give dtype, shape and place in the file of a tensor."""
        shard, spelt = self.where[name]
        return shard.entries[spelt]

    def file(self, name: str) -> Path:
        """Give the file that holds a tensor."""
        return self.where[name][0].path

    def value_dtype(self, name: str) -> str:
        """Give what a tensor's stored bytes are: its dtype in the file, or the published one where
        the bytes are the same.
        """
        reading = self.readings.get(name)
        return self.layout[name].dtype if reading and reading.same_bytes else self.stored(name).dtype

    def format(self, name: str) -> Format | None:
        """Give the format of ``NAME.weight``; None for a plain one."""
        if f"{name[:-7]}.scale" in self.factors:
            return None
        dtype = self.value_dtype(name)
        fmt = QUANTISED.get(dtype)
        return "int8" if fmt == "e2m1" and self.is_int8 and dtype == "I8" else fmt

    def peek(self, name: str) -> Host:
        """Read a small tensor without mapping its file."""
        shard, spelt = self.where[name]
        stored = shard.entries[spelt]
        count = math.prod(stored.shape)
        return np.fromfile(shard.path, VIEWS[stored.dtype], count, offset=stored.begin).reshape(stored.shape)

    def wrong(self, rule: str, tensor: str, file: str, text: str) -> None:
        """Note an error."""
        self.findings.append(Finding(rule, tensor, file, text))

    def open_shards(self, progress: Progress | None, *, only: str = "") -> set[str]:
        """Open every shard and hold it against the index; give the names of tensors in files that
        could not be read.

        ``only``: shards that hold no tensor of a name that begins so stay closed, and may be
        missing.
        """
        index, total_size = self._index()
        by_file: dict[str, set[str]] = {}
        for name, file in index.items():
            if not only or canonical_name(name).startswith(only):
                by_file.setdefault(file, set()).add(name)
        if not by_file and (single := self._single()):
            by_file[single] = set()
        unread: set[str] = set()
        held_bytes = 0
        made = self._manifest()
        for done, (file, named) in enumerate(sorted(by_file.items())):
            if progress:
                progress(done, len(by_file))
            if Path(file).name != file:
                text = f"the index must name files of its own directory, without a path; repair {INDEX}"
                self.wrong("corrupt index", "", file, text)
                unread |= named
                continue
            try:
                shard = Shard(self.path / file)
            except (OSError, FileError, ShardError) as error:
                held = f" ({len(named)} tensors)" if named else ""
                missing = isinstance(error, FileNotFoundError)
                text = f"no such file, and {INDEX} names it{held}; fetch it" if missing else f"{error}{held}"
                self.wrong("shard missing" if missing else "shard unreadable", "", file, text)
                unread |= named
                continue
            if made and (text := manifest.other_than_written(self.path, file, made)):
                self.wrong("not as converted", "", file, text)
            for name in sorted(named - shard.entries.keys()):
                self.wrong("index and shards disagree", name, file, "the index says it is in this file, and it is not")
                unread.add(name)
            for spelt in shard.entries:
                if index and index.get(spelt) != file:
                    other = f"the index gives it to {index[spelt]}" if spelt in index else "the index does not name it"
                    self.wrong("index and shards disagree", spelt, file, f"this file holds it, and {other}")
                self._place(spelt, shard)
            held_bytes += shard.path.stat().st_size - shard.begin
        if progress:
            progress(len(by_file), len(by_file))
        if not self.findings and not only and isinstance(total_size, int) and total_size != held_bytes:
            self.notes.append(f"{INDEX} says total_size {total_size}, the shards hold {held_bytes} bytes")
        return {canonical_name(name) for name in unread}

    def _manifest(self) -> Converted | None:
        try:
            return manifest.read(self.path)
        except FileError as error:
            self.wrong("not as converted", "", manifest.MANIFEST, str(error).removeprefix(f"{self.path}/"))
            return None

    def _index(self) -> tuple[dict[str, str], Any]:
        """Read weight map and total_size; without an index the map is empty, and findings say what
        that means.
        """
        path = self.path / INDEX
        try:
            index = json_file(path, forms.Index, "fetch the index again")
        except FileNotFoundError:
            if not self._single():
                shards = len(list(self.path.glob("*.safetensors")))
                text = f"no such file, nor {SINGLE}; {shards} other *.safetensors files are there; fetch the index"
                self.wrong("no index", "", INDEX, text)
            return {}, None
        except FileError as error:
            self.wrong("corrupt index", "", INDEX, str(error).removeprefix(f"{path}: "))
            return {}, None
        total = index.metadata.get("total_size") if isinstance(index.metadata, dict) else None
        return index.weight_map, total

    def _single(self) -> str:
        """Give the name of the one file that holds all tensors where there is no index; empty where
        there is none.
        """
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        return SINGLE if SINGLE in files else files[0] if len(files) == 1 else ""

    def _place(self, spelt: str, shard: Shard) -> None:
        """Note where a tensor is, under its published name."""
        name = canonical_name(spelt)
        if name.startswith(_COPIES):
            self.notes.append(f"{spelt} in {shard.path.name} is a copy of the main model's and is ignored")
        elif name in self.where:
            other, known = self.where[name]
            as_ = "" if known == spelt else f", as {known} and as {spelt}"
            text = f"{other.path.name} holds it, too{as_}: which one is meant is not said; use the published checkpoint"
            self.wrong("stored twice", name, shard.path.name, text)
        else:
            self.where[name] = (shard, spelt)
