"""What a reply must keep to: a JSON schema, a regular expression, calls of given tools. By
llguidance.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.numpy as bitmask
import numpy as np

from dsv4_core.text.markers import DSML, THOUGHT
from dsv4_serve.refusal import RefusedError

if TYPE_CHECKING:
    from dsv4_core.contract.dtypes import Host

_TEXT = r"/(.|\n)*/"
_VALUE = r"/([^<]|<[^\/])*<\//"  # a string argument and the beginning of its closing tag, which it cannot contain


class Grammars:
    """Makes constraints for one vocabulary."""

    def __init__(self, tokenizer_json: str, vocab_size: int, ends: frozenset[int]) -> None:
        """Read a tokenizer.json of ``vocab_size`` ids; each of ``ends`` may end a reply that is
        complete.
        """
        self._tokens = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=min(ends))
        self._ids = {a["content"]: a["id"] for a in json.loads(tokenizer_json)["added_tokens"]}

    def constraint(self, kind: str, schema: str, *, thinking: bool) -> Grammar:
        """``kind``: json, regex, tool_call (text, then calls or none) or tool_call_required (calls
        alone, which the prompt opened where the model does not think first).

        Raises ``RefusedError`` for a schema that cannot be enforced, saying why.
        """
        rules = ["start: reply"]
        if thinking:
            rules = [f"start: THOUGHT <[{self._ids[THOUGHT]}]> reply", f"THOUGHT: {_TEXT}"]
        if kind == "json":
            value = json.loads(schema) if schema else {"type": "object"}  # OpenAI's json_object
            rules += ["reply: SPACE value", r"SPACE: /\n?\n?/", f"value: %json {_compact(value)}"]
        elif kind == "regex":
            rules += [f"reply: /{schema.replace('/', chr(92) + '/')}/"]
        elif kind in {"tool_call", "tool_call_required"}:
            rules += self._calls(json.loads(schema), required=kind == "tool_call_required", opened=not thinking)
        else:
            raise RefusedError(f"a reply kept to {kind!r} is not supported by this server")
        matcher = llguidance.LLMatcher(self._tokens, llguidance.LLMatcher.grammar_from_lark("\n".join(rules)))
        if error := matcher.get_error():
            raise RefusedError(f"the schema cannot be enforced: {error.splitlines()[0]}")
        return Grammar(matcher, self._tokens.vocab_size)

    def _calls(self, tools: list[dict[str, Any]], *, required: bool, opened: bool) -> list[str]:
        mark = f"<[{self._ids[DSML]}]>"
        rules = [f'calls: invoke+ "</" {mark} "tool_calls>"']
        if required:
            rules.append("reply: calls" if opened else f'reply: "\\n\\n<" {mark} "tool_calls>\\n" calls')
        else:
            rules += [f'reply: TEXT | BEFORE {mark} "tool_calls>\\n" calls', f"TEXT: {_TEXT}", r"BEFORE: /(.|\n)*</"]
        rules.append("invoke: " + " | ".join(f"invoke{i}" for i in range(len(tools))))
        for i, tool in enumerate(tools):
            function = tool["function"]
            schema = function.get("parameters") or {"type": "object", "properties": {}}
            parts = [f'"<" {mark} {json.dumps("invoke name=" + chr(34) + function["name"] + chr(34) + ">" + chr(10))}']
            for j, (key, value) in enumerate((schema.get("properties") or {}).items()):
                text = (
                    isinstance(value, dict)
                    and value.get("type") == "string"
                    and "enum" not in value
                    and "const" not in value
                )
                opening = json.dumps(f'parameter name="{key}" string="{"true" if text else "false"}">')
                if not text:
                    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
                    whole = {**value, **shared} if isinstance(value, dict) else value
                    rules.append(f"value{i}x{j}: %json {_compact(whole)}")
                written = "STRING" if text else f'value{i}x{j} "</"'
                one = f'"<" {mark} {opening} {written} {mark} "parameter>\\n"'
                parts.append(one if key in schema.get("required", ()) else f"({one})?")
            rules.append(f"invoke{i}: {' '.join(parts)} " + f'"</" {mark} "invoke>\\n"')
        return [*rules, f"STRING: {_VALUE}"]


def _compact(schema: Any) -> str:
    """A schema whose values have no more white space than ``json.dumps`` writes: a model cannot go
    on with it for ever.
    """
    return json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}} if isinstance(schema, dict) else schema)


class Grammar:
    """A grammar and how far a reply has come in it. ``asked``: of which another
    rank makes it.
    """

    asked: Any = None

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher, self._mask = matcher, bitmask.allocate_token_bitmask(1, vocab_size)

    def free(self) -> int:
        """None of the next tokens may be just any."""
        return 0

    def allowed(self) -> Host:
        """Bits of the ids that may come next."""
        bitmask.fill_next_token_bitmask(self._matcher, self._mask, 0)
        return np.array(self._mask[0])

    def accept(self, token: int) -> None:
        """Note that the token was chosen."""
        self._matcher.consume_token(token)
