"""The published chat and thinking modes."""

import pytest

from dsv4_core.text.chat import encode

B, E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"


def test_a_question():
    assert encode([{"role": "user", "content": "Hi"}]) == f"{B}{U}Hi{A}</think>"
    assert encode([{"role": "user", "content": "Hi"}], thinking=True) == f"{B}{U}Hi{A}<think>"


def test_turns_with_a_system_prompt():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1", "reasoning_content": "counting"},
        {"role": "user", "content": "Two?"},
    ]
    assert encode(turns) == f"{B}Be brief.{U}One?{A}</think>1{E}{U}Two?{A}</think>"  # old reasoning is dropped
    last = [*turns, {"role": "assistant", "content": "2", "reasoning_content": "again"}]
    assert encode(last) == f"{B}Be brief.{U}One?{A}</think>1{E}{U}Two?{A}<think>again</think>2{E}"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "tool", "content": ""}], "message 0 has role 'tool' here"),
        ([{"role": "user", "content": ""}, {"role": "system", "content": ""}], "message 1 has role 'system' here"),
        ([{"role": "assistant", "content": ""}], "message 0 has role 'assistant' here"),
    ],
)
def test_what_is_not_a_conversation(turns, message):
    with pytest.raises(ValueError, match=message):
        encode(turns)
