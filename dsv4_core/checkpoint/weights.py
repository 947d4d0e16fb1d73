"""Checkpoints: configuration, index and shards, checked against the layout on opening; bytes are read when used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dsv4_core.checkpoint import foreign, identity, manifest
from dsv4_core.checkpoint.config import Draft, ModelConfig
from dsv4_core.checkpoint.layout import QUANTISED, TensorSpec, canonical_name, scale_shape, tensor_specs, unpacked
from dsv4_core.checkpoint.readings import COLUMN, READINGS, Reading, ReadingError, exponents
from dsv4_core.checkpoint.shards import VIEWS, Shard, ShardError, Stored
from dsv4_core.contract.dtypes import FP4_GROUP, FP8_BLOCK, Experts, Format, Host, ScaledArray, unpack
from dsv4_core.files import forms
from dsv4_core.files.forms import Converted
from dsv4_core.files.reading import FileError, json_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""
SHOWN = 3  # findings of one rule that an error message spells out; its ``findings`` holds all of them
_PLAIN = ("BF16", "F32")
_EXPERT_DTYPES = (*QUANTISED, *_PLAIN)
_COPIES = ("mtp.0.emb", "mtp.0.head.weight")  # of embed and head: some exports repeat them under the MTP block
_VISION = ("vision.", "aligner.", "image_start", "image_end", "image_newline", "image_pad")  # of Vision-Exp
_MTP_PARTS = {"e_proj", "h_proj", "enorm", "hnorm"}
_DSPARK_PARTS = {"main_proj", "main_norm", "markov_head", "confidence_head"}
_MODULES: dict[Draft, str] = {"": "", "mtp": "an MTP block", "dspark": "a DSpark drafter"}


class Finding(NamedTuple):
    """Something wrong with a checkpoint: the rule, the tensor (empty: a whole file), the file, and the sentence."""

    rule: str
    tensor: str
    file: str
    text: str
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        """Give one line: where, then what."""
        return ": ".join(part for part in (self.file, self.tensor, self.text) if part)


class CheckpointError(ValueError):
    """A directory that is no sound checkpoint. ``findings`` holds all there is, the message the first of each rule."""

    def __init__(self, path: Path, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        lines = summary(findings)
        if len(findings) > 1:
            head = f"{path}: {len(findings)} problems; `dsv4 inspect {path} --json` lists them all"
            super().__init__("\n  - ".join([head, *lines]))
        else:
            super().__init__(f"{path}: {lines[0]}")


def summary(findings: Iterable[Finding]) -> list[str]:
    """One line a finding, at most three for each rule, then how many more there are."""
    counts = Counter(f.rule for f in findings)
    lines: list[str] = []
    for rule, count in counts.items():
        lines += [str(f) for f in findings if f.rule == rule][:SHOWN]
        if count > SHOWN:
            lines.append(f"... and {count - SHOWN} more of: {rule}")
    return lines


class ForeignError(ValueError):
    """Weights in a format that dsv4 does not read: one sentence says which, and what to use instead."""


class Checkpoint:
    """A model directory: ``config.json`` and either an index with its shards or one ``model.safetensors``.

    Opening reads headers only and raises ``CheckpointError`` (``ConfigError`` for the configuration) before any weight
    is read; ``check=False`` leaves what is wrong in ``findings`` instead, for the audit. Names are the published ones,
    whatever spelling the files use. Arrays are read-only views of the mapped files: a byte is read when first used.
    """

    def __init__(self, path: Path | str, *, check: bool = True, progress: Progress | None = None) -> None:
        self.path = Path(path)
        if problem := foreign.path_problem(self.path):
            raise ForeignError(problem)
        if not self.path.is_dir():
            text = "no such directory; give a model directory (config.json and *.safetensors)"
            raise CheckpointError(self.path, [Finding("no directory", "", "", text)])
        self.config = ModelConfig.load(self.path)
        self.findings: list[Finding] = []
        self.notes: list[str] = list(self.config.notes)
        self._where: dict[str, tuple[Shard, str]] = {}
        self._readings: dict[str, Reading] = {}
        self._factors: dict[str, tuple[Shard, str]] = {}
        unread = self._open(progress)
        if problem := foreign.names_problem(self._where):
            raise ForeignError(f"{self.path}: {problem}")
        self._set_aside()
        self._settle_draft(unread)
        self._match(unread)
        self._find_float_factors()
        self._note_readings()
        self._check_tables()
        self.findings += [Finding("note", "", "", note, "note") for note in self.notes]
        if check and (errors := self.errors):
            raise CheckpointError(self.path, errors)

    @property
    def errors(self) -> list[Finding]:
        """Findings that keep the checkpoint from running."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def names(self) -> list[str]:
        """Published names of all tensors that are there and belong there."""
        return list(self._where)

    @property
    def nbytes(self) -> int:
        """Bytes of these tensors."""
        return sum(s.end - s.begin for s in map(self.stored, self._where))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def stored(self, name: str) -> Stored:
        """Give dtype, shape and place in the file of a tensor."""
        shard, spelt = self._where[name]
        return shard.entries[spelt]

    def file(self, name: str) -> Path:
        """Give the file that holds a tensor."""
        return self._where[name][0].path

    def spec(self, name: str) -> TensorSpec:
        """Give a tensor as it is read: as stored, but for what stands in another dtype than the published one."""
        stored, spec = self.stored(name), self.layout[name]
        if f"{name[:-7]}.scale" in self._factors:
            return TensorSpec(name, unpacked(spec), "F32", spec.kind)
        if name in self._readings:
            return TensorSpec(name, spec.shape, spec.dtype, spec.kind)
        return TensorSpec(name, stored.shape, stored.dtype, spec.kind)

    def value_dtype(self, name: str) -> str:
        """Give what a tensor's stored bytes are: its dtype in the file, or the published one where the bytes are the same."""
        reading = self._readings.get(name)
        return self.layout[name].dtype if reading and reading.same_bytes else self.stored(name).dtype

    @property
    def shards(self) -> list[Shard]:
        """The files that hold these tensors."""
        return list({id(shard): shard for shard, _ in self._where.values()}.values())

    def hold(self) -> None:
        """Raise ``CheckpointError`` where a shard is no longer the file that was opened: what was read of it is not one model's."""
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
        """View a tensor by its full name: BF16 as ml_dtypes' bfloat16; E4M3, E8M0 and packed FP4 as uint8.

        A copy where it is stored in another dtype; raises ``CheckpointError`` where that one says more than the published.
        """
        shard, spelt = self._where[name]
        array = shard.array(spelt)
        if factors := self._factors.get(f"{name[:-7]}.scale"):
            return self._times_factors(name, array, factors[0].array(factors[1]))
        if (reading := self._readings.get(name)) is None:
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

    def format(self, name: str) -> Format | None:
        """Give the format of ``NAME.weight``; None for a plain one."""
        if f"{name[:-7]}.scale" in self._factors:
            return None
        dtype = self.value_dtype(name)
        fmt = QUANTISED.get(dtype)
        return "int8" if fmt == "e2m1" and self.is_int8 and dtype == "I8" else fmt

    def experts(self, prefix: str, projection: str) -> Experts:
        """Give ``prefix.experts.{e}.projection`` of every routed expert, each viewed when it is first used."""
        return Experts(_Lazy(self, [f"{prefix}.experts.{e}.{projection}" for e in range(self.config.n_routed_experts)]))

    def identity(self, *, whole: bool = False) -> str:
        """Hash the content (``whole``: every byte, which takes as long as reading it); see ``identity.py`` for what it covers."""
        begins: dict[Path, list[int]] = {}
        for name in self.names:
            found = begins.setdefault(self.file(name), [])
            if ".experts." not in name:
                found.append(self.stored(name).begin)
        return identity.of_checkpoint(self.path, begins, whole=whole)

    def _wrong(self, rule: str, tensor: str, file: str, text: str) -> None:
        self.findings.append(Finding(rule, tensor, file, text))

    def _open(self, progress: Progress | None) -> set[str]:
        """Open every shard and hold it against the index; give the names of tensors in files that could not be read."""
        index, total_size = self._index()
        by_file: dict[str, set[str]] = {}
        for name, file in index.items():
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
                self._wrong("corrupt index", "", file, text)
                unread |= named
                continue
            try:
                shard = Shard(self.path / file)
            except (OSError, FileError, ShardError) as error:
                held = f" ({len(named)} tensors)" if named else ""
                missing = isinstance(error, FileNotFoundError)
                text = f"no such file, and {INDEX} names it{held}; fetch it" if missing else f"{error}{held}"
                self._wrong("shard missing" if missing else "shard unreadable", "", file, text)
                unread |= named
                continue
            if made and (text := manifest.other_than_written(self.path, file, made)):
                self._wrong("not as converted", "", file, text)
            for name in sorted(named - shard.entries.keys()):
                self._wrong("index and shards disagree", name, file, "the index says it is in this file, and it is not")
                unread.add(name)
            for spelt in shard.entries:
                if index and index.get(spelt) != file:
                    other = f"the index gives it to {index[spelt]}" if spelt in index else "the index does not name it"
                    self._wrong("index and shards disagree", spelt, file, f"this file holds it, and {other}")
                self._place(spelt, shard)
            held_bytes += shard.path.stat().st_size - shard.begin
        if progress:
            progress(len(by_file), len(by_file))
        if not self.findings and isinstance(total_size, int) and total_size != held_bytes:
            self.notes.append(f"{INDEX} says total_size {total_size}, the shards hold {held_bytes} bytes")
        return {canonical_name(name) for name in unread}

    def _manifest(self) -> Converted | None:
        try:
            return manifest.read(self.path)
        except FileError as error:
            self._wrong("not as converted", "", manifest.MANIFEST, str(error).removeprefix(f"{self.path}/"))
            return None

    def _index(self) -> tuple[dict[str, str], Any]:
        """Read weight map and total_size; without an index the map is empty, and findings say what that means."""
        path = self.path / INDEX
        try:
            index = json_file(path, forms.Index, "fetch the index again")
        except FileNotFoundError:
            if not self._single():
                shards = len(list(self.path.glob("*.safetensors")))
                text = f"no such file, nor {SINGLE}; {shards} other *.safetensors files are there; fetch the index"
                self._wrong("no index", "", INDEX, text)
            return {}, None
        except FileError as error:
            self._wrong("corrupt index", "", INDEX, str(error).removeprefix(f"{path}: "))
            return {}, None
        total = index.metadata.get("total_size") if isinstance(index.metadata, dict) else None
        return index.weight_map, total

    def _single(self) -> str:
        """Give the name of the one file that holds all tensors where there is no index; empty where there is none."""
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        return SINGLE if SINGLE in files else files[0] if len(files) == 1 else ""

    def _place(self, spelt: str, shard: Shard) -> None:
        """Note where a tensor is, under its published name."""
        name = canonical_name(spelt)
        if name.startswith(_COPIES):
            self.notes.append(f"{spelt} in {shard.path.name} is a copy of the main model's and is ignored")
        elif name in self._where:
            other, known = self._where[name]
            as_ = "" if known == spelt else f" as {known}"
            self._wrong(
                "stored twice", name, shard.path.name, f"{other.path.name} holds it, too{as_}; remove one of them"
            )
        else:
            self._where[name] = (shard, spelt)

    def _set_aside(self) -> None:
        """Take out tensors that the text model does not use, with one note each kind; use a tied head."""
        vision = [name for name in self._where if name.startswith(_VISION) or name.endswith(".gate.bias_vl")]
        if vision:
            vision += [
                name for i in range(self.config.num_hash_layers) if (name := f"layers.{i}.ffn.gate.bias") in self._where
            ]
            for name in vision:
                del self._where[name]
            self.notes.append(
                f"{len(vision)} tensors of the vision part (such as {vision[0]}) are ignored: dsv4 runs text"
            )
        tied = self.config.other.get("tie_word_embeddings") and "embed.weight" in self._where
        if tied and "head.weight" not in self._where:
            self._where["head.weight"] = self._where["embed.weight"]
        self._set_offsets_aside()

    def _set_offsets_aside(self) -> None:
        """ModelSlim's W8A8 is ours with offsets of zero beside the scales; whatever else it writes is named."""
        scheme = foreign.modelslim_problem(self.path)
        offsets = [name for name in self._where if name.endswith(".weight_offset")]
        if scheme:
            raise ForeignError(scheme)
        for name in offsets:
            if self._peek(name).any():
                raise ForeignError(f"{self.path}: {foreign.asymmetric(name)}")
            del self._where[name]
        if offsets:
            self.notes.append(f"ModelSlim's W8A8: {len(offsets)} offsets, all zero, are ignored")

    def _settle_draft(self, unread: set[str]) -> None:
        """Decide by tensors what draft module there is; where it cannot run, the main model runs without it."""
        names = [name for name in (*self._where, *unread) if name.startswith("mtp.")]
        parts = {part for name in names for part in name.split(".")[2:3]}
        stages = 1 + max((int(n) for name in names if (n := name.split(".")[1]).isdigit()), default=-1)
        found: Draft = "dspark" if parts & _DSPARK_PARTS else "mtp" if parts & _MTP_PARTS else ""
        c, module = self.config, _MODULES[found]
        if not names:
            if c.draft:
                self.notes.append(
                    f"no tensor under mtp. is there: this copy has not {_MODULES[c.draft]}, and runs without"
                )
            self.config = c.drafting("")
        elif found == "dspark" and c.dspark_target_layer_ids:
            if c.stages not in {0, stages}:
                self.notes.append(f"config.json says {c.stages} stages of DSpark, the tensors are of {stages}")
            self.config = c.drafting("dspark", stages)
        elif found == "mtp" and c.num_nextn_predict_layers:
            self.config = c.drafting("mtp", 1)
            self._forget([name for name in names if not name.startswith("mtp.0.")], "of further MTP blocks")
        else:
            why = "the tensors under mtp. are of no kind that dsv4 knows"
            if found == "mtp":
                why = "config.json asks for none (num_nextn_predict_layers = 0)"
            elif found == "dspark":
                why = "config.json has no dspark_target_layer_ids, which say what it reads"
            self._forget(names, f"of {module or 'an unknown draft module'}: {why}")
            self.config = c.drafting("")

    def _forget(self, names: Sequence[str], whose: str) -> None:
        for name in names:
            self._where.pop(name, None)
        if names:
            self.notes.append(f"{len(names)} tensors under mtp. are ignored, {whose}")

    def _peek(self, name: str) -> Host:
        """Read a small tensor without mapping its file."""
        shard, spelt = self._where[name]
        stored = shard.entries[spelt]
        count = math.prod(stored.shape)
        return np.fromfile(shard.path, VIEWS[stored.dtype], count, offset=stored.begin).reshape(stored.shape)

    def _find_float_factors(self) -> None:
        """Find scales in F32 that are no powers of two: their weights are read as plain float32; experts all, or none."""
        found = []
        for name, reading in self._readings.items():
            if reading.convert is exponents:
                try:
                    exponents(self._peek(name))
                except ReadingError:
                    found.append(name)
        if any(".experts." in name for name in found):
            found = [*(n for n in found if ".experts." not in n), *(n for n in self._where if _is_expert_scale(n))]
        for name in found:
            self._readings.pop(name, None)
            self._factors[name] = self._where.pop(name)
        if found:
            self.notes.append(
                f"{len(found)} weights have scales that are no powers of two (such as {found[0]}): they are read as float32, "
                "value times scale, and their activations are not quantised"
            )

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
        respelt = [(name, spelt) for name, (_, spelt) in self._where.items() if name not in {spelt, "head.weight"}]
        if respelt:
            name, spelt = respelt[0]
            self.notes.append(
                f"{len(respelt)} tensors have another name than the published, such as {spelt} for {name}"
            )
        kinds: dict[str, list[str]] = {}
        for name, reading in self._readings.items():
            kinds.setdefault(reading.what, []).append(name)
        self.notes += [f"{len(names)} tensors: {what} (such as {names[0]})" for what, names in kinds.items()]

    def _check_tables(self) -> None:
        """Hold to their rules what every backend would only trip over while it runs: hash tables, and sinks."""
        wrong = {finding.tensor for finding in self.errors}
        experts = self.config.n_routed_experts
        for name in self._where:
            if name in wrong or not name.endswith((".tid2eid", ".attn_sink")):
                continue
            values = self._peek(name)
            bad = ~np.isfinite(values) if name.endswith("sink") else (values < 0) | (values >= experts)
            if count := int(np.count_nonzero(bad)):
                at = [int(i) for i in np.argwhere(bad)[0]]
                found = f"{count} of {bad.size} {{}} (first at {at}) {'is' if count == 1 else 'are'}"
                rule, text = "NaN or infinity", f"{found.format('values')} NaN or infinite; fetch it again"
                if name.endswith(".tid2eid"):
                    rule = "expert id out of range"
                    text = (
                        f"{found.format('expert ids')} outside 0 .. {experts - 1} (n_routed_experts = {experts}): "
                        "the table is of a model with more experts; use the one that was made with these"
                    )
                self._wrong(rule, name, self.file(name).name, text)

    def _match(self, unread: set[str]) -> None:
        """Hold every tensor against the layout; ``unread`` ones have been reported."""
        dtypes = Counter(self.stored(name).dtype for name in self._where if _is_expert_weight(name))
        most = max(dtypes, key=lambda dtype: dtypes[dtype], default="I8")
        self.expert_dtype = "I8" if most == "U8" else most
        scales = (
            self.stored(s)
            for name in self._where
            if _is_expert_weight(name) and (s := f"{name[:-7]}.scale") in self._where
        )
        first = next(scales, None)
        self.is_int8 = most == "I8" and first is not None and first.dtype in _PLAIN and math.prod(first.shape[1:]) == 1
        published: Format = "e4m3" if self.expert_dtype == "F8_E4M3" else "e2m1"
        self.layout = tensor_specs(self.config, "int8" if self.is_int8 else published)
        if self._where or not self.findings:  # with no tensor at all, why has been said
            for name in self._unlike_layout():
                self._match_one(self.layout[name], unread)
        for name in [name for name in self._where if name not in self.layout]:
            shard, spelt = self._where.pop(name)
            text = (
                "unexpected: the model of config.json has no tensor of this name, in any spelling that dsv4 reads; "
                "is it the config.json that came with the weights?"
            )
            self._wrong("unexpected tensor", spelt, shard.path.name, text)

    def _unlike_layout(self) -> list[str]:
        """Give the tensors that are not exactly as published (of a scale its weight): nearly none of 145,000."""
        published = self.expert_dtype in {
            "I8",
            "F8_E4M3",
        }  # the layout was made for these, so that alike means published
        names: dict[str, None] = {}  # a set that keeps order
        for name, shape, dtype, _ in self.layout.values():
            where = self._where.get(name)
            if where and (published or ".experts." not in name):
                stored = where[0].entries[where[1]]
                if stored.dtype == dtype and stored.shape == shape:
                    continue
            names[f"{name[:-6]}.weight" if name.endswith(".scale") else name] = None
        return list(names)

    def _match_one(self, spec: TensorSpec, unread: set[str]) -> None:
        name = spec.name
        scale_name = f"{name[:-7]}.scale" if name.endswith(".weight") else ""
        scale_spec = self.layout.get(scale_name)
        if name not in self._where:
            for part in (spec, scale_spec):
                if part and part.name not in unread and part.name not in self._where:
                    text = f"missing: {part.dtype} {list(part.shape)} by config.json; no file here holds it: get a complete copy"
                    self._wrong("missing tensor", part.name, "", text)
            return
        stored, scale = self.stored(name), self.stored(scale_name) if scale_name in self._where else None
        allowed = self._dtypes(spec, quantised=scale_spec is not None)
        file = self.file(name).name
        if (
            stored.dtype not in allowed
            and (spec.dtype in allowed)
            and (reading := READINGS.get((spec.dtype, stored.dtype)))
        ):
            self._readings[name] = reading
            stored = stored._replace(dtype=spec.dtype)
        if stored.dtype not in allowed:
            alike = ", as most experts are" if len(allowed) == 1 and _is_expert_weight(name) else ""
            text = f"dtype {stored.dtype} must be {' or '.join(allowed)}{alike}; use the published checkpoint"
            self._wrong("wrong dtype", name, file, text)
            return
        held = TensorSpec(name, stored.shape, stored.dtype, spec.kind)
        shape, wanted = (held.shape, spec.shape) if self.is_int8 else (unpacked(held), unpacked(spec))
        if shape != wanted:
            must = list(wanted)
            self._wrong("wrong shape", name, file, f"shape {list(shape)} must be {must} by config.json; correct either")
            return
        if scale_spec and scale_name not in unread:
            self._match_scale(name, scale_name, scale, shape, self.format(name))

    def _dtypes(self, spec: TensorSpec, *, quantised: bool) -> tuple[str, ...]:
        """Give the dtypes that a tensor may have: quantised ones may come unquantised; all experts must be alike."""
        if not quantised:
            return (spec.dtype,)
        if not _is_expert_weight(spec.name):
            return (spec.dtype, *_PLAIN)
        return (self.expert_dtype,) if self.expert_dtype in _EXPERT_DTYPES else _EXPERT_DTYPES

    def _match_scale(
        self, name: str, scale_name: str, scale: Stored | None, shape: tuple[int, ...], fmt: Format | None
    ) -> None:
        if scale is None:
            if fmt:
                text = f"missing scale: {name} is {fmt} and cannot be read without, and no file here holds it: get a complete copy"
                self._wrong("missing scale", scale_name, "", text)
            return
        file = self.file(scale_name).name
        if fmt is None:
            text = f"unexpected scale: {name} is {self.stored(name).dtype}, which has none; use a complete copy"
            self._wrong("unexpected tensor", scale_name, file, text)
            return
        dtype = "F32" if fmt == "int8" else "F8_E8M0"
        if scale.dtype != dtype and (reading := READINGS.get((dtype, scale.dtype))):
            self._readings[scale_name] = reading
        elif scale.dtype == dtype and fmt == "int8" and scale.shape[1:] == (1,):
            self._readings[scale_name] = COLUMN
        elif scale.dtype != dtype:
            what = f"{dtype}, an exponent a byte" if dtype == "F8_E8M0" else dtype
            self._wrong(
                "wrong dtype", scale_name, file, f"dtype {scale.dtype} must be {what}; use the published checkpoint"
            )
            return
        found = scale.shape[:1] if fmt == "int8" and scale.shape[1:] == (1,) else scale.shape
        if found != scale_shape(shape, fmt):
            grid = {"e4m3": "one per 128 x 128 block", "e2m1": "one per 32 channels of a row", "int8": "one per row"}[
                fmt
            ]
            must = list(scale_shape(shape, fmt))
            text = (
                f"scale grid {list(scale.shape)} must be {must} for {fmt} {list(shape)}: {grid}; requantise the weight"
            )
            self._wrong("scale grid", scale_name, file, text)


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


def _is_expert_scale(name: str) -> bool:
    return ".ffn.experts." in name and name.endswith(".scale")


def _is_expert_weight(name: str) -> bool:
    return ".ffn.experts." in name and name.endswith(".weight")
