"""Schemas of the ops that the backend calls: committed snapshots of real wheels, calls bound to
them, and whether an installed op takes the calls that are made.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


class Snapshot(NamedTuple):
    """Schemas of the called ops as one wheel prints them. ``cann``: the CANN that it is paired
    with, or what is known.
    """

    wheel: str
    cann: str
    schemas: dict[str, str]


@functools.cache
def snapshots() -> tuple[Snapshot, ...]:
    """The committed snapshots, oldest wheel first."""
    text = resources.files("dsv4_backend_ascend").joinpath("data/npu_schemas.json").read_text(encoding="utf-8")
    return tuple(
        Snapshot(entry["wheel"], entry["cann"], dict(entry["schemas"])) for entry in json.loads(text)["wheels"]
    )


@functools.cache
def extension_schemas() -> dict[str, str]:
    """Schemas of the called ops of the operators' own extension, which no wheel holds."""
    text = resources.files("dsv4_backend_ascend").joinpath("data/extension_schemas.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["schemas"])


@functools.cache
def schemas() -> dict[str, str]:
    """What the backend was written for, and what is simulated: schemas of the newest wheel that has
    a snapshot, and of the operators' own extension.
    """
    return snapshots()[-1].schemas | extension_schemas()


def namespace(op: str) -> str:
    """Of the dispatcher: ``npu`` for torch-npu's ops."""
    return schemas()[op].partition("::")[0]


@functools.cache
def _parameters(op: str) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of an op's arguments, in the schema's order."""
    return tuple((argument.name, argument.default_value) for argument in _parsed(schemas()[op]).arguments)


@functools.cache
def _parsed(schema: str) -> Any:
    return torch._C.parse_schema(schema)  # noqa: SLF001


def bind(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Name every argument of a call, defaults included; the dispatcher has checked the call against
    the schema.
    """
    parameters = _parameters(op)
    return SimpleNamespace(
        **(dict(parameters) | {name: value for (name, _), value in zip(parameters, args, strict=False)} | kwargs)
    )


def overload(op: str) -> Any:
    """The op of this name in its namespace, as the dispatcher has it; None where nobody registered
    it.
    """
    packet = getattr(getattr(torch.ops, namespace(op)), op, None)
    return None if packet is None else packet.default


def incompatible(found: str, written_for: str, passed: tuple[str, ...]) -> str:
    """Why an op of schema ``found`` cannot take calls that pass ``passed`` by name and were written
    for another schema.

    It can where every argument that is passed is there with the same type (optional or not: a value
    is passed), every other one has a default, and the results are as many and of the same types.
    Empty where nothing is wrong.
    """
    theirs, ours = _parsed(found), _parsed(written_for)
    types = {argument.name: _type(argument) for argument in theirs.arguments}
    for argument in ours.arguments:
        if argument.name not in passed:
            continue
        if argument.name not in types:
            return f"has no argument {argument.name!r}, which is passed"
        if types[argument.name] != _type(argument):
            return f"takes {argument.name!r} as {types[argument.name]}; {_type(argument)} is passed"
    for argument in theirs.arguments:
        if argument.name not in passed and not argument.has_default_value():
            return f"asks for an argument {argument.name!r}, which is not passed"
    results = [[_type(result) for result in schema.returns] for schema in (theirs, ours)]
    if results[0] != results[1]:
        return f"gives {', '.join(results[0])}; {', '.join(results[1])} is expected"
    return ""


def _type(argument: Any) -> str:
    """The type's name, without whether it may be left out."""
    name = str(argument.type)
    return name.removeprefix("Optional[").removesuffix("]") if name.startswith("Optional[") else name
