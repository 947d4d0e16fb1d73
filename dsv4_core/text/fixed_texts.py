"""Long fixed texts of the chat format: the tools section, the response format, the effort texts.

They are data of a checkpoint, in its ``encoding/encoding_dsv4.py``. That file is read as data
(parsed, never run).
"""

from __future__ import annotations

import ast
import hashlib
import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dsv4_core.text.markers import DSML, THINK, THOUGHT, Piece, joined, scan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Profile = Literal["preview", "official"]
Effort = Literal["low", "high", "max"]

ENCODER = "encoding/encoding_dsv4.py"
_LARGEST = 1 << 20  # bytes of an encoder file that are read; the published ones have 28 kB

# sha256 of the two effort texts' UTF-8 bytes, final newlines included (model cards' revisions of
# April and July)
_ABSOLUTE = "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"
_BEYOND = "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c"
_EFFORTS: dict[Profile, dict[str, str | None]] = {  # level -> hash of its text, None: no text
    "preview": {"high": None, "max": _ABSOLUTE},
    "official": {"low": None, "high": _ABSOLUTE, "max": _BEYOND},
}


@dataclass(frozen=True)
class FixedTexts:
    """What a checkpoint's encoder writes besides the turns themselves.

    ``efforts``: the text that each level of effort puts before the first turn ("" where it puts
    none). ``tools`` and ``response_format`` have one gap each, for the tools' schemas (one JSON
    object a line) and for the format's schema. ``source`` says for people where all this was read.
    """

    profile: Profile
    source: str
    efforts: Mapping[str, str]
    default_effort: str | None
    tools: str = field(repr=False)
    response_format: str = field(repr=False)

    def tools_section(self, schemas: str) -> list[Piece]:
        """The section that tells the model of its tools; the schemas are words."""
        return _filled(self.tools, "tool_schemas", schemas)

    def response_section(self, schema: str) -> list[Piece]:
        """The section that asks for a reply by a schema; the schema is words."""
        return _filled(self.response_format, "schema", schema)


_CONTROL = {"dsml_token": DSML, "thinking_start_token": THINK, "thinking_end_token": THOUGHT}


def _filled(template: str, gap: str, words: str) -> list[Piece]:
    pieces: list[Piece] = []
    for text, name, _, _ in string.Formatter().parse(template):
        pieces += scan(text)
        if name == gap:
            pieces.append(Piece(words))
        elif name is not None:
            pieces.append(Piece(_CONTROL[name], control=True))
    return joined(pieces)


def read_encoder(model_dir: Path) -> FixedTexts | None:
    """Read the fixed texts from the checkpoint's encoder file; None where it has none.

    Raises ``ValueError`` where the file is not one of the two known encoders: naming what it lacks,
    or which text is not the published one.
    """
    path = model_dir / ENCODER
    if not path.is_file():
        return None
    advice = "copy the file again from the published checkpoint, or remove it and name --encoding-profile"
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"{path}: {size} bytes; an encoder file has less than {_LARGEST}; {advice}")
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: not UTF-8, or a null byte
        raise ValueError(f"{path}: not Python text ({error}); {advice}") from None
    found = dict(_assignments(body))
    levels = found.get("REASONING_EFFORT_PROMPTS")
    if isinstance(levels, dict):
        profile, default = "official", found.get("DEFAULT_REASONING_EFFORT")
        efforts: dict[str, Any] = levels
    elif "REASONING_EFFORT_MAX" in found:
        profile, default = "preview", None
        efforts = {"high": "", "max": found["REASONING_EFFORT_MAX"]}
    else:
        raise ValueError(
            f"{path}: neither REASONING_EFFORT_PROMPTS (official) nor REASONING_EFFORT_MAX (preview) is defined there; {advice}"
        )
    try:
        return checked(
            FixedTexts(
                profile=profile,  # type: ignore[arg-type]  # one of the two literals above
                source=str(path),
                efforts=efforts,
                default_effort=default,
                tools=found.get("TOOLS_TEMPLATE", ""),
                response_format=found.get("response_format_template", ""),
            )
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {advice}") from None


def _assignments(body: list[ast.stmt]) -> list[tuple[str, Any]]:
    """Names that a module gives constants at its top level, in order."""
    found = []
    for statement in body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        try:
            constant = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        found += [(target.id, constant) for target in targets if isinstance(target, ast.Name)]
    return found


def checked(texts: FixedTexts) -> FixedTexts:
    """Give texts that can be used; raise ``ValueError`` naming the one that cannot, and why."""
    expected = _EFFORTS[texts.profile]
    if set(texts.efforts) != set(expected):
        raise ValueError(
            f"the {texts.profile} encoder has the efforts {sorted(expected)}, this one {sorted(map(str, texts.efforts))}"
        )
    for level, digest in expected.items():
        text = texts.efforts[level]
        if not isinstance(text, str) or (hashlib.sha256(text.encode()).hexdigest() if text else None) != digest:
            raise ValueError(f"the text of effort {level!r} is not the published one of the {texts.profile} encoder")
    if texts.default_effort != ("low" if texts.profile == "official" else None):
        raise ValueError(f"the default effort is {texts.default_effort!r}; the {texts.profile} encoder's is not")
    for name, template, gap in (
        ("TOOLS_TEMPLATE", texts.tools, "tool_schemas"),
        ("response_format_template", texts.response_format, "schema"),
    ):
        try:
            parts = list(string.Formatter().parse(template))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} is not a template ({error})") from None
        gaps = [g for _, g, _, _ in parts if g is not None]
        plain = not any(spec or conversion for _, _, spec, conversion in parts)
        if gaps.count(gap) != 1 or set(gaps) - {gap, *_CONTROL} or not plain:
            raise ValueError(
                f"{name} must have one gap {{{gap}}}, and may have {sorted(_CONTROL)}; it has {sorted(gaps)}"
            )
    return texts


def library_texts(profile: Profile) -> FixedTexts:
    """The same texts as DeepSeek's library ``deepseek-recipe`` writes them, for a copy that lacks
    the encoder file.

    Raises ``ValueError`` where the library is not installed, or writes other texts than the
    published ones.
    """
    try:
        import deepseek_recipe as recipe
    except ImportError:
        raise ValueError(
            f"encoding profile {profile!r}: the texts come from DeepSeek's library; "
            "pip install 'deepseek-recipe>=0.2,<0.3' (it is part of dsv4[serve])"
        ) from None
    encoding = recipe.DeepseekV4Encoding()

    def written(**how: Any) -> str:
        conversation = recipe.Conversation([recipe.UserMessage("")], **how)
        prompt: str = encoding.render_conversation(conversation).prompt
        return prompt.removeprefix(recipe.SpecialToken.Bos.default_str()).partition("<｜User｜>")[0]

    tool = recipe.ToolDefinition("T", None, {})
    section = written(thinking_mode=False, tools=[tool]).removeprefix("\n\n")
    schema_line = next((line for line in section.splitlines() if line.startswith('{"name": "T"')), None)
    by_schema = written(thinking_mode=False, response_schema={"T": 1}).removeprefix("\n\n")
    if schema_line is None or by_schema.count('{"T": 1}') != 1:
        raise ValueError(
            f"deepseek-recipe {recipe.__version__} writes its sections in another way; install a version below 0.3"
        )
    absolute, beyond = (written(thinking_mode=True, reasoning_effort=level) for level in ("high", "max"))
    return checked(
        FixedTexts(
            profile=profile,
            source=f"deepseek-recipe {recipe.__version__}",
            efforts={"high": "", "max": absolute}
            if profile == "preview"
            else {"low": "", "high": absolute, "max": beyond},
            default_effort=None if profile == "preview" else "low",
            tools=_template(section, schema_line, "tool_schemas"),
            response_format=_template(by_schema, '{"T": 1}', "schema"),
        )
    )


def _template(text: str, filled: str, gap: str) -> str:
    before, _, after = text.partition(filled)
    return f"{_literal(before)}{{{gap}}}{_literal(after)}"


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def fixed_texts(model_dir: Path, profile: Profile | None = None) -> FixedTexts | None:
    """The texts that the checkpoint brings, else those of ``profile`` by the library; None where
    neither is there.

    Raises ``ValueError`` where the checkpoint brings the other profile's.
    """
    own = read_encoder(model_dir)
    if own is None:
        return library_texts(profile) if profile else None
    if profile not in {None, own.profile}:
        raise ValueError(
            f"--encoding-profile {profile}: the checkpoint's own encoder ({own.source}) is the {own.profile} one; leave the option out"
        )
    return own
