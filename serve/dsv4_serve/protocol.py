"""Chat Completions, Responses and Messages, by DeepSeek's library: requests in, protocol chunks
out.

The one file that imports ``deepseek_recipe``. Prompts are written by our own encoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import deepseek_recipe as recipe

from dsv4_core.graph.engine import Request
from dsv4_core.graph.sampling import Sampling
from dsv4_core.text.chat import Message, encode
from dsv4_core.text.markers import DSML, Piece
from dsv4_serve.choices import Choices, Chunks
from dsv4_serve.forms import BODIES
from dsv4_serve.refusal import RefusedError
from dsv4_serve.schema import check
from dsv4_serve.wishes import wishes

if TYPE_CHECKING:
    from dsv4_serve.served import Served

KINDS: dict[str, tuple[Any, Any]] = {
    "chat": (recipe.ChatCompletionRequest, recipe.ChatCompletionResponse),
    "responses": (recipe.ResponsesRequest, recipe.ResponsesResponse),
    "messages": (recipe.MessagesRequest, recipe.MessagesResponse),
}
OWN = (
    "n",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)  # which the library refuses or drops


@dataclass
class Asked:
    """Requests as the engine takes them, one a reply, and what turns their tokens into the
    protocol's chunks.
    """

    requests: tuple[Request, ...]
    stream: bool
    choices: Choices


def asked(kind: str, body: dict[str, Any], served: Served, name: str, *, counted: bool = False) -> Asked:
    """Read a request's body; raise ``RefusedError`` for what is wrong or not supported.

    ``counted``: its tokens are asked for alone.
    """
    ask, respond = KINDS[kind]
    capacity = served.engine.capacity
    turns = body.get("input" if kind == "responses" else "messages")
    if isinstance(turns, list) and len(turns) > capacity:
        raise RefusedError(f"{len(turns)} turns; the maximum context length is {capacity} tokens")
    check(body, BODIES["count" if counted else kind])
    served.check_model(body["model"])
    body = {name: value for name, value in body.items() if value is not None}
    _check_together(kind, body)
    wish, effort, budget = wishes(body, served), _effort(kind, body), _budget(kind, body)
    n = body.get("n", 1)
    demand, schema = _demanded(kind, body), _schema(kind, body)
    lent = _for_the_library(kind, body, demanded=demand is not None)
    try:
        parsed = ask(json.dumps(lent))
        echo = parsed.echo() if kind == "responses" else None
        conversion = parsed.convert(recipe.ConversionOptions(default_thinking_mode=served.thinking))
        conversation = conversion.conversation
        thinking = conversation.thinking_mode
        opened = demand is not None and not thinking
        schema = conversation.response_schema if schema is None else schema
        pieces = _prompt(conversation, effort, schema, served, opened=opened)
        served.check_length(pieces)
        ids = served.vocabulary.ids(pieces)
        limit = conversion.resolve_max_tokens(len(ids), capacity)
    except recipe.ConversionError as error:
        raise RefusedError(_message(error.body), status=error.status_code) from None
    except (ValueError, UnicodeError) as error:
        raise RefusedError(str(error)) from None
    inference, output = conversion.inference_options, conversion.inference_options.output_constraint
    seed = inference.seed if inference.seed is not None else served.draw_seed()
    kept = (output.kind, output.schema) if output else (None, "")
    if output is None and schema is not None:
        kept = ("json", json.dumps(schema))
    if demand is not None:
        kept = (
            "tool_call_required",
            json.dumps([{"function": _tool(t)} for t in conversation.tools if t.name in demand]),
        )
    requests, replies = [], []
    for i in range(n):
        sampling = Sampling(
            seed=(seed, i) if i else seed,
            logprobs=(inference.top_logprobs or 0) if inference.logprobs else None,
            **wish,
        )
        constraint = served.constraint(*kept, thinking=thinking, budget=budget if thinking else None)
        requests.append(Request(tuple(ids), limit, sampling, served.ends, constraint))
        generator = ask.chunk_generator(conversion, name, served.name)
        if echo is not None:
            generator = generator.with_echo(echo)
        parsing = conversion.parsing_options
        parsing.starts_in_tool_calls = opened
        processor = recipe.StreamProcessor(generator, parsing, served.recipe_tokenizer)
        response = respond(name, served.name, served.clock(), len(ids), 0)
        replies.append(Chunks(processor, response, len(ids), served.ends))
    return Asked(tuple(requests), conversion.stream, Choices(replies))


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body


def _for_the_library(kind: str, body: dict[str, Any], *, demanded: bool) -> dict[str, Any]:
    """A body as the library takes it: without what is served here, a demand for a call being an
    offer.
    """
    lent = {**{name: value for name, value in body.items() if name not in OWN}, "model": "DeepSeek-V4-Pro"}
    if (most := lent.pop("max_completion_tokens", None)) is not None:  # the newer name, which it does not read
        lent["max_tokens"] = most
    if kind == "chat":  # OpenAI's developer role is what these models know as system
        lent["messages"] = [{**m, "role": "system"} if m["role"] == "developer" else m for m in body["messages"]]
    if kind == "messages":
        lent["tools"] = [{k: v for k, v in tool.items() if k != "type"} for tool in body.get("tools", [])]
    if demanded:
        lent["tool_choice"] = {"type": "auto"} if kind == "messages" else "auto"
    return lent


def _check_together(kind: str, body: dict[str, Any]) -> None:
    """Raise ``RefusedError`` for fields that contradict each other, or have no effect without
    another.
    """
    both = body.get("max_tokens"), body.get("max_completion_tokens")
    if None not in both and both[0] != both[1]:
        raise RefusedError("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
    told = "message.output_text.logprobs"
    if told in body.get("include", ()) and body.get("top_logprobs") is None:
        raise RefusedError(f"include {told!r} needs top_logprobs, which says how many", param="include")
    if kind == "responses" and body.get("top_logprobs") and told not in body.get("include", ()):
        raise RefusedError(f"top_logprobs needs include {told!r}", param="top_logprobs")
    if kind == "chat" and "top_logprobs" in body and not body.get("logprobs"):
        raise RefusedError("top_logprobs needs logprobs = true", param="top_logprobs")
    if kind == "chat" and "stream_options" in body and not body.get("stream"):
        raise RefusedError("stream_options needs stream = true", param="stream_options")
    sort, effort = (body.get("thinking") or {}).get("type"), _effort(kind, body)
    if (sort == "disabled" and effort not in (None, "none")) or (sort in ("enabled", "adaptive") and effort == "none"):
        raise RefusedError(
            f"thinking {sort} and an effort of {effort} contradict each other; give one", param="thinking"
        )
    if kind == "messages":
        budget, most = _budget(kind, body), body.get("max_tokens")
        if budget is not None and most is not None and budget >= most:
            raise RefusedError(
                f"thinking.budget_tokens = {budget} must be less than max_tokens = {most}",
                param="thinking.budget_tokens",
            )


def _effort(kind: str, body: dict[str, Any]) -> str | None:
    """The effort that the body itself asks for, None where it says nothing."""
    where = {"chat": body, "responses": body.get("reasoning"), "messages": body.get("output_config")}[kind] or {}
    return where.get("reasoning_effort" if kind == "chat" else "effort")


def _budget(kind: str, body: dict[str, Any]) -> int | None:
    """Tokens that the model may think for, None for any number."""
    return None if kind == "responses" else (body.get("thinking") or {}).get("budget_tokens")


def _schema(kind: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of a message's reply, which the library drops; it reads those of the others."""
    given = (body.get("output_config") or {}).get("format") if kind == "messages" else None
    if given is None:
        return None
    if body.get("tools"):
        raise RefusedError(
            "output_config.format is not supported beside tools: a reply that keeps to it calls none",
            param="output_config.format",
        )
    schema: dict[str, Any] = given["schema"]
    return schema


def _demanded(kind: str, body: dict[str, Any]) -> frozenset[str] | None:
    """Names of the tools of which one must be called, None where none must. Raise ``RefusedError``
    for a demand that nothing can meet.
    """
    choice = body.get("tool_choice")
    sort = choice.get("type", "function") if isinstance(choice, dict) else choice
    if sort in (None, "auto", "none"):
        return None
    tools = [tool["function"] if kind == "chat" else tool for tool in body.get("tools", [])]
    names = frozenset(tool["name"] for tool in tools)
    if not names:
        raise RefusedError(f"tool_choice {sort} needs tools", param="tool_choice")
    if sort in ("any", "required"):
        return names
    assert isinstance(choice, dict)
    name = (choice["function"] if kind == "chat" else choice)["name"]
    if name not in names:
        raise RefusedError(
            f"tool_choice: no tool is named {name!r}; there is {', '.join(sorted(names))}", param="tool_choice"
        )
    return frozenset([name])


def _prompt(
    conversation: Any, effort: str | None, schema: dict[str, Any] | None, served: Served, *, opened: bool
) -> list[Piece]:
    """Write the conversation by our encoder, with the levels of effort of this checkpoint."""
    messages: list[Message] = [_turn(m) for m in conversation.messages]
    thinking = conversation.thinking_mode
    levels = {"minimal": "low", "medium": "low", "xhigh": "max"}
    level = levels.get(effort, effort) if effort else None
    if not thinking or level == "none":
        level = None
    tools = [{"function": _tool(t)} for t in conversation.tools]
    pieces = encode(
        messages,
        thinking=thinking,
        effort=level,
        tools=tools or None,
        response_format=schema,
        texts=served.texts,
    )
    if opened:
        pieces += [Piece("\n\n<"), Piece(DSML, control=True), Piece("tool_calls>\n")]
    return pieces


def _turn(message: Any) -> Message:
    turn: Message = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        turn["reasoning_content"] = message.reasoning_content or ""
        if message.prefix:
            turn["wo_eos"] = True
        if message.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
    if message.role == "tool" and message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {key: value for key, value in function.items() if value is not None}
