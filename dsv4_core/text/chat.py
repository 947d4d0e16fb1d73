"""Turns of a conversation as one prompt, in the published chat and thinking modes. Tool calls are not encoded yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, THOUGHT = "<think>", "</think>"


class _Turn(TypedDict):
    role: str
    content: str


class Message(_Turn, total=False):
    """One turn: ``role`` is system, user or assistant; an assistant's may carry its ``reasoning_content``."""

    reasoning_content: str


def encode(messages: Sequence[Message], *, thinking: bool = False) -> str:
    """Write a conversation as a prompt; where the last turn is a user's, the assistant's is opened.

    ``thinking`` opens it with ``<think>`` instead of ``</think>``. Reasoning is kept only after the last user turn; of
    earlier turns only the reply is. Raises ``ValueError`` for another role, or for a system turn that is not the first.
    """
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    text = BEGIN
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system" and i == 0:
            text += content
        elif role == "user":
            text += f"{USER}{content}{ASSISTANT}"
            if i == len(messages) - 1:
                text += THINK if thinking else THOUGHT
        elif role == "assistant" and i > 0 and messages[i - 1]["role"] == "user":
            reasoning = message.get("reasoning_content", "")
            text += (f"{THINK}{reasoning}{THOUGHT}" if reasoning and i > last_user else THOUGHT) + content + END
        else:
            raise ValueError(
                f"chat: message {i} has role {role!r} here; a conversation is an optional system turn, then user and assistant in turns"
            )
    return text
