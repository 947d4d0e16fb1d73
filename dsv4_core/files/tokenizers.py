"""tokenizer.json held to what a byte-level tokenizer needs, before the tokenizers library builds
anything of it.

The library runs what the file says: a chain of replacements that multiplies text a thousandfold
takes all memory, and some damaged parts make it panic. Kinds that can do so are refused by name,
and so are regular expressions that may backtrack without end; the published tokenizers use none of
them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from dsv4_core.files.forms import Form, Id, Text
from dsv4_core.files.reading import FileError, json_text, text
from dsv4_core.files.words import one_line

if TYPE_CHECKING:
    from pathlib import Path

MOST = 64 << 20  # bytes of tokenizer.json; the published one has under 10 MB
SAFE = {
    "normalizer": ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend"),
    "pre_tokenizer": ("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Metaspace"),
    "post_processor": ("ByteLevel", "TemplateProcessing"),
    "decoder": ("ByteLevel", "ByteFallback", "Fuse", "Strip", "Metaspace", "BPEDecoder"),
}
_CHAIN = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
LONGEST = 16  # parts of a chain
PATTERN = 4096  # characters of a regular expression
ADVICE = "copy it again from the published checkpoint, or use token ids"


class Model(Form):
    """The table: byte-pair encoding alone."""

    type: str
    vocab: dict[str, Id]
    merges: list[Any]


class Added(Form):
    """A special token."""

    id: Id
    content: Annotated[str, Meta(min_length=1, max_length=512)]


class Tokenizer(Form):
    """``tokenizer.json``."""

    model: Model
    added_tokens: Annotated[list[Added], Meta(max_length=1 << 16)] = msgspec.field(default_factory=list)
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


class GenerationConfig(Form):
    """``generation_config.json``, as far as it is read."""

    temperature: Annotated[float, Meta(ge=0, le=1e4)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    eos_token_id: Id | list[Id] | None = None
    bos_token_id: Id | None = None
    do_sample: bool | None = None
    transformers_version: Text | None = None


def safe(path: Path) -> str:
    """Read ``path`` and give its text where nothing in it can run away; raise ``FileError`` naming
    what could.
    """
    words = text(path, MOST)
    form = json_text(words, Tokenizer, f"{path}", ADVICE)
    if form.model.type != "BPE":
        raise FileError(
            f"{path}: model.type = {form.model.type!r} must be 'BPE', as the published models' is; {ADVICE}"
        )
    for part in SAFE:
        _hold(getattr(form, part), part, f"{path}")
    return words


def _hold(value: Any, part: str, name: str, depth: int = 0) -> None:
    if value is None:
        return
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "Sequence" and depth == 0:
        chain = value.get(_CHAIN[part])
        if not isinstance(chain, list) or len(chain) > LONGEST:
            raise FileError(f"{name}: {part} must be a chain of at most {LONGEST} parts; {ADVICE}")
        for each in chain:
            _hold(each, part, name, 1)
        return
    if kind not in SAFE[part]:
        raise FileError(f"{name}: {part} of kind {kind!r} is not built, only {', '.join(SAFE[part])}; {ADVICE}")
    pattern = value.get("pattern")
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(expression, str) and (why := backtracks(expression)):
        raise FileError(
            f"{name}: {part} {kind}: {one_line(expression, 80)} {why}: on some texts it would take forever; {ADVICE}"
        )
    if len(msgspec.json.encode(value)) > PATTERN:
        raise FileError(f"{name}: {part} {kind} has over {PATTERN} bytes; {ADVICE}")


def backtracks(expression: str) -> str:
    """Say why a regular expression may take time that grows exponentially with the text; nothing
    where it cannot.

    It cannot without a repeated group that itself repeats or chooses, a reference to what a group
    found, or a recursion. No published tokenizer has one.
    """
    groups = [False]  # of each that is open: whether it holds a repetition or a choice
    at = 0
    while at < len(expression):
        found = _PART.match(expression, at)
        assert found is not None
        at, part = found.end(), found[0]
        if found["reference"]:
            return f"refers to a group ({part})"
        if part == "(":
            groups.append(False)
        elif part == ")" and len(groups) > 1:
            inner = groups.pop()
            if inner and _REPEATED.match(expression, at):
                return "repeats a group that itself repeats or chooses"
            groups[-1] |= inner
        elif part in "+*{|":
            groups[-1] = True
    return ""


_REPEATED = re.compile(r"[+*{]")
_PART = re.compile(r"(?P<reference>\\[1-9]|\\[kg][<'{])|\\.|\[(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|.", re.DOTALL)
