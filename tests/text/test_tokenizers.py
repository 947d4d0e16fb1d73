"""tokenizer.json: what could run away is refused by name, and a library that panics is no
traceback.
"""

import json

import pytest

from dsv4_core.checkpoint.weights import embedded
from dsv4_core.files.reading import FileError
from dsv4_core.files.tokenizers import backtracks, safe
from dsv4_core.text.tokenizer import Vocabulary, load_tokenizer

PUBLISHED = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}",
    "(ab)+",
]


def tokenizer(folder, expression):
    made = json.loads((embedded() / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    end = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, end]}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize("expression", [*PUBLISHED, "", "(", ")", "[", "\\", "[[:alpha:]]+"])
def test_expressions_that_end(expression):
    assert not backtracks(expression)


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("(a+)+b", "repeats a group that itself repeats"),
        ("(a|a)*b", "or chooses"),
        ("((a*))*", "repeats a group"),
        ("(?:a{2,})+", "repeats a group"),
        (r"(?:[a-z\]]+\.)*x", "repeats a group"),
        ("(a|b){2,9}", "repeats a group"),
        (r"(a*)\1b", "refers to a group"),
        (r"(?<x>a\g<x>)", "refers to a group"),
    ],
)
def test_expressions_that_may_not_end_are_refused(expression, why, tmp_path):
    assert why in backtracks(expression)
    with pytest.raises(FileError, match=r"tokenizer.json: pre_tokenizer Split: .* it would take forever"):
        safe(tokenizer(tmp_path, expression) / "tokenizer.json")


def test_a_library_that_panics_is_a_sentence(tmp_path, monkeypatch):
    """Its own limit on backtracking ends in a panic, which is no ``Exception``."""
    monkeypatch.setattr("dsv4_core.files.tokenizers.backtracks", lambda _: "")
    found = load_tokenizer(tokenizer(tmp_path, "(a+)+b"))
    assert found is not None
    with pytest.raises(ValueError, match=r"cannot encode: 'aaaa.*retry-limit"):
        Vocabulary(found).words("a" * 40)


def test_bytes_that_are_no_utf8_are_named_wherever_they_stand(tmp_path):
    """The form's reader skips what a key of no interest holds, and does not look at its bytes."""
    file = tokenizer(tmp_path, "a") / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'{"version": "', b'{"other": "\x8e\xed", "version": "', 1))
    assert b"\x8e\xed" in file.read_bytes()
    with pytest.raises(FileError, match=r"tokenizer.json: not UTF-8 text"):
        safe(file)
