"""The OpenAPI document of the server: its routes, the fields that each takes, and what it answers.
Served at /openapi.json.
"""

from __future__ import annotations

from dsv4_serve.forms import BODIES, OBJECT, TEXT
from dsv4_serve.schema import Schema

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
        "/v1/chat/completions": ("chat", "Continue a conversation (OpenAI)."),
        "/v1/responses": ("responses", "Continue a conversation (OpenAI's newer form)."),
        "/v1/messages": ("messages", "Continue a conversation (Anthropic)."),
        "/v1/messages/count_tokens": ("count", "Count a conversation's tokens (Anthropic)."),
        "/v1/completions": ("completions", "Continue text or ids (OpenAI)."),
        "/tokenize": ("tokenize", "Text to ids."),
        "/detokenize": ("detokenize", "Ids to text."),
    }
    paths: Schema = {
        path: {
            "post": _posted(summary, BODIES[kind], streamed="stream" in BODIES[kind]["properties"] and kind != "count")
        }
        for path, (kind, summary) in asking.items()
    }
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
        "properties": {"error": {"type": "object", "required": ["message", "type"], "properties": {"message": TEXT}}},
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


def _posted(summary: str, body: Schema, *, streamed: bool = False) -> Schema:
    answers: Schema = {"application/json": {"schema": OBJECT}}
    if streamed:
        answers["text/event-stream"] = {"schema": TEXT}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "Done.", "content": answers}, **_failures(*_ERRORS)},
    }


def _got(summary: str, media: str, *statuses: int) -> Schema:
    form = OBJECT if media == "application/json" else TEXT
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
