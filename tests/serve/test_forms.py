"""A request is told what is wrong with it: its place, its value, the rule."""

import pytest

pytest.importorskip("starlette")

from dsv4_serve.forms import BODIES
from dsv4_serve.refusal import RefusedError
from dsv4_serve.schema import check

WRONG = [True, -1, 1.5, "x", [], {}, [1], ["x"], {"x": 1}, 1e300, 10**30]
LEAST = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "responses": {"model": "m", "input": "hi"},
    "messages": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    "completions": {"model": "m", "prompt": "hi"},
    "tokenize": {"prompt": "hi"},
    "detokenize": {"tokens": [1]},
}


def refusal(value, schema):
    """What is said against a value, None where nothing is."""
    try:
        check(value, schema)
    except RefusedError as error:
        return error
    return None


@pytest.mark.parametrize("kind", LEAST)
def test_of_values_of_every_kind_a_field_takes_few(kind):
    """Every field of every route is held to something, and names itself where it refuses."""
    check(LEAST[kind], BODIES[kind])
    for field in BODIES[kind]["properties"]:
        told = [error for value in WRONG if (error := refusal({**LEAST[kind], field: value}, BODIES[kind]))]
        assert len(told) >= 6, field
        assert all(error.param.startswith(field) and error.message.startswith(error.param) for error in told)
        if field in BODIES[kind]["required"]:
            with pytest.raises(RefusedError, match=f"{field} is missing; it must be"):
                check({**LEAST[kind], field: None}, BODIES[kind])
        else:
            check({**LEAST[kind], field: None}, BODIES[kind])


def _places(schema, place=()):
    """Paths to every object whose members are known, through lists and kinds."""
    if "properties" in schema and "oneOf" not in schema:
        yield place, schema
    for name, one in schema.get("properties", {}).items():
        yield from _places(one, (*place, name))
    for one in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _places(one, place)
    if "items" in schema:
        yield from _places(schema["items"], (*place, 0))


def _least(schema):
    """The least value that a schema allows."""
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _least(schema["anyOf"][0])
    if "oneOf" in schema:
        return _least(schema["oneOf"][0])
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: _least(schema["properties"][name]) for name in schema.get("required", ())}
    if kind == "array":
        return [_least(schema["items"])] * schema.get("minItems", 0)
    return {"string": "x", "boolean": True, "integer": schema.get("minimum", 0), "number": 1.0}[kind]


@pytest.mark.parametrize("kind", LEAST)
def test_no_member_is_ignored_however_deep(kind):
    seen = 0
    for place, schema in _places(BODIES[kind]):
        good = _least(schema)
        check(good, schema, "here")
        with pytest.raises(RefusedError, match=r"here\.zest is not supported by this server"):
            check({**good, "zest": 1}, schema, "here")
        for name in schema.get("required", ()):
            with pytest.raises(RefusedError, match=rf"here\.{name} is missing"):
                check({k: v for k, v in good.items() if k != name}, schema, "here")
        seen += 1
        assert schema["additionalProperties"] is False, place
    assert seen >= 1


def test_bounds_and_truth_values():
    """JSON's true is not its 1; what is too much is cut in the message; lists of ids are looked
    through whole.
    """
    form = BODIES["completions"]
    for wrong, told in (
        ({"n": True}, "n = true must be a whole number in 1 .. 16"),
        ({"best_of": True}, "best_of = true is not supported by this server; leave it out, or give 1"),
        ({"prompt": [1, 2, -3]}, r"prompt\[2\] = -3 must be a text or a whole number from 0 on"),
        ({"prompt": ["a", 1.5]}, r"prompt\[1\] = 1.5 must be"),
        ({"stop": ["x" * 5] * 400}, r"\.\.\. \(3600 characters\) must be a list of up to 16"),
        ({"top_p": 0}, r"top_p = 0 must be a number in \(0, 1\]"),
        ({"temperature": -1}, r"temperature = -1 must be 0 or a number in \[0.0001, 2\]"),
        ({"logit_bias": {"x": 1}}, 'logit_bias: "x" must be a token\'s id'),
    ):
        with pytest.raises(RefusedError, match=told):
            check({**LEAST["completions"], **wrong}, form)
