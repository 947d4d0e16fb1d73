"""Schemas of the npu ops that the backend calls: the committed snapshot of the real wheel's, and calls bound to them."""

from __future__ import annotations

import functools
import json
from importlib import resources
from types import SimpleNamespace
from typing import Any

import torch


@functools.cache
def schemas() -> dict[str, str]:
    """Schemas of the called ops as the real wheel prints them: the committed snapshot."""
    snapshot = json.loads(
        resources.files("dsv4_backend_ascend").joinpath("data/npu_schemas.json").read_text(encoding="utf-8")
    )
    return dict(snapshot["schemas"])


@functools.cache
def _parameters(op: str) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of an op's arguments, in the schema's order."""
    return tuple((argument.name, argument.default_value) for argument in torch._C.parse_schema(schemas()[op]).arguments)  # noqa: SLF001


def bind(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Name every argument of a call, defaults included; the dispatcher has checked the call against the schema."""
    parameters = _parameters(op)
    return SimpleNamespace(
        **(dict(parameters) | {name: value for (name, _), value in zip(parameters, args, strict=False)} | kwargs)
    )
