"""A completion back to reasoning, content and tool calls: whole, or piece by piece as it is
generated.

Markup is what the control token ``DSML`` opens; the same characters spelt by the model are words.
Completions that are not as published are read as far as they go, and what was wrong with them is
noted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dsv4_core.text.markers import DSML, END, THINK, THOUGHT, Piece, scan

if TYPE_CHECKING:
    from collections.abc import Iterable

_INVOKE = re.compile(r'invoke name="(.*?)">', re.DOTALL)
_PARAMETER = re.compile(r'parameter name="(.*?)"(?: string="(true|false)")?>', re.DOTALL)
_HELD = re.compile(r"(?:\n{1,2}|\n{0,2}</?)\Z")  # may stand before markup


class Delta(NamedTuple):
    """A bit of the reply. ``call`` names the tool of the call number ``call``; ``arguments`` is a
    bit of its JSON text; ``called`` says that the call is complete.
    """

    kind: Literal["reasoning", "content", "call", "arguments", "called"]
    text: str = ""
    call: int = 0


@dataclass
class Call:
    """A tool call. ``arguments``: JSON text of an object, cut short where not ``complete``."""

    name: str
    arguments: str = ""
    complete: bool = False


@dataclass
class Reply:
    """What an assistant's turn says. ``faults``: how the completion differs from the published
    form, each kind once.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    ended: bool = False
    faults: list[str] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Put one more bit in its place."""
        if delta.kind == "reasoning":
            self.reasoning += delta.text
        elif delta.kind == "content":
            self.content += delta.text
        elif delta.kind == "call":
            self.calls.append(Call(delta.text))
        elif delta.kind == "arguments":
            self.calls[delta.call].arguments += delta.text
        else:
            self.calls[delta.call].complete = True

    def message(self) -> dict[str, Any]:
        """The turn as a message that ``encode`` takes."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning}
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class CompletionParser:
    """Pieces of a completion in, bits of the reply out. ``thinking``: the prompt opened the
    reasoning.

    The same pieces give the same reply however their words are cut. Nothing that may yet turn out
    to be markup is given out.
    """

    def __init__(self, *, thinking: bool) -> None:
        self.reply = Reply()
        self._out: list[Delta] = []
        self._state: Literal["reasoning", "content", "calls", "call", "value"] = "reasoning" if thinking else "content"
        self._text = ""  # words that are not given out yet
        self._tag: str | None = None  # "<" or "</": inside a tag, whose words so far are in _text
        self._before = ""  # what stood before the tag, in case that it is none
        self._string: str | None = None  # of the parameter that is being read
        self._parameters: set[str] = set()

    def push(self, piece: Piece) -> list[Delta]:
        """Add words or a control token; give what is certain now."""
        if self.reply.ended:
            self._fault("words after the end")
        elif piece.control:
            self._control(piece.text)
        else:
            self._text += piece.text
            self._words()
        return self._given()

    def finish(self) -> list[Delta]:
        """Give what was held back: the completion is over, by an end of sentence or without one."""
        if self._tag is not None:
            self._literal()
        if self._state in {"reasoning", "content"}:
            self._emit(self._text)
        elif self._state in {"value", "call"}:
            if self._state == "value" and self._string != "true":
                self._out.append(Delta("arguments", self._text, self._index))
            else:
                self._emit(self._text)
            self._fault("cut inside a call")
        elif self._state == "calls":
            self._fault("calls are not closed")
        self._text, self._state = "", "content"
        return self._given()

    def _given(self) -> list[Delta]:
        out, self._out = self._out, []
        for delta in out:
            self.reply.add(delta)
        return out

    def _fault(self, what: str) -> None:
        if what not in self.reply.faults:
            self.reply.faults.append(what)

    @property
    def _index(self) -> int:
        return len(self.reply.calls) + sum(delta.kind == "call" for delta in self._out) - 1

    def _emit(self, text: str) -> None:
        """Give words out, as what the state says they are."""
        if not text:
            return
        if self._state == "value":
            if self._string == "true":
                self._out.append(Delta("arguments", json.dumps(text, ensure_ascii=False)[1:-1], self._index))
        elif self._state in {"reasoning", "content"}:
            self._out.append(Delta("reasoning" if self._state == "reasoning" else "content", text))
        elif text.strip():
            self._fault("words between calls")

    def _literal(self) -> None:
        """What looked like a tag is words."""
        self._text, self._tag, self._before = f"{self._before}{self._tag}{DSML}{self._text}", None, ""

    def _control(self, token: str) -> None:
        if self._tag is not None:
            self._literal()
        if token == END:
            self.reply.ended = True
            return
        if token == DSML:
            opening = re.search(r"</?\Z", self._text)
            if opening:
                self._tag, self._before, self._text = opening[0], self._text[: opening.start()], ""
            else:
                self._text += token
                self._words()
        elif self._state == "value":
            self._text += token
            self._words()
        elif token == THOUGHT and self._state == "reasoning":
            self._emit(self._text)
            self._text, self._state = "", "content"
        elif token == THINK and self._state == "reasoning" and not self._text and not self.reply.reasoning:
            self._fault("reasoning opened twice")
        else:
            self._fault(f"control token {token} in the reply")

    def _words(self) -> None:
        """Read the words at hand as far as they are certain."""
        while self._tag is not None:
            if not self._read_tag():
                return
        if self._state == "value" and self._string != "true":
            return  # kept whole until its end, where it must be JSON
        held = _HELD.search(self._text) if self._state != "value" else re.search(r"</?\Z", self._text)
        kept = len(held[0]) if held else 0
        self._emit(self._text[: len(self._text) - kept])
        self._text = self._text[len(self._text) - kept :]

    def _read_tag(self) -> bool:
        """Read the tag at hand; False where its words may go on."""
        closing, text, state = self._tag == "</", self._text, self._state
        if state == "value":
            if closing and text.startswith("parameter>"):
                self._take(len("parameter>"))
                self._end_value()
                return True
            if closing and "parameter>".startswith(text):
                return False
        elif closing:
            for name in ("invoke>", "tool_calls>"):
                if text.startswith(name):
                    self._take(len(name))
                    self._close(name)
                    return True
                if name.startswith(text):
                    return False
        else:
            if text.startswith("tool_calls>"):
                self._take(len("tool_calls>"))
                self._open_calls()
                return True
            if match := _INVOKE.match(text):
                self._take(match.end())
                self._open_call(match[1])
                return True
            if state == "call" and (match := _PARAMETER.match(text)):
                self._take(match.end())
                self._open_value(match[1], match[2])
                return True
            tags = (
                ("tool_calls>", 'invoke name="', 'parameter name="')
                if state == "call"
                else ("tool_calls>", 'invoke name="')
            )
            if any(tag.startswith(text) or (text.startswith(tag) and tag.endswith('"')) for tag in tags):
                return False
        self._literal()
        return True

    def _take(self, count: int) -> None:
        """A tag was read: what stood before it is certain, except for the empty line that belongs
        to the calls.
        """
        before = self._before
        if self._state in {"reasoning", "content"}:
            before = before.removesuffix("\n\n") if self._tag == "<" else before
        if self._state != "value":
            self._emit(before)
            self._before = ""
        self._text, self._tag = self._text[count:], None

    def _open_calls(self) -> None:
        if self._state == "call":
            self._end_call("a call is not closed")
        if self._state == "reasoning":
            self._fault("reasoning is not closed")
        self._state = "calls"

    def _open_call(self, name: str) -> None:
        if self._state == "call":
            self._end_call("a call is not closed")
        elif self._state != "calls":
            self._fault("calls are not opened")
        self._state, self._parameters = "call", set()
        self._out.append(Delta("call", name, self._index + 1))

    def _open_value(self, name: str, string: str | None) -> None:
        if string is None:
            self._fault(f"parameter {name!r} does not say whether it is a string")
        lead = ", " if self._parameters else "{"
        if name in self._parameters:
            self._fault(f"parameter {name!r} twice")
        self._parameters.add(name)
        self._state, self._string = "value", string or "false"
        opening = '"' if self._string == "true" else ""
        self._out.append(Delta("arguments", f"{lead}{json.dumps(name, ensure_ascii=False)}: {opening}", self._index))

    def _end_value(self) -> None:
        value, self._before = self._before, ""
        if self._string == "true":
            self._emit(value)
            self._out.append(Delta("arguments", '"', self._index))
        else:
            self._out.append(Delta("arguments", self._as_json(value), self._index))
        self._state = "call"

    def _as_json(self, value: str) -> str:
        try:
            json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError):
            self._fault("a value is not JSON")
            return json.dumps(value, ensure_ascii=False)
        return value

    def _end_call(self, fault: str | None = None) -> None:
        if fault:
            self._fault(fault)
        self._out.append(Delta("arguments", "}" if self._parameters else "{}", self._index))
        self._out.append(Delta("called", call=self._index))
        self._state = "calls"

    def _close(self, name: str) -> None:
        if name == "invoke>":
            if self._state == "call":
                self._end_call()
            else:
                self._fault("a call is closed that was not opened")
            return
        if self._state == "call":
            self._end_call("a call is not closed")
        if self._state != "calls":
            self._fault("calls are closed that were not opened")
        else:
            self._state = "content"


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def parse(completion: str | Iterable[Piece], *, thinking: bool) -> Reply:
    """Read a whole completion. A string is trusted text: a control token that is spelt in it is
    one.
    """
    parser = CompletionParser(thinking=thinking)
    for piece in scan(completion) if isinstance(completion, str) else completion:
        parser.push(piece)
    parser.finish()
    return parser.reply
