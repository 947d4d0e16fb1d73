"""Fixed texts: read from an encoder file without running it, checked, or refused by name."""

import pytest

from dsv4_core.text.fixed_texts import ENCODER, FixedTexts, checked, fixed_texts, library_texts, read_encoder

TEMPLATES = {
    "TOOLS_TEMPLATE": "Use <{dsml_token}tool_calls> in {thinking_end_token}:\n{tool_schemas}\n{{}}",
    "response_format_template": "Reply by {schema}",
}


@pytest.fixture(scope="module", params=["preview", "official"])
def published(request):
    pytest.importorskip("deepseek_recipe")
    return library_texts(request.param)


def encoder(texts, **changed):
    """A file in the published form, with the published effort texts and our own sections."""
    if texts.profile == "preview":
        names = {"REASONING_EFFORT_MAX": texts.efforts["max"]}
    else:
        names = {"REASONING_EFFORT_PROMPTS": dict(texts.efforts), "DEFAULT_REASONING_EFFORT": "low"}
    names = {k: v for k, v in {**TEMPLATES, **names, **changed}.items() if v is not None}
    lines = [f"{name}: object = {value!r}" for name, value in names.items()]
    return "import os\nraise SystemExit('an encoder file is data')\nx = y = os.sep + 'no constant'\n" + "\n".join(lines)


def placed(directory, text):
    (directory / ENCODER).parent.mkdir(exist_ok=True)
    (directory / ENCODER).write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


def test_the_checkpoints_own_texts_are_read(published, tmp_path):
    texts = fixed_texts(placed(tmp_path, encoder(published)))
    assert (texts.profile, texts.efforts, texts.default_effort) == (
        published.profile,
        published.efforts,
        published.default_effort,
    )
    section = texts.tools_section('{"a": "{schema} ｜DSML｜"}')
    assert [(p.text, p.control) for p in section] == [
        ("Use <", False),
        ("｜DSML｜", True),
        ("tool_calls> in ", False),
        ("</think>", True),
        (':\n{"a": "{schema} ｜DSML｜"}\n{}', False),
    ]
    assert fixed_texts(tmp_path, published.profile) == texts
    other = "official" if published.profile == "preview" else "preview"
    with pytest.raises(ValueError, match=f"--encoding-profile {other}: .* is the {published.profile} one"):
        fixed_texts(tmp_path, other)


def test_a_copy_without_the_file(published, tmp_path):
    assert fixed_texts(tmp_path) is None
    assert fixed_texts(tmp_path, published.profile) == published
    assert published.source.startswith("deepseek-recipe 0.2")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"TOOLS_TEMPLATE": None}, r"TOOLS_TEMPLATE must have one gap \{tool_schemas\}.*it has \[\]"),
        ({"TOOLS_TEMPLATE": 3}, "TOOLS_TEMPLATE is not a template"),
        ({"TOOLS_TEMPLATE": "{tool_schemas.__class__}"}, "TOOLS_TEMPLATE must have one gap"),
        ({"TOOLS_TEMPLATE": "{tool_schemas!r}"}, "TOOLS_TEMPLATE must have one gap"),
        ({"TOOLS_TEMPLATE": "{tool_schemas"}, "TOOLS_TEMPLATE is not a template"),
        ({"response_format_template": "{schema}{schema}"}, "response_format_template must have one gap"),
    ],
)
def test_sections_that_cannot_be_used(published, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_encoder(placed(tmp_path, encoder(published, **changed)))
    assert str(tmp_path / ENCODER) in str(caught.value)
    assert "copy the file again" in str(caught.value)


def test_effort_texts_are_checked_by_their_hashes(published, tmp_path):
    changed = {level: text.replace(".", "!", 1) for level, text in published.efforts.items()}
    names = (
        {"REASONING_EFFORT_MAX": changed["max"]}
        if published.profile == "preview"
        else {"REASONING_EFFORT_PROMPTS": changed}
    )
    with pytest.raises(ValueError, match=r"the text of effort '.*' is not the published one"):
        read_encoder(placed(tmp_path, encoder(published, **names)))
    if published.profile == "official":
        shifted = {"low": published.efforts["high"], "high": published.efforts["max"], "max": ""}
        with pytest.raises(ValueError, match="the text of effort 'low' is not the published one"):
            read_encoder(placed(tmp_path, encoder(published, REASONING_EFFORT_PROMPTS=shifted)))
        with pytest.raises(ValueError, match="the default effort is 'max'"):
            read_encoder(placed(tmp_path, encoder(published, DEFAULT_REASONING_EFFORT="max")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def x(", "not Python text"),
        (b"\xff\xfe", "not Python text"),
        ("x = 1\0", "not Python text"),
        ("x = " + "(" * 5000, "not Python text"),
        ("x = 1", "neither REASONING_EFFORT_PROMPTS"),
        ("#" * (1 << 20) + "#", "1048577 bytes; an encoder file has less"),
        (
            "REASONING_EFFORT_PROMPTS = {'low': '', 'medium': ''}",
            r"has the efforts \['high', 'low', 'max'\], this one \['low', 'medium'\]",
        ),
        ("REASONING_EFFORT_MAX = 3", "the text of effort 'max' is not the published one"),
    ],
)
def test_files_that_are_no_encoder(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_encoder(placed(tmp_path, text))


def test_a_profile_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "deepseek_recipe", None)
    with pytest.raises(ValueError, match=r"pip install 'deepseek-recipe>=0.2,<0.3' \(it is part of dsv4\[serve\]\)"):
        fixed_texts(tmp_path, "official")


def test_the_library_too_is_checked(published):
    with pytest.raises(ValueError, match="the text of effort 'max' is not the published one"):
        checked(FixedTexts(**{**vars(published), "efforts": {**published.efforts, "max": "Think."}}))
