"""Every tensor held against the layout: names, dtypes, shapes, scale grids, and small tables."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dsv4_core.checkpoint import foreign
from dsv4_core.checkpoint.findings import ForeignError
from dsv4_core.checkpoint.layout import QUANTISED, TensorSpec, scale_shape, tensor_specs, unpacked
from dsv4_core.checkpoint.readings import COLUMN, READINGS, SQUEEZED, ReadingError, exponents

if TYPE_CHECKING:
    from dsv4_core.checkpoint.shards import Stored
    from dsv4_core.checkpoint.tensors import Tensors
    from dsv4_core.contract.dtypes import Format

_PLAIN = ("BF16", "F32")
_GATE = ".ffn.gate.weight"
_EXPERT_DTYPES = (*QUANTISED, *_PLAIN)


def count_experts(t: Tensors) -> None:
    """Take from the gates how many routed experts each block has, where some block has as many as
    config.json says.

    Experts that were cut away unevenly, or not in the drafter, are so described by no key.
    """
    rows = {
        name.removesuffix(_GATE): shape[0]
        for name in t.where
        if name.endswith(_GATE) and len(shape := t.stored(name).shape) == 2
    }
    others = {block: count for block, count in rows.items() if count != t.config.n_routed_experts}
    if not others or len(others) == len(rows):
        return
    t.config = replace(t.config, experts_by_block=others)
    t.notes.append(
        f"{len(others)} blocks have another number of routed experts than config.json's {t.config.n_routed_experts} "
        f"(such as {next(iter(others))}: {next(iter(others.values()))}), by their gates"
    )
    for block, count in others.items():
        if count < t.config.num_experts_per_tok:
            text = (
                f"{count} experts, fewer than num_experts_per_tok = {t.config.num_experts_per_tok}; get a complete copy"
            )
            t.wrong("wrong shape", f"{block}{_GATE}", t.file(f"{block}{_GATE}").name, text)


def match(t: Tensors, unread: set[str]) -> None:
    """Hold every tensor against the layout; ``unread`` ones have been reported."""
    dtypes = Counter(t.stored(name).dtype for name in t.where if _is_expert_weight(name))
    most = max(dtypes, key=lambda dtype: dtypes[dtype], default="I8")
    t.expert_dtype = "I8" if most == "U8" else most
    scales = (t.stored(s) for name in t.where if _is_expert_weight(name) and (s := f"{name[:-7]}.scale") in t.where)
    first = next(scales, None)
    t.is_int8 = most == "I8" and first is not None and first.dtype in _PLAIN and math.prod(first.shape[1:]) == 1
    published: Format = "e4m3" if t.expert_dtype == "F8_E4M3" else "e2m1"
    t.layout = tensor_specs(t.config, "int8" if t.is_int8 else published)
    if not t.findings and (problem := foreign.strange_names(t.path, t.where, t.layout)):
        raise ForeignError(problem)
    if t.where or not t.findings:  # with no tensor at all, why has been said
        for name in _unlike_layout(t):
            _match_one(t, t.layout[name], unread)
    for name in [name for name in t.where if name not in t.layout]:
        shard, spelt = t.where.pop(name)
        text = (
            "unexpected: the model of config.json has no tensor of this name, in any spelling that dsv4 reads; "
            "is it the config.json that came with the weights?"
        )
        t.wrong("unexpected tensor", spelt, shard.path.name, text)


def _unlike_layout(t: Tensors) -> list[str]:
    """Give the tensors that are not exactly as published (of a scale its weight): nearly none of
    145,000.
    """
    published = t.expert_dtype in {
        "I8",
        "F8_E4M3",
    }  # the layout was made for these, so that alike means published
    names: dict[str, None] = {}  # a set that keeps order
    for name, shape, dtype, _ in t.layout.values():
        where = t.where.get(name)
        if where and (published or ".experts." not in name):
            stored = where[0].entries[where[1]]
            if stored.dtype == dtype and stored.shape == shape:
                continue
        names[f"{name[:-6]}.weight" if name.endswith(".scale") else name] = None
    return list(names)


def _match_one(t: Tensors, spec: TensorSpec, unread: set[str]) -> None:
    name = spec.name
    scale_name = f"{name[:-7]}.scale" if name.endswith(".weight") else ""
    scale_spec = t.layout.get(scale_name)
    if name not in t.where:
        for part in (spec, scale_spec):
            if part and part.name not in unread and part.name not in t.where:
                text = f"missing: {part.dtype} {list(part.shape)} by config.json; no file here holds it: get a complete copy"
                t.wrong("missing tensor", part.name, "", text)
        return
    stored, scale = t.stored(name), t.stored(scale_name) if scale_name in t.where else None
    allowed = _dtypes(t, spec, quantised=scale_spec is not None)
    file = t.file(name).name
    if (
        stored.dtype not in allowed
        and (spec.dtype in allowed)
        and (reading := READINGS.get((spec.dtype, stored.dtype)))
    ):
        t.readings[name] = reading
        stored = stored._replace(dtype=spec.dtype)
    if stored.dtype not in allowed:
        alike = ", as most experts are" if len(allowed) == 1 and _is_expert_weight(name) else ""
        text = f"dtype {stored.dtype} must be {' or '.join(allowed)}{alike}; use the published checkpoint"
        t.wrong("wrong dtype", name, file, text)
        return
    held = TensorSpec(name, stored.shape, stored.dtype, spec.kind)
    shape, wanted = (held.shape, spec.shape) if t.is_int8 else (unpacked(held), unpacked(spec))
    if shape != wanted:
        if scale_spec is None and [n for n in shape if n != 1] == [n for n in wanted if n != 1]:
            t.readings.setdefault(name, SQUEEZED)
            return
        text = f"shape {list(shape)} must be {list(wanted)} by config.json; is it the config.json that came with the weights?"
        t.wrong("wrong shape", name, file, text)
        return
    if scale_spec and scale_name not in unread:
        _match_scale(t, name, scale_name, scale, shape, t.format(name))


def _dtypes(t: Tensors, spec: TensorSpec, *, quantised: bool) -> tuple[str, ...]:
    """Give the dtypes that a tensor may have: quantised ones may come unquantised; all experts must
    be alike.
    """
    if not quantised:
        return (spec.dtype,)
    if not _is_expert_weight(spec.name):
        return (spec.dtype, *_PLAIN)
    return (t.expert_dtype,) if t.expert_dtype in _EXPERT_DTYPES else _EXPERT_DTYPES


def _match_scale(
    t: Tensors, name: str, scale_name: str, scale: Stored | None, shape: tuple[int, ...], fmt: Format | None
) -> None:
    if scale is None:
        if fmt:
            text = f"missing scale: {name} is {fmt} and cannot be read without, and no file here holds it: get a complete copy"
            t.wrong("missing scale", scale_name, "", text)
        return
    file = t.file(scale_name).name
    if fmt is None:
        text = f"unexpected scale: {name} is {t.stored(name).dtype}, which has none; use a complete copy"
        t.wrong("unexpected tensor", scale_name, file, text)
        return
    dtype = "F32" if fmt == "int8" else "F8_E8M0"
    if scale.dtype == "F8_E4M3" and fmt == "e2m1":
        raise ForeignError(f"{t.path}: {foreign.nvfp4_scales(t.where[scale_name][1])}")
    if scale.dtype != dtype and (reading := READINGS.get((dtype, scale.dtype))):
        t.readings[scale_name] = reading
    elif scale.dtype == dtype and fmt == "int8" and scale.shape[1:] == (1,):
        t.readings[scale_name] = COLUMN
    elif scale.dtype != dtype:
        what = f"{dtype}, an exponent a byte" if dtype == "F8_E8M0" else dtype
        t.wrong("wrong dtype", scale_name, file, f"dtype {scale.dtype} must be {what}; use the published checkpoint")
        return
    found = scale.shape[:1] if fmt == "int8" and scale.shape[1:] == (1,) else scale.shape
    if found != scale_shape(shape, fmt):
        grid = {"e4m3": "one per 128 x 128 block", "e2m1": "one per 32 channels of a row", "int8": "one per row"}[fmt]
        must = list(scale_shape(shape, fmt))
        text = f"scale grid {list(scale.shape)} must be {must} for {fmt} {list(shape)}: {grid}; dsv4 reads no other grid: use the published checkpoint"
        t.wrong("scale grid", scale_name, file, text)


def find_float_factors(t: Tensors) -> None:
    """Find scales in F32 that are no powers of two: their weights are read as plain float32;
    experts all, or none.
    """
    found = []
    for name, reading in t.readings.items():
        if reading.convert is exponents:
            try:
                exponents(t.peek(name))
            except ReadingError:
                found.append(name)
    if any(".experts." in name for name in found):
        found = [*(n for n in found if ".experts." not in n), *(n for n in t.where if _is_expert_scale(n))]
    for name in found:
        t.readings.pop(name, None)
        t.factors[name] = t.where.pop(name)
    if found:
        t.notes.append(
            f"{len(found)} weights have scales that are no powers of two (such as {found[0]}): they are read as float32, "
            "value times scale, and their activations are not quantised"
        )


def check_tables(t: Tensors) -> None:
    """Hold to their rules what every backend would only trip over while it runs: hash tables,
    sinks, and norms.
    """
    wrong = {finding.tensor for finding in t.errors}
    for name in t.where:
        if name in wrong or not name.endswith((".tid2eid", ".attn_sink", "norm.weight")):
            continue
        values, experts = t.peek(name), t.config.experts_of(name.partition(".ffn.")[0])
        bad = (values < 0) | (values >= experts) if name.endswith(".tid2eid") else ~np.isfinite(values)
        if count := int(np.count_nonzero(bad)):
            at = [int(i) for i in np.argwhere(bad)[0]]
            found = f"{count} of {bad.size} {{}} (first at {at}) {'is' if count == 1 else 'are'}"
            rule, text = "NaN or infinity", f"{found.format('values')} NaN or infinite; fetch it again"
            if name.endswith(".tid2eid"):
                rule = "expert id out of range"
                why = "the table is of a model with more experts; use the one that was made with these"
                if not (values >= experts).any():
                    why = "no expert has a negative number; fetch it again"
                text = f"{found.format('expert ids')} outside 0 .. {experts - 1} ({experts} routed experts): {why}"
            t.wrong(rule, name, t.file(name).name, text)


def _is_expert_scale(name: str) -> bool:
    return ".ffn.experts." in name and name.endswith(".scale")


def _is_expert_weight(name: str) -> bool:
    return ".ffn.experts." in name and name.endswith(".weight")
