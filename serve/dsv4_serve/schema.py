"""A value against a JSON Schema, as far as the forms of this server need one: what is wrong is
named by its place, its value and the rule.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dsv4_serve.refusal import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable

Schema = dict[str, Any]

_WORDS = {"string": "a text", "boolean": "true or false", "object": "an object", "array": "a list"}


def check(value: Any, schema: Schema, place: str = "") -> None:
    """Raise ``RefusedError`` for the first thing in ``value`` that ``schema`` does not allow.

    A member that is null counts as left out, as clients write it. ``place``: where the value
    stands in the request, e.g. ``messages[0].content``.
    """
    if "anyOf" in schema:
        fitting = next((one for one in schema["anyOf"] if _is_of_type(value, one)), None)
        if fitting is None or not (isinstance(value, dict | list) or _in_bounds(value, fitting)):
            raise _wrong(value, schema, place)
        schema = fitting
    if "oneOf" in schema:
        _check_kind(value, schema, place)
        return
    if schema.get("x-inert") and "enum" in schema and not _is_of_type(value, schema):
        unsupported = f"{place} = {_shown(value)} is not supported by this server; leave it out, or give "
        raise _refused(unsupported + _either(schema["enum"]), place)
    if not _is_of_type(value, schema) or not _in_bounds(value, schema):
        raise _wrong(value, schema, place)
    if isinstance(value, dict):
        _check_object(value, schema, place)
    elif isinstance(value, list):
        ids = bool(value) and all(type(one) is int for one in value)  # as many as a context holds: two tell all
        for i in sorted({value.index(min(value)), value.index(max(value))}) if ids else range(len(value)):
            check(value[i], schema.get("items", {}), f"{place}[{i}]")


def _check_kind(value: Any, schema: Schema, place: str) -> None:
    """An object of one of several kinds, which one of its members tells."""
    tag = schema["discriminator"]["propertyName"]
    kinds = {kind: one for one in schema["oneOf"] for kind in one["properties"][tag]["enum"]}
    if not isinstance(value, dict):
        raise _wrong(value, {"type": "object"}, place)
    kind = value.get(tag)
    if kind is None:
        kind = schema["discriminator"].get("x-default")
    inside = f"{place}.{tag}" if place else tag
    if kind is None:
        raise _refused(f"{inside} is missing; it must be {_either(kinds)}", inside)
    if not isinstance(kind, str) or kind not in kinds:
        unsupported = f"{inside} = {_shown(kind)} is not supported by this server; it must be "
        raise _refused(unsupported + _either(kinds), inside)
    check(value, kinds[kind], place)


def _check_object(value: dict[str, Any], schema: Schema, place: str) -> None:
    inner, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if value.get(name) is None:
            here = f"{place}.{name}" if place else name
            raise _refused(f"{here} is missing; it must be {_rule(inner.get(name, {}))}", here)
    for name, one in value.items():
        here = f"{place}.{name}" if place else name
        if one is None:
            continue
        if name in inner:
            check(one, inner[name], here)
        elif others is False:
            raise _refused(f"{here} is not supported by this server; leave it out", here)
        elif isinstance(others, dict):
            names = schema.get("propertyNames", {})
            if not re.fullmatch(names.get("pattern", ".*"), name, re.DOTALL):
                raise _refused(f"{place}: {_shown(name)} must be {names['description']}", place)
            check(one, others, here)


def _is_of_type(value: Any, schema: Schema) -> bool:
    if "anyOf" in schema:
        return any(_is_of_type(value, one) for one in schema["anyOf"])
    if "enum" in schema:  # JSON's true is not its 1
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in schema["enum"])
    kind = "object" if "oneOf" in schema else schema.get("type")
    match kind:
        case None:
            return True
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "object":
            return isinstance(value, dict)
    return isinstance(value, list)


def _in_bounds(value: Any, schema: Schema) -> bool:
    if isinstance(value, str | list):
        short, long = ("minLength", "maxLength") if isinstance(value, str) else ("minItems", "maxItems")
        return bool(schema.get(short, 0) <= len(value) <= schema.get(long, len(value)))
    if isinstance(value, bool) or not isinstance(value, int | float) or "type" not in schema:
        return True
    above = value > schema["exclusiveMinimum"] if "exclusiveMinimum" in schema else True
    return bool(above and schema.get("minimum", value) <= value <= schema.get("maximum", value))


def _rule(schema: Schema) -> str:
    """What a schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_rule(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return _either(schema["enum"])
    kind = "object" if "oneOf" in schema else schema.get("type", "")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    if kind == "string":
        return "a text that is not empty" if schema.get("minLength") else "a text"
    if kind == "array":
        least, most = schema.get("minItems"), schema.get("maxItems")
        if most == 0:
            return "an empty list"
        return "a list" + (f" of up to {most}" if most else " that is not empty" if least else "")
    return _WORDS.get(kind, "there")


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if low is None:
        return "" if high is None else f" up to {high:g}"
    if high is None:
        return f" from {low} on"
    if schema["type"] == "integer":
        return f" in {low} .. {high}"
    return f" in {'(' if 'exclusiveMinimum' in schema else '['}{low:g}, {high:g}]"


def _either(values: Iterable[Any]) -> str:
    *first, last = [_shown(value) for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def _wrong(value: Any, schema: Schema, place: str) -> RefusedError:
    return _refused(f"{place} = {_shown(value)} must be {_rule(schema)}", place)


def _refused(message: str, place: str) -> RefusedError:
    return RefusedError(message, param=place)
