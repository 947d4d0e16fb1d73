"""The OpenAPI document of the server: its routes, the fields that each takes, and what it answers.
Served at /openapi.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv4_serve import completions, protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_OBJECT: Schema = {"type": "object"}
_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXTS: Schema = {"type": "array", "items": {"type": "string"}}
_TURNS: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "object", "required": ["role"], "properties": {"role": _TEXT, "content": {}}},
}
_THINKING: Schema = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"type": "string", "enum": ["enabled", "disabled"]}},
}


def _whole(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


FIELDS: dict[str, Schema] = {
    "best_of": _whole(1),
    "echo": _FLAG,
    "frequency_penalty": _number(-2, 2),
    "ignore_eos": _FLAG,
    "include": _TEXTS,
    "input": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}]},
    "instructions": _TEXT,
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "max_completion_tokens": _whole(1),
    "max_output_tokens": _whole(1),
    "max_tokens": _whole(0),
    "messages": _TURNS,
    "metadata": _OBJECT,
    "min_p": _number(0, 0.999),
    "model": _TEXT,
    "n": _whole(1, protocol.MOST_CHOICES),
    "output_config": _OBJECT,
    "parallel_tool_calls": _FLAG,
    "presence_penalty": _number(-2, 2),
    "prompt": {"anyOf": [_TEXT, _TEXTS, _IDS, {"type": "array", "items": _IDS}]},
    "reasoning": _OBJECT,
    "reasoning_effort": {"type": "string", "enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max"]},
    "response_format": {"type": "object", "required": ["type"], "properties": {"type": _TEXT}},
    "seed": _whole(0, (1 << 53) - 1),
    "stop": {"anyOf": [_TEXT, {**_TEXTS, "maxItems": 16}]},
    "stop_sequences": {**_TEXTS, "maxItems": 16},
    "store": _FLAG,
    "stream": _FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "suffix": _TEXT,
    "system": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}]},
    "temperature": _number(0, 2),
    "text": _OBJECT,
    "thinking": _THINKING,
    "tool_choice": {"anyOf": [_TEXT, _OBJECT]},
    "tools": {"type": "array", "items": _OBJECT},
    "top_k": _whole(0, 1 << 20),
    "top_logprobs": _whole(0, 20),
    "top_p": _number(0, 1),
    "background": _FLAG,
    "client_metadata": _OBJECT,
    "prompt_cache_key": _TEXT,
    "safety_identifier": _TEXT,
    "service_tier": _TEXT,
    "truncation": _TEXT,
    "user": _TEXT,
}
_OF_ROUTES: dict[str, dict[str, Schema]] = {  # where a field's form is another one
    "completions": {"logprobs": _whole(0, 20)},
    "chat": {"logprobs": _FLAG},
}
_ERRORS = {
    400: "A wrong or unsupported field, or more tokens than the context holds.",
    401: "The key is missing or wrong.",
    404: "Another model's name.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "The queue is full.",
    500: "The request failed in the model.",
    503: "The server is shutting down, or has failed.",
}


def document(version: str) -> Schema:
    """The document, OpenAPI 3.1."""
    asking = {
        "/v1/chat/completions": ("chat", "Continue a conversation (OpenAI).", ["model", "messages"]),
        "/v1/responses": ("responses", "Continue a conversation (OpenAI's newer form).", ["model", "input"]),
        "/v1/messages": ("messages", "Continue a conversation (Anthropic).", ["model", "messages", "max_tokens"]),
        "/v1/completions": ("completions", "Continue text or ids (OpenAI).", ["model", "prompt"]),
    }
    paths: Schema = {}
    for path, (kind, summary, required) in asking.items():
        paths[path] = {"post": _posted(summary, _body(kind, _fields(kind), required), streamed=True)}
    count = _body("messages", _fields("messages"), ["model", "messages"])
    paths["/v1/messages/count_tokens"] = {"post": _posted("Count a conversation's tokens (Anthropic).", count)}
    tokenize = {"type": "object", "required": ["prompt"], "properties": {"prompt": _TEXT}}
    paths["/tokenize"] = {"post": _posted("Text to ids.", tokenize)}
    detokenize = {"type": "object", "required": ["tokens"], "properties": {"tokens": _IDS}}
    paths["/detokenize"] = {"post": _posted("Ids to text.", detokenize)}
    paths["/v1/models"] = {"get": _got("What is served.", "application/json", 401)}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths["/v1/models/{name}"] = {
        "get": {**_got("What is served.", "application/json", 401, 404), "parameters": [name]}
    }
    for path, summary in (
        ("/health", "Whether the engine runs."),
        ("/ready", "Whether requests are taken."),
        ("/version", "Of dsv4."),
        ("/openapi.json", "This document."),
    ):
        paths[path] = {"get": _got(summary, "application/json", *([503] if path in {"/health", "/ready"} else []))}
    paths["/metrics"] = {"get": _got("Prometheus metrics.", "text/plain")}
    paths["/"] = {"get": _got("A page to talk to the model.", "text/html")}
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": {"message": _TEXT}}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "dsv4 serve", "version": version},
        "paths": paths,
        "security": [{}, {"key": []}],
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _fields(kind: str) -> Iterable[str]:
    if kind == "completions":
        return (*completions.FIELDS, *completions.INERT)
    return (*protocol.KINDS[kind][2], *protocol.INERT[kind])


def _body(kind: str, fields: Iterable[str], required: list[str]) -> Schema:
    inert = completions.INERT if kind == "completions" else protocol.INERT[kind]
    forms = {name: {**FIELDS, **_OF_ROUTES.get(kind, {})}[name] for name in sorted(fields)}
    forms |= {name: {"enum": list(values)} for name, values in inert.items() if values}
    return {"type": "object", "required": required, "properties": forms, "additionalProperties": False}


def _posted(summary: str, body: Schema, *, streamed: bool = False) -> Schema:
    answers: Schema = {"application/json": {"schema": _OBJECT}}
    if streamed:
        answers["text/event-stream"] = {"schema": _TEXT}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "Done.", "content": answers}, **_failures(*_ERRORS)},
    }


def _got(summary: str, media: str, *statuses: int) -> Schema:
    form = _OBJECT if media == "application/json" else _TEXT
    failures = _failures(*statuses)
    if summary.startswith("Whether"):
        failures = {"503": {"description": "No.", "content": {media: {"schema": form}}}}
    return {
        "summary": summary,
        "responses": {"200": {"description": "Done.", "content": {media: {"schema": form}}}, **failures},
    }


def _failures(*statuses: int) -> Schema:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _ERRORS[status], "content": content} for status in statuses}
