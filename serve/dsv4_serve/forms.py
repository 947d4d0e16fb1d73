"""What each route takes, in JSON Schema: requests are checked by it, and the OpenAPI document shows
it.

A field that is not here is refused, however deep it stands, so that nothing is ignored without a
word. ``_inert`` marks fields that change nothing here and are told from those that do: they may be
given, some with one value only.
"""

from __future__ import annotations

from typing import Any

from dsv4_core.graph.sampling import COLDEST, MOST_LOGPROBS
from dsv4_serve.schema import Schema

MOST_CHOICES = 16  # replies to one request, each of which takes a slot
MOST_STOPS = 16
MOST_PARTS = 4096  # of a list in a request; turns and tokens are bounded by the context


def _whole(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, "maxItems": MOST_PARTS, **bounds}


def _many(items: Schema) -> Schema:
    """A list of one or more, bounded by the context alone."""
    return {"type": "array", "items": items, "minItems": 1}


def _any(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def _object(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _kinds(tag: str, default: str | None = None, **kinds: Schema) -> Schema:
    """Objects of several kinds, told by their member ``tag``; one without it is of the default."""
    needed = [] if default else [tag]
    forms = [
        {**form, "required": [*needed, *form["required"]], "properties": {tag: _one_of(kind), **form["properties"]}}
        for kind, form in kinds.items()
    ]
    told = {"propertyName": tag, **({"x-default": default} if default else {})}
    return {"type": "object", "oneOf": forms, "discriminator": told}


def _inert(schema: Schema) -> Schema:
    return {**schema, "x-inert": True}


TEXT: Schema = {"type": "string"}
SOME_TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
IDS = _many(_whole(0))
_NAMES: Schema = {"type": "object", "additionalProperties": TEXT}
_CACHED = {"cache_control": _inert(OBJECT)}  # a hint: prefixes are shared without it
_STOPS = _list(SOME_TEXT, maxItems=MOST_STOPS)
_EFFORT = _one_of("none", "minimal", "low", "medium", "high", "xhigh", "max")
_STREAMED = _object(include_usage=FLAG, include_obfuscation=_inert(_one_of(False)))
_BIAS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "[0-9]{1,9}", "description": "a token's id"},
    "additionalProperties": _number(-100, 100),
}
_SAMPLED: dict[str, Schema] = {
    "temperature": _any(_one_of(0), _number(COLDEST, 2)),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
}
_NARROWED: dict[str, Schema] = {
    **_SAMPLED,
    "top_k": _whole(0, 1 << 20),
    "min_p": _number(0, 0.999),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _BIAS,
    "seed": _whole(0, (1 << 63) - 1),
    "stop": _any(SOME_TEXT, _STOPS),
    "n": _whole(1, MOST_CHOICES),
}
_UNHEEDED: dict[str, Schema] = {  # of OpenAI's chat and responses
    "user": _inert(TEXT),
    "metadata": _inert(_NAMES),
    "store": _inert(_one_of(False)),
    "parallel_tool_calls": _inert(_one_of(True)),
    "service_tier": _inert(_one_of("auto", "default")),
    "safety_identifier": _inert(TEXT),
    "prompt_cache_key": _inert(TEXT),
}


def _thinking() -> Schema:
    budget = {"budget_tokens": _whole(1)}
    return _kinds(
        "type",
        enabled=_object(**budget, display=_inert(_one_of("summarized"))),
        adaptive=_object(display=_inert(_one_of("summarized"))),
        disabled=_object(),
    )


def _chat() -> Schema:
    content = _any(TEXT, _list(_kinds("type", text=_object("text", text=TEXT))))
    call = _object(
        "id",
        "function",
        id=TEXT,
        type=_one_of("function"),
        index=_inert(_whole(0)),
        function=_object("name", "arguments", name=TEXT, arguments=TEXT),
    )
    asking = _object("content", content=content)
    message = _kinds(
        "role",
        system=asking,
        developer=asking,
        latest_reminder=asking,
        user=asking,
        assistant=_object(
            content=content,
            reasoning_content=TEXT,
            tool_calls=_list(call),
            prefix=FLAG,
            annotations=_inert(_list({}, maxItems=0)),
        ),
        tool=_object("content", "tool_call_id", content=content, tool_call_id=TEXT, name=_inert(TEXT)),
    )
    function = _object("name", name=SOME_TEXT, description=TEXT, parameters=OBJECT, strict=FLAG)
    schema = _object("schema", name=_inert(TEXT), schema=OBJECT, strict=_inert(FLAG))
    return _object(
        "model",
        "messages",
        model=TEXT,
        messages=_many(message),
        stream=FLAG,
        stream_options=_STREAMED,
        max_tokens=_whole(1),
        max_completion_tokens=_whole(1),
        **_NARROWED,
        tools=_list(_kinds("type", function=_object("function", function=function))),
        tool_choice=_any(
            _one_of("none", "auto", "required"),
            _object("function", type=_one_of("function"), function=_object("name", name=TEXT)),
        ),
        logprobs=FLAG,
        top_logprobs=_whole(0, MOST_LOGPROBS),
        response_format=_kinds(
            "type",
            text=_object(),
            json_object=_object(),
            json_schema=_object("json_schema", json_schema=schema),
            regex=_object("regex", regex=TEXT),
        ),
        reasoning_effort=_EFFORT,
        thinking=_thinking(),
        **_UNHEEDED,
    )


def _responses() -> Schema:
    told = {"id": _inert(TEXT), "status": _inert(TEXT)}
    annotated = {"annotations": _inert(_list({}, maxItems=0)), "logprobs": _inert(_list(OBJECT))}
    part = _kinds(
        "type",
        input_text=_object("text", text=TEXT),
        output_text=_object("text", text=TEXT, **annotated),
    )
    message = _object(
        "role",
        "content",
        role=_one_of("user", "assistant", "system", "developer"),
        content=_any(TEXT, _list(part)),
        phase=_inert(TEXT),
        **told,
    )
    call = {"call_id": TEXT, "name": TEXT, "arguments": TEXT}
    summary = _list(_kinds("type", summary_text=_object("text", text=TEXT)))
    thought = _list(_kinds("type", reasoning_text=_object("text", text=TEXT)))
    answer = {"call_id": TEXT, "output": _any(TEXT, _list(_kinds("type", input_text=_object("text", text=TEXT))))}
    item = _kinds(
        "type",
        "message",
        message=message,
        reasoning=_object(summary=_inert(summary), content=thought, encrypted_content=_inert(TEXT), **told),
        function_call=_object(*call, **call, **told),
        function_call_output=_object(*answer, **answer, **told),
        custom_tool_call=_object("call_id", "name", "input", call_id=TEXT, name=TEXT, input=TEXT, **told),
        custom_tool_call_output=_object(*answer, **answer, **told),
    )
    schema = _object("schema", name=_inert(TEXT), schema=OBJECT, strict=_inert(FLAG))
    return _object(
        "model",
        model=TEXT,
        input=_any(TEXT, _many(item)),
        instructions=TEXT,
        stream=FLAG,
        stream_options=_object(include_obfuscation=_inert(_one_of(False))),
        max_output_tokens=_whole(1),
        **_SAMPLED,
        tools=_list(
            _kinds(
                "type",
                function=_object("name", name=SOME_TEXT, description=TEXT, parameters=OBJECT, strict=FLAG),
                custom=_object("name", name=_one_of("apply_patch"), description=TEXT, format=OBJECT),
            )
        ),
        tool_choice=_any(
            _one_of("none", "auto", "required"),
            _kinds("type", function=_object("name", name=TEXT), custom=_object("name", name=TEXT)),
        ),
        reasoning=_object(effort=_EFFORT, summary=_inert(_one_of("auto"))),  # reasoning is told whole
        text=_object(
            format=_kinds(
                "type",
                text=_object(),
                json_object=_object(),
                json_schema=_object("schema", **schema["properties"]),
            ),
            verbosity=_inert(_one_of("medium")),
        ),
        top_logprobs=_whole(0, MOST_LOGPROBS),
        include=_list(_one_of("message.output_text.logprobs", "reasoning.encrypted_content")),
        truncation=_inert(_one_of("disabled")),
        background=_inert(_one_of(False)),
        client_metadata=_inert(OBJECT),
        **_UNHEEDED,
    )


def _messages() -> Schema:
    text = _object("text", text=TEXT, citations=_inert(_list({}, maxItems=0)), **_CACHED)
    texts = _any(TEXT, _list(_kinds("type", text=text)))
    asked = _kinds(
        "type",
        text=text,
        tool_result=_object("tool_use_id", tool_use_id=TEXT, content=texts, is_error=_inert(FLAG), **_CACHED),
    )
    said = _kinds(
        "type",
        text=text,
        thinking=_object("thinking", thinking=TEXT, signature=_inert(TEXT)),
        tool_use=_object("id", "name", "input", id=TEXT, name=TEXT, input=OBJECT, **_CACHED),
    )
    message = _kinds(
        "role",
        user=_object("content", content=_any(TEXT, _list(asked))),
        assistant=_object("content", content=_any(TEXT, _list(said))),
        system=_object("content", content=texts),
    )
    tool = _object(
        "name", "input_schema", name=SOME_TEXT, description=TEXT, input_schema=OBJECT, strict=FLAG, **_CACHED
    )
    one_call = {"disable_parallel_tool_use": _inert(_one_of(False))}
    return _object(
        "model",
        "messages",
        "max_tokens",
        model=TEXT,
        messages=_many(message),
        system=texts,
        stream=FLAG,
        max_tokens=_whole(1),
        **_SAMPLED,
        top_k=_whole(0, 1 << 20),
        stop_sequences=_STOPS,
        tools=_list(_kinds("type", "custom", custom=tool)),
        tool_choice=_kinds(
            "type",
            auto=_object(**one_call),
            any=_object(**one_call),
            tool=_object("name", name=TEXT, **one_call),
            none=_object(),
        ),
        thinking=_thinking(),
        output_config=_object(effort=_EFFORT, format=_kinds("type", json_schema=_object("schema", schema=OBJECT))),
        metadata=_inert(_object(user_id=TEXT)),
        service_tier=_inert(_one_of("auto", "standard_only")),
    )


def _completions() -> Schema:
    return _object(
        "model",
        "prompt",
        model=TEXT,
        prompt=_any(TEXT, _many(_any(TEXT, _whole(0), IDS))),
        max_tokens=_whole(0),
        stream=FLAG,
        stream_options=_STREAMED,
        echo=FLAG,
        logprobs=_whole(0, MOST_LOGPROBS),
        ignore_eos=FLAG,
        **_NARROWED,
        user=_inert(TEXT),
        best_of=_inert(_one_of(1)),
        suffix=_inert(_one_of("")),
    )


BODIES: dict[str, Schema] = {
    "chat": _chat(),
    "responses": _responses(),
    "messages": _messages(),
    "completions": _completions(),
    "tokenize": _object("prompt", prompt=TEXT),
    "detokenize": _object("tokens", tokens={"type": "array", "items": _whole(0)}),
}
BODIES["count"] = {**BODIES["messages"], "required": ["model", "messages"]}
