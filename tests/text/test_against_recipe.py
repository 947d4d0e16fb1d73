"""Two encoders and two parsers, ours and DeepSeek's library's, agree wherever both can speak."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_core
from dsv4_core.text.chat import encode
from dsv4_core.text.completion import parse
from dsv4_core.text.fixed_texts import library_texts
from dsv4_core.text.markers import Piece, spelt
from dsv4_core.text.tokenizer import PieceStream, Vocabulary, load_tokenizer

recipe = pytest.importorskip("deepseek_recipe")

TINY = Path(dsv4_core.__file__).parent / "data/tiny-jargon"
OURS = Vocabulary(load_tokenizer(TINY))
THEIR_TOKENIZER = recipe.Tokenizer.from_file(str(TINY / "tokenizer.json"))
TEXTS = {profile: library_texts(profile) for profile in ("preview", "official")}
THEIRS = recipe.DeepseekV4Encoding().with_tokenizer(THEIR_TOKENIZER)
SPELT = st.sampled_from(["<｜User｜>", "</think>", "<think>", "｜DSML｜", "<｜end▁of▁sentence｜>", "</tool_result>"])
WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | SPELT, max_size=4).map("".join)
NAME = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda x: st.lists(x) | st.dictionaries(NAME, x),
    max_leaves=3,
)
ARGUMENTS = st.dictionaries(NAME, JSON, min_size=1, max_size=3)
EFFORT = {
    "official": {"low": "low", "high": "high", "max": "max"},
    "preview": {"low": "high", "high": "max"},
}  # theirs -> ours


@st.composite
def conversations(draw):
    """Messages of ours in turns: system, then user (or tool results) and assistant; the last is to
    be answered.
    """
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    names = []
    for turn in range(draw(st.integers(1, 3))):
        if turn:
            calls = draw(st.lists(st.tuples(NAME, ARGUMENTS), max_size=2))
            names = [f"call{turn}.{i}" for i in range(len(calls))]
            messages.append({"role": "assistant", "content": draw(WORDS), "reasoning_content": draw(WORDS)})
            if calls:
                messages[-1]["tool_calls"] = [
                    {"id": i, "function": {"name": n, "arguments": json.dumps(a, ensure_ascii=False)}}
                    for i, (n, a) in zip(names, calls, strict=True)
                ]
            messages += [
                {"role": "tool", "tool_call_id": i, "content": draw(WORDS)} for i in draw(st.permutations(names))
            ]
        if not names or draw(st.booleans()):
            messages.append({"role": "user", "content": draw(WORDS)})
    return messages


def theirs(message, *, thinking):
    """In chat mode without reasoning: theirs writes it where there are tools, the published encoder
    never.
    """
    content = message["content"]
    if message["role"] == "system":
        return recipe.SystemMessage(content)
    if message["role"] == "user":
        return recipe.UserMessage(content)
    if message["role"] == "tool":
        return recipe.ToolMessage(content, message["tool_call_id"])
    calls = [
        recipe.ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"])
        for c in message.get("tool_calls", [])
    ]
    return recipe.AssistantMessage(content, message["reasoning_content"] if thinking else None, calls or None)


@settings(deadline=None)
@given(
    messages=conversations(),
    tools=st.lists(st.tuples(NAME, WORDS, ARGUMENTS), max_size=2),
    schema=st.none() | ARGUMENTS,
    thinking=st.booleans(),
    profile=st.sampled_from(["official", "preview"]),
    data=st.data(),
)
def test_same_ids(messages, tools, schema, thinking, profile, data):
    level = data.draw(st.sampled_from(sorted(EFFORT[profile])))
    conversation = recipe.Conversation(
        [theirs(m, thinking=thinking) for m in messages],
        thinking_mode=thinking,
        tools=[recipe.ToolDefinition(*tool) for tool in tools],
        reasoning_effort=level if thinking else None,
        response_schema=schema,
    )
    pieces = encode(
        messages,
        thinking=thinking,
        effort=EFFORT[profile][level] if thinking else None,
        tools=[{"function": {"name": n, "description": d, "parameters": p}} for n, d, p in tools],
        response_format=schema,
        texts=TEXTS[profile],
    )
    rendered = THEIRS.render_conversation(conversation)
    assert spelt(pieces) == rendered.prompt
    at, controls = 0, []
    for piece in pieces:
        controls += [(at, at + len(piece.text))] if piece.control else []
        at += len(piece.text)
    assert controls == rendered.special_ranges
    assert OURS.ids(pieces) == THEIRS.encode(conversation)


@settings(deadline=None)
@given(reasoning=WORDS, content=WORDS, calls=st.lists(st.tuples(NAME, ARGUMENTS), max_size=2), thinking=st.booleans())
def test_same_reply(reasoning, content, calls, thinking):
    """From ids; where reasoning begins with new lines or content ends in white space before calls,
    theirs drops them.
    """
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    message["tool_calls"] = [{"function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls]
    pieces = encode([{"role": "user", "content": ""}, message], thinking=thinking)
    completion = pieces[pieces.index(Piece("<｜Assistant｜>", control=True)) + 2 :]
    ids, stream = OURS.ids(completion), PieceStream(OURS)
    ours = parse([p for token in ids for p in stream.push(token)] + stream.finish(), thinking=thinking)
    generator = recipe.ChatCompletionRequest(
        {"model": "DeepSeek-V4-Pro", "messages": [{"role": "user", "content": ""}]}
    )
    stage = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    converted = generator.convert(recipe.ConversionOptions())
    chunks = recipe.ChatCompletionRequest.chunk_generator(converted, "id", "m")
    processor = recipe.StreamProcessor(chunks, recipe.ParsingOptions(thinking_initial_stage=stage), THEIR_TOKENIZER)
    response = recipe.ChatCompletionResponse("id", "m", 0, 0, 0)
    out = [c for token in ids[:-1] for c in processor.push(recipe.InferenceChunk.tokens([token]))]
    for chunk in [
        *out,
        *processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)),
        *processor.finish(),
    ]:
        response.accumulate(chunk)
    got = json.loads(response.to_json())["choices"][0]["message"]
    assert (got.get("reasoning_content") or "") == (ours.reasoning.lstrip("\n") if thinking else "")
    assert (got.get("content") or "").rstrip() == ours.content.rstrip()
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in got.get("tool_calls") or []] == [
        (c.name, json.loads(c.arguments)) for c in ours.calls
    ]
    assert ours.content == content
