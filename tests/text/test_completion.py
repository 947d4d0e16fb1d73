"""Completions back to replies: as published, in other forms that models write, and cut anywhere."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_core.text.chat import encode
from dsv4_core.text.completion import Call, CompletionParser, Reply, parse
from dsv4_core.text.markers import ASSISTANT, END, Piece, Scanner, scan, spelt

D = "｜DSML｜"


def block(*calls):
    written = "".join(
        f'<{D}invoke name="{name}">\n'
        + "".join(f'<{D}parameter name="{k}" string="{s}">{v}</{D}parameter>\n' for k, s, v in parameters)
        + f"</{D}invoke>\n"
        for name, *parameters in calls
    )
    return f"\n\n<{D}tool_calls>\n{written}</{D}tool_calls>"


SHELL = ("bash", ("command", "true", "ls 2>&1"))
BASH = Call("bash", '{"command": "ls 2>&1"}', complete=True)
CASES = {  # completion, does it think, reply
    "words": ("Hello.<｜end▁of▁sentence｜>", False, Reply(content="Hello.", ended=True)),
    "thought": (f"so\n</think>\n\nyes{END}", True, Reply("so\n", "\n\nyes", ended=True)),
    "call": (f"x</think>go{block(SHELL)}{END}", True, Reply("x", "go", [BASH], ended=True)),
    "two calls, no words": (
        f"{block(SHELL, ('f',))}{END}",
        False,
        Reply("", "", [BASH, Call("f", "{}", complete=True)], ended=True),
    ),
    "kinds of values": (
        block(("f", ("arguments", "false", '{"a": [1]}'), ("input", "true", 'q"\n'), ("n", "false", "null"))),
        False,
        Reply(calls=[Call("f", '{"arguments": {"a": [1]}, "input": "q\\"\\n", "n": null}', complete=True)]),
    ),
    "newlines of the words": (
        f"a\n\n\n{block(('f',))}",
        False,
        Reply(content="a\n\n\n", calls=[Call("f", "{}", complete=True)]),
    ),
    "no end of thought": ("thinking on", True, Reply("thinking on")),
    "call inside a thought": (
        f"hm{block(SHELL)}{END}",
        True,
        Reply("hm", "", [BASH], ended=True, faults=["reasoning is not closed"]),
    ),
    "outer tags missing": (
        f'a\n\n<{D}invoke name="f">\n</{D}invoke>',
        False,
        Reply(
            content="a", calls=[Call("f", "{}", complete=True)], faults=["calls are not opened", "calls are not closed"]
        ),
    ),
    "call not closed": (
        f'<{D}tool_calls>\n<{D}invoke name="f">\n<{D}invoke name="g">\n</{D}tool_calls>.',
        False,
        Reply(
            content=".",
            calls=[Call("f", "{}", complete=True), Call("g", "{}", complete=True)],
            faults=["a call is not closed"],
        ),
    ),
    "words after and between": (
        f'a<{D}tool_calls>\nso <{D}invoke name="f">\n</{D}invoke>\n</{D}tool_calls>\nb',
        False,
        Reply(content="a\nb", calls=[Call("f", "{}", complete=True)], faults=["words between calls"]),
    ),
    "tags inside a value": (
        block(("write", ("text", "true", f'a <{D}parameter name="x"> </{D}invoke> </think> b </'))),
        False,
        Reply(
            calls=[
                Call(
                    "write",
                    json.dumps({"text": f'a <{D}parameter name="x"> </{D}invoke> </think> b </'}, ensure_ascii=False),
                    complete=True,
                )
            ]
        ),
    ),
    "not JSON": (
        block(("f", ("n", "false", "NaN"))),
        False,
        Reply(calls=[Call("f", '{"n": "NaN"}', complete=True)], faults=["a value is not JSON"]),
    ),
    "cut in a string": (
        block(SHELL).partition(" 2>")[0],
        False,
        Reply(calls=[Call("bash", '{"command": "ls')], faults=["cut inside a call"]),
    ),
    "cut in a name": (
        f'a\n\n<{D}tool_calls>\n<{D}invoke name="f',
        False,
        Reply(content="a", faults=["calls are not closed"]),
    ),
    "not markup": (
        f"the {D} token, <{D}b>, </{D}c> and < or </",
        False,
        Reply(content=f"the {D} token, <{D}b>, </{D}c> and < or </"),
    ),
    "thought twice": (
        f"<think>a</think>b</think>c{END}d",
        True,
        Reply(
            "a",
            "bc",
            ended=True,
            faults=["reasoning opened twice", "control token </think> in the reply", "words after the end"],
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_reply(name):
    text, thinking, expected = CASES[name]
    assert parse(text, thinking=thinking) == expected


def streamed(text, cuts, *, thinking):
    """The reply that the parser keeps, and the one that its deltas add up to."""
    scanner, parser, given_out = Scanner(), CompletionParser(thinking=thinking), Reply()
    pieces = [p for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for p in scanner.push(text[a:b])]
    for piece in [*pieces, *scanner.finish()]:
        for delta in parser.push(piece):
            given_out.add(delta)
    for delta in parser.finish():
        given_out.add(delta)
    return parser.reply, given_out


@pytest.mark.parametrize("name", CASES)
def test_cut_anywhere(name):
    text, thinking, expected = CASES[name]
    rng = random.Random(name)
    for cuts in [list(range(1, len(text))), *([i] for i in range(1, len(text)))]:
        assert streamed(text, cuts, thinking=thinking)[0] == expected
    for _ in range(300):
        cuts = sorted(rng.sample(range(1, len(text)), rng.randrange(min(len(text) - 1, 40))))
        reply, given_out = streamed(text, cuts, thinking=thinking)
        assert reply == expected
        assert (given_out.reasoning, given_out.content, given_out.calls) == (
            expected.reasoning,
            expected.content,
            expected.calls,
        )


def test_words_come_at_once():
    """Only what may yet be markup is held back."""
    parser = CompletionParser(thinking=False)
    out = ["".join(d.text for d in parser.push(Piece(p))) for p in ("a", "b\n", "c<", "d", "\n\n", "\n", "e")]
    assert out == ["a", "b", "\nc", "<d", "", "\n", "\n\ne"]


TEXT = st.text(st.sampled_from("ab\n<>/\"\\ é😀{}'|｜") | st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    st.lists,
    max_leaves=4,
)
CALLS = st.lists(
    st.tuples(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), JSON, max_size=3),
    ),
    max_size=3,
)


@given(reasoning=TEXT, content=TEXT, calls=CALLS, thinking=st.booleans())
def test_what_was_encoded_is_read_back(reasoning, content, calls, thinking):
    """Encoding a reply and reading it gives the reply, for any words."""
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning if thinking else ""}
    message["tool_calls"] = [{"function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
    pieces = encode([{"role": "user", "content": ""}, message], thinking=thinking)
    reply = parse(pieces[pieces.index(Piece(ASSISTANT, control=True)) + 2 :], thinking=thinking)
    assert (reply.content, reply.reasoning) == (content, message["reasoning_content"])
    assert [(c.name, json.loads(c.arguments), c.complete) for c in reply.calls] == [(n, a, True) for n, a in calls]
    assert reply.ended
    assert not reply.faults
    again = encode([{"role": "user", "content": ""}, reply.message()], thinking=thinking)
    assert again == pieces


def test_spelt_markup_is_words():
    """A model that spells the markup in ordinary characters has called nothing."""
    text = spelt(scan(block(SHELL)))
    reply = parse([Piece(text)], thinking=False)
    assert (reply.content, reply.calls) == (text, [])
