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
from dsv4_serve.refusal import RefusedError, known, number, whole

if TYPE_CHECKING:
    from dsv4_core.graph.sampling import Constraint
    from dsv4_serve.served import Served

MOST_CHOICES = 16  # replies to one request, each of which takes a slot
COMMON: dict[str, tuple[Any, ...]] = {"user": (), "metadata": ()}
CHAT = frozenset(
    [
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "tools",
        "tool_choice",
        "logprobs",
        "top_logprobs",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "response_format",
        "reasoning_effort",
        "thinking",
        "n",
    ]
)
RESPONSES = frozenset(
    [
        "model",
        "input",
        "instructions",
        "stream",
        "max_output_tokens",
        "temperature",
        "top_p",
        "tools",
        "tool_choice",
        "reasoning",
        "text",
        "top_logprobs",
        "include",
    ]
)
MESSAGES = frozenset(
    [
        "model",
        "messages",
        "system",
        "stream",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "stop_sequences",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
    ]
)
INERT: dict[str, dict[str, tuple[Any, ...]]] = {
    "chat": {
        **COMMON,
        "store": (False,),
        "parallel_tool_calls": (True,),
        "service_tier": ("auto", "default"),
        "safety_identifier": (),
        "prompt_cache_key": (),
    },
    "responses": {
        **COMMON,
        "store": (False,),
        "parallel_tool_calls": (True,),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
        "background": (False,),
        "prompt_cache_key": (),
        "safety_identifier": (),
        "client_metadata": (),
    },
    "messages": {**COMMON, "service_tier": ("auto", "standard_only")},
}
KINDS: dict[str, tuple[Any, Any, frozenset[str]]] = {
    "chat": (recipe.ChatCompletionRequest, recipe.ChatCompletionResponse, CHAT),
    "responses": (recipe.ResponsesRequest, recipe.ResponsesResponse, RESPONSES),
    "messages": (recipe.MessagesRequest, recipe.MessagesResponse, MESSAGES),
}


@dataclass
class Asked:
    """Requests as the engine takes them, one a reply, and what turns their tokens into the
    protocol's chunks.
    """

    requests: tuple[Request, ...]
    stream: bool
    choices: Choices


def asked(kind: str, body: dict[str, Any], served: Served, name: str) -> Asked:
    """Read a request's body; raise ``RefusedError`` for what is wrong or not supported."""
    ask, respond, fields = KINDS[kind]
    known(body, fields, INERT[kind])
    served.check_model(body.get("model"))
    body = {**body, "model": "DeepSeek-V4-Pro"}
    wishes = _wishes(kind, body)
    n = whole(body, "n", 1, 1, MOST_CHOICES) or 1
    if (most := body.pop("max_completion_tokens", None)) is not None:  # the newer name, which the library does not read
        if body.get("max_tokens") not in (None, most):
            raise RefusedError("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
        body["max_tokens"] = most
    for own in ("n", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias"):
        body.pop(own, None)
    if kind == "chat":
        body["messages"] = _developers_are_system(body.get("messages"))
    _check_parts(body)
    turns = body.get("input" if kind == "responses" else "messages")
    if isinstance(turns, list) and len(turns) > served.engine.capacity:
        raise RefusedError(f"{len(turns)} turns; the maximum context length is {served.engine.capacity} tokens")
    effort = _effort(kind, body)
    options = recipe.ConversionOptions(default_thinking_mode=served.thinking)
    any_tool = _any_tool(body) if kind == "messages" else False
    try:
        parsed = ask(json.dumps(body))
        echo = parsed.echo() if kind == "responses" else None
        conversion = parsed.convert(options)
        conversation = conversion.conversation
        required = any_tool or conversation.tool_choice == "required"
        if any_tool and conversation.thinking_mode:
            raise RefusedError(
                "tool_choice any with thinking is not supported; disable thinking, or choose auto", param="tool_choice"
            )
        pieces = _prompt(conversation, effort, served, required=required)
        served.check_length(pieces)
        ids = served.vocabulary.ids(pieces)
        limit = conversion.resolve_max_tokens(len(ids), served.engine.capacity)
    except recipe.ConversionError as error:
        raise RefusedError(_message(error.body), status=error.status_code) from None
    except (ValueError, UnicodeError) as error:
        raise RefusedError(str(error)) from None
    inference = conversion.inference_options
    seed = inference.seed if inference.seed is not None else served.draw_seed()
    requests, replies = [], []
    for i in range(n):
        sampling = Sampling(
            temperature=number(body, "temperature", 1.0, 0.0, 2.0),
            top_p=float(inference.top_p if inference.top_p is not None else 1.0),
            seed=(seed, i) if i else seed,
            logprobs=(inference.top_logprobs or 0) if inference.logprobs else None,
            **wishes,
        )
        constraint = _constraint(
            inference.output_constraint, served, required=required, thinking=conversation.thinking_mode
        )
        requests.append(Request(tuple(ids), limit, sampling, served.ends, constraint))
        generator = ask.chunk_generator(conversion, name, served.name)
        if echo is not None:
            generator = generator.with_echo(echo)
        parsing = conversion.parsing_options
        parsing.starts_in_tool_calls = required
        processor = recipe.StreamProcessor(generator, parsing, served.recipe_tokenizer)
        response = respond(name, served.name, served.clock(), len(ids), 0)
        replies.append(Chunks(processor, response, len(ids), served.ends))
    return Asked(tuple(requests), conversion.stream, Choices(replies))


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body


def _wishes(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    if kind == "responses":
        return {}
    bias = body.get("logit_bias") or {}
    if not isinstance(bias, dict):
        raise RefusedError("logit_bias must be an object of token ids and numbers", param="logit_bias")
    try:
        by_id = {int(token): float(value) for token, value in bias.items()}
    except (TypeError, ValueError):
        raise RefusedError("logit_bias must be an object of token ids and numbers", param="logit_bias") from None
    if any(not -100 <= value <= 100 for value in by_id.values()):
        raise RefusedError("logit_bias: a value is outside [-100, 100]", param="logit_bias")
    return {
        "top_k": whole(body, "top_k", 0, 0, 1 << 20),
        "min_p": number(body, "min_p", 0.0, 0.0, 0.999),
        "presence_penalty": number(body, "presence_penalty", 0.0, -2.0, 2.0),
        "frequency_penalty": number(body, "frequency_penalty", 0.0, -2.0, 2.0),
        "bias": by_id,
    }


def _developers_are_system(messages: Any) -> Any:
    """OpenAI's developer role is what these models know as system."""
    if not isinstance(messages, list):
        return messages
    return [{**m, "role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m for m in messages]


def _check_parts(body: dict[str, Any]) -> None:
    """Raise ``RefusedError`` for what the library takes inside of a field and does not heed."""
    told = "message.output_text.logprobs"
    if isinstance(include := body.get("include"), list) and told in include and body.get("top_logprobs") is None:
        raise RefusedError(f"include {told!r} needs top_logprobs, which says how many", param="include")
    wanted = body.get("output_config")
    if isinstance(wanted, dict) and (unknown := sorted(map(str, wanted.keys() - {"effort"}))):
        raise RefusedError(
            f"output_config.{unknown[0]} is not supported by this server; leave it out", param="output_config"
        )
    text = body.get("text")
    if isinstance(text, dict) and text.get("verbosity") not in (None, "medium"):
        raise RefusedError("text.verbosity is not supported by this server; leave it out", param="text")


def _effort(kind: str, body: dict[str, Any]) -> str | None:
    """The effort that the body itself asks for, None where it says nothing."""
    where = {"chat": body, "responses": body.get("reasoning"), "messages": body.get("output_config")}[kind]
    value = where.get("reasoning_effort" if kind == "chat" else "effort") if isinstance(where, dict) else None
    if value is not None and not isinstance(value, str):
        raise RefusedError(f"reasoning effort {value!r} must be a word", param="reasoning_effort")
    return value


def _any_tool(body: dict[str, Any]) -> bool:
    """Whether Anthropic's ``tool_choice`` demands a call of any tool, which the library takes for
    auto.
    """
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return False
    if choice.get("disable_parallel_tool_use"):
        raise RefusedError(
            "disable_parallel_tool_use is not supported by this server; leave it out", param="tool_choice"
        )
    if choice.get("type") == "any" and not body.get("tools"):
        raise RefusedError("tool_choice any needs tools", param="tool_choice")
    return choice.get("type") == "any"


def _constraint(asked: Any, served: Served, *, required: bool, thinking: bool) -> Constraint | None:
    if asked is None:
        return None
    return served.constraint("tool_call_required" if required else asked.kind, asked.schema, thinking=thinking)


def _prompt(conversation: Any, effort: str | None, served: Served, *, required: bool) -> list[Piece]:
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
        response_format=conversation.response_schema,
        texts=served.texts,
    )
    if required:
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
