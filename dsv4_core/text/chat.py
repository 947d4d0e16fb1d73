"""A conversation as a prompt: the published encoding of turns, tools, reasoning and effort, as
pieces.

Rules: the ``encoding_dsv4.py`` that comes with the checkpoints. Words of users, tools and the model
are never searched for control tokens.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypedDict

from dsv4_core.text.markers import (
    ASSISTANT,
    BEGIN,
    DSML,
    END,
    REMINDER,
    TASKS,
    THINK,
    THOUGHT,
    USER,
    Piece,
    joined,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dsv4_core.text.fixed_texts import FixedTexts


class Message(TypedDict, total=False):
    """One turn. ``role``: system, user, developer, assistant, tool or latest_reminder; ``content``:
    its words.

    ``content`` may be a list of ``{"type": "text", "text": ...}``, which are joined by an empty
    line. Of an assistant: ``reasoning_content``, ``tool_calls`` (in the form of OpenAI), ``wo_eos``
    (the turn goes on: no end of sentence). Of a tool: ``tool_call_id``. Of system and developer:
    ``tools`` (OpenAI's form), ``response_format`` (a JSON schema). Of user and developer: ``task``,
    one of six short tasks instead of a reply. ``mask`` is a mark for training.
    """

    role: str
    content: str | list[dict[str, Any]] | None
    reasoning_content: str | None
    tool_calls: list[dict[str, Any]] | None
    tool_call_id: str | None
    wo_eos: bool
    tools: list[dict[str, Any]] | None
    response_format: Any
    task: str | None
    mask: int


_MAY_HAVE = {  # beside role, content and mask
    "system": {"tools", "response_format"},
    "user": {"task"},
    "developer": {"tools", "response_format", "task"},
    "assistant": {"reasoning_content", "tool_calls", "wo_eos"},
    "tool": {"tool_call_id"},
    "latest_reminder": set(),
}


class _Turn:
    """A checked turn: ``blocks`` are a user's words (control False) and tool results, with the ids
    of their calls.
    """

    def __init__(self, at: int, message: Mapping[str, Any]) -> None:
        role = message.get("role")
        if not isinstance(role, str) or role not in _MAY_HAVE:
            raise ValueError(f"message {at} has role {role!r}; roles are {', '.join(_MAY_HAVE)}")
        given = {key for key, value in message.items() if value is not None}
        if extra := given - _MAY_HAVE[role] - {"role", "content", "mask"}:
            takes = ", ".join(sorted(_MAY_HAVE[role])) or "nothing"
            raise ValueError(
                f"message {at} (role {role}) has {', '.join(sorted(map(repr, extra)))}; beside content it may have {takes}"
            )
        where = f"message {at} (role {role})"
        self.role: str = role
        self.content = _words(where, message.get("content"))
        self.reasoning = _words(f"{where}: reasoning_content", message.get("reasoning_content"))
        self.calls = [_call(f"{where}: tool_calls[{i}]", c) for i, c in enumerate(message.get("tool_calls") or ())]
        self.open = bool(message.get("wo_eos"))
        self.tools = [_schema(f"{where}: tools[{i}]", tool) for i, tool in enumerate(message.get("tools") or ())]
        self.response_format = message.get("response_format")
        self.task: str | None = message.get("task")
        self.blocks: list[tuple[str | None, str]] = []  # (id of the call or None, text)
        if role in {"user", "tool"}:
            result = f"<tool_result>{self.content}</tool_result>"
            self.blocks = [(message.get("tool_call_id") or "", result) if role == "tool" else (None, self.content)]
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"{where}: task {self.task!r}; tasks are {', '.join(TASKS)}")
        if role in {"developer", "latest_reminder"} and not self.content:
            raise ValueError(f"{where} is empty; it must have content")


def _words(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, list):
        parts = []
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f'{where}: content[{i}] is of type {kind!r}; only {{"type": "text", "text": ...}} can be encoded'
                )
            parts.append(part["text"])
        content = "\n\n".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content is {type(content).__name__}; it must be a string or a list of text parts")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start} is U+{ord(content[error.start]):04X}, half of a surrogate pair; send whole characters"
        ) from None
    return content


def _call(where: str, call: Any) -> tuple[str, str, dict[str, Any]]:
    """Id, name and arguments of a tool call; arguments that are no JSON object stay one string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where}: it must be {{"id": ..., "function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        try:
            values = json.loads(arguments)
        except (ValueError, RecursionError):
            values = None
        arguments = values if isinstance(values, dict) else {"arguments": arguments}
    if not isinstance(arguments, dict):
        raise ValueError(f"{where}: arguments are {type(arguments).__name__}; they must be a JSON object or its text")
    return str(call.get("id") or function.get("id") or ""), function["name"], arguments


def _schema(where: str, tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where}: it must be {{"type": "function", "function": {{"name": ..., ...}}}}')
    return _json(function)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def encode(
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    effort: str | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    response_format: Any = None,
    drop_reasoning: bool = True,
    context: Sequence[Message] = (),
    texts: FixedTexts | None = None,
) -> list[Piece]:
    """Write ``messages`` as a prompt; where the last turn is a user's, the reply is opened.

    ``thinking``: the reply begins with reasoning. ``effort`` (thinking only): a level of ``texts``'
    profile; None is the encoder's default. ``tools`` and ``response_format`` (a JSON schema) go
    into the leading system turn. ``drop_reasoning``: of replies before the last user's turn; where
    any turn has tools, nothing is dropped. ``context``: turns before these, already encoded.
    ``texts``: the checkpoint's fixed texts.

    Raises ``ValueError`` naming the message, what is wrong with it and what may stand there; and
    where tools, a response format or an effort are asked for and the checkpoint has no ``texts``
    for them.
    """
    prefix = _effort_text(effort, texts, thinking=thinking)
    turns = list(messages)
    if tools or response_format is not None:
        turns = _on_system_turn(turns, tools, response_format)
    old = [_Turn(i, m) for i, m in enumerate(context)]
    new = [_Turn(i, m) for i, m in enumerate(turns)]
    if not new:
        raise ValueError("chat: no messages; a conversation has at least one turn")
    before, after = _merged(old), _merged(new)
    everything = _in_call_order(before + after)
    keep = not drop_reasoning or any(turn.tools for turn in everything)
    shown = len(after)
    if thinking and not keep:
        everything, before = _without_old_developers(everything), _without_old_developers(before)
        shown = len(everything) - len(before)
    pieces = [] if old else [Piece(BEGIN, control=True)]
    first = len(everything) - shown
    last_user = max((i for i, turn in enumerate(everything) if turn.role in {"user", "developer"}), default=-1)
    for i in range(first, len(everything)):
        turn, previous = everything[i], everything[i - 1] if i else None
        if i == 0:
            pieces.append(Piece(prefix))
        pieces += _opening(turn, texts)
        if turn.role == "assistant":
            if thinking and (keep or i > last_user) and not (previous and previous.task):
                pieces += [Piece(turn.reasoning), Piece(THOUGHT, control=True)]
            pieces += [Piece(turn.content), *_calls(turn)]
            if not turn.open:
                pieces.append(Piece(END, control=True))
        following = everything[i + 1].role if i + 1 < len(everything) else "assistant"
        if following in {"assistant", "latest_reminder"}:
            pieces += _reply_opening(turn, thinks=thinking and (keep or i >= last_user), thinking=thinking)
    return joined(pieces)


def _effort_text(effort: str | None, texts: FixedTexts | None, *, thinking: bool) -> str:
    if effort is None:
        default = texts.default_effort if texts else None
        return texts.efforts[default] if texts and default and thinking else ""
    if texts is None:
        raise ValueError(f"reasoning effort {effort!r}: {_NO_TEXTS}")
    if effort not in texts.efforts:
        raise ValueError(
            f"reasoning effort {effort!r}; this checkpoint's encoder ({texts.profile}) has {', '.join(texts.efforts)}"
        )
    if not thinking:
        raise ValueError(f"reasoning effort {effort!r} without thinking: ask for thinking, or leave the effort out")
    return texts.efforts[effort]


_NO_TEXTS = (
    "its text is in the checkpoint's encoding/encoding_dsv4.py, which this copy lacks; "
    "copy that file, or name --encoding-profile (preview for the releases of April, official for those from July on)"
)


def _on_system_turn(
    messages: list[Message], tools: Sequence[dict[str, Any]] | None, response_format: Any
) -> list[Message]:
    turns = list(messages)
    if not turns or turns[0].get("role") != "system":
        turns.insert(0, {"role": "system", "content": ""})
    first = turns[0]
    for key, value in (("tools", tools), ("response_format", response_format)):
        if value is not None and first.get(key) is not None:
            raise ValueError(f"{key} are given with the request and with message 0; give them once")
    turns[0] = {**first, **({"tools": list(tools)} if tools else {})}
    if response_format is not None:
        turns[0]["response_format"] = response_format
    return turns


def _merged(turns: list[_Turn]) -> list[_Turn]:
    """Tool turns become blocks of the user's turn before them, and a user's turn those of an
    earlier one without task.
    """
    result: list[_Turn] = []
    for turn in turns:
        last = result[-1] if result and result[-1].role == "user" else None
        if turn.role == "tool":
            turn.role = "user"
            if last:
                last.blocks += turn.blocks
                continue
        elif turn.role == "user" and last and last.task is None:
            last.blocks += turn.blocks  # as published, a task of the later turn is not kept
            continue
        result.append(turn)
    return result


def _in_call_order(turns: list[_Turn]) -> list[_Turn]:
    """Sort every turn's tool results by the order of the calls before it; one whose call is unknown
    counts as first.
    """
    order: dict[str, int] = {}
    for turn in turns:
        if turn.calls:
            order = {name: i for i, (name, _, _) in enumerate(turn.calls) if name}
        results = [block for block in turn.blocks if block[0] is not None]
        if len(results) > 1 and order:
            ordered = iter(sorted(results, key=lambda block: order.get(block[0] or "", 0)))
            turn.blocks = [block if block[0] is None else next(ordered) for block in turn.blocks]
    return turns


def _without_old_developers(turns: list[_Turn]) -> list[_Turn]:
    last = max((i for i, turn in enumerate(turns) if turn.role in {"user", "developer"}), default=-1)
    return [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last]


def _opening(turn: _Turn, texts: FixedTexts | None) -> list[Piece]:
    """A turn's marker and words, with its tools and response format (an assistant's words follow
    its reasoning).
    """
    if turn.role == "assistant":
        return []
    if turn.role == "latest_reminder":
        return [Piece(REMINDER, control=True), Piece(turn.content)]
    pieces = [] if turn.role == "system" else [Piece(USER, control=True)]
    pieces.append(Piece("\n\n".join(text for _, text in turn.blocks) if turn.role == "user" else turn.content))
    if turn.tools:
        if texts is None:
            raise ValueError(f"tools: {_NO_TEXTS}")
        pieces += [Piece("\n\n"), *texts.tools_section("\n".join(turn.tools))]
    if turn.response_format:
        if texts is None:
            raise ValueError(f"response_format: {_NO_TEXTS}")
        pieces += [Piece("\n\n"), *texts.response_section(_json(turn.response_format))]
    return pieces


def _calls(turn: _Turn) -> list[Piece]:
    if not turn.calls:
        return []
    dsml = Piece(DSML, control=True)
    pieces = [Piece("\n\n<"), dsml, Piece("tool_calls>\n")]
    for i, (_, name, arguments) in enumerate(turn.calls):
        pieces += [Piece("\n<" if i else "<"), dsml, Piece(f'invoke name="{name}">\n')]
        for j, (key, value) in enumerate(arguments.items()):
            text = isinstance(value, str)
            pieces += [Piece("\n<" if j else "<"), dsml]
            pieces.append(Piece(f'parameter name="{key}" string="{"true" if text else "false"}">'))
            pieces += [Piece(value if text else _json(value)), Piece("</"), dsml, Piece("parameter>")]
        pieces += [Piece("\n</"), dsml, Piece("invoke>")]
    return [*pieces, Piece("\n</"), dsml, Piece("tool_calls>")]


def _reply_opening(turn: _Turn, *, thinks: bool, thinking: bool) -> list[Piece]:
    if turn.task is not None and turn.task != "action":
        return [Piece(TASKS[turn.task], control=True)]
    if turn.role not in {"user", "developer"}:
        return []
    thinks = thinking if turn.task else thinks
    pieces = [Piece(ASSISTANT, control=True), Piece(THINK if thinks else THOUGHT, control=True)]
    return [*pieces, Piece(TASKS[turn.task], control=True)] if turn.task else pieces
