"""Clients as people have them: the openai and anthropic packages against a server on the embedded
model.
"""

import json

import numpy as np
import pytest

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

from dsv4_core.contract.choosing import log_softmax  # noqa: E402
from dsv4_core.graph.evaluate import teacher_forced  # noqa: E402
from dsv4_core.graph.generate import generate  # noqa: E402
from dsv4_core.text.chat import encode  # noqa: E402

MODEL = "tiny-jargon"
ASK = [{"role": "user", "content": "What is kludge?"}]
TOOL = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=600)


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0, timeout=600)


def expected(server, count, *, thinking=False):
    """What the model says to ASK, by the graph alone."""
    served = server.app.served
    ids = served.vocabulary.ids(encode(ASK, thinking=thinking, texts=served.texts))
    out = [step[0] for step in generate(served.engine.model, [ids], max_tokens=count, stop=served.ends)]
    return ids, out, served.vocabulary.text([t for t in out if t not in served.ends])


def test_models(client):
    assert [m.id for m in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; 'tiny-jargon' is"):
        client.models.retrieve("gpt")


def test_chat_says_what_the_model_says(client, server):
    ids, out, text = expected(server, 10)
    reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=10, temperature=0)
    assert reply.choices[0].message.content == text
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(out))
    newer = client.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=3, temperature=0)
    assert newer.usage.completion_tokens == 3
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ASK, max_tokens=10, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == len(out)
    system = [{"role": "system", "content": "Be brief."}, *ASK]
    developer = [{"role": "developer", "content": "Be brief."}, *ASK]
    both = [
        client.chat.completions.create(model=MODEL, messages=m, max_tokens=4, temperature=0)
        for m in (system, developer)
    ]
    assert both[0].choices[0].message.content == both[1].choices[0].message.content


def test_a_seed_repeats_and_samples_by_it(client):
    def say(seed):
        reply = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=8, temperature=1.5, seed=seed)
        return reply.choices[0].message.content

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def test_several_replies_to_one_prompt(client):
    """The first is what one alone is; each draws for itself; the prompt is counted once."""
    how = {"model": MODEL, "max_tokens": 6, "temperature": 1.5, "seed": 2}
    one = client.chat.completions.create(**how, messages=ASK)
    three = client.chat.completions.create(**how, messages=ASK, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts[0] == one.choices[0].message.content
    assert len(set(texts)) > 1
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert one.usage.completion_tokens < three.usage.completion_tokens <= 18
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    streamed, told = ["", "", ""], []
    for chunk in client.chat.completions.create(**how, **usage, messages=ASK, n=3):
        told += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert [u.total_tokens for u in told] == [three.usage.total_tokens]
    drawn = client.completions.create(**how, prompt=["A kludge", [5, 6]], n=2)
    assert [choice.index for choice in drawn.choices] == [0, 1, 2, 3]
    alone = client.completions.create(**how, prompt=[5, 6])
    assert drawn.choices[2].text == alone.choices[0].text
    streamed = [""] * 4
    for chunk in client.completions.create(**how, prompt=["A kludge", [5, 6]], n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in drawn.choices]


def test_thinking_and_effort(client, server):
    how = {"model": MODEL, "messages": ASK, "max_tokens": 6, "temperature": 0}
    _, _, text = expected(server, 6, thinking=True)
    reply = client.chat.completions.create(**how, reasoning_effort="low").choices[0].message
    assert (reply.reasoning_content.lstrip("\n"), reply.content) == (text.lstrip("\n"), "")
    tokens = [
        client.chat.completions.create(**how, reasoning_effort=e).usage.prompt_tokens
        for e in ("none", "low", "high", "max")
    ]
    assert tokens[0] == tokens[1] < tokens[2] < tokens[3]


def test_log_probabilities(client, server):
    ids, out, _ = expected(server, 3)
    reply = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    told = reply.choices[0].logprobs.content
    text = np.array([[*ids, *out]])
    raw = log_softmax(teacher_forced(server.app.served.engine.model, text, prefill=1)["logits"][0])[len(ids) - 1 :]
    np.testing.assert_allclose([t.logprob for t in told], [raw[i, t] for i, t in enumerate(out)], atol=1e-4)
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob == t.logprob for t in told)


def test_completions_are_scored_as_dsv4_logits_does(client, server):
    """What lm-eval asks: echo, log-probabilities, prompts as ids."""
    ids = [[0, 3, 50, 60, 70, 80], [5, 6, 7]]
    reply = client.completions.create(model=MODEL, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
    for choice, prompt in zip(reply.choices, ids, strict=True):
        raw = log_softmax(teacher_forced(server.app.served.engine.model, np.array([prompt]), prefill=1)["logits"][0])
        want = [raw[i, t] for i, t in enumerate(prompt[1:])]
        assert choice.logprobs.token_logprobs[0] is None
        np.testing.assert_allclose(choice.logprobs.token_logprobs[1 : len(prompt)], want, atol=1e-6)
        assert len(choice.logprobs.tokens) == len(prompt) + 1
    only = client.completions.create(model=MODEL, prompt=ids[0], max_tokens=0, echo=True, logprobs=1)
    assert len(only.choices[0].logprobs.tokens) == len(ids[0])
    assert only.usage.completion_tokens == 0


def test_completions_of_text(client, server):
    whole = client.completions.create(model=MODEL, prompt="A kludge is", max_tokens=8, temperature=0).choices[0]
    stream = client.completions.create(model=MODEL, prompt="A kludge is", max_tokens=8, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in stream if c.choices) == whole.text
    stop = whole.text[3:5]
    cut = client.completions.create(
        model=MODEL, prompt="A kludge is", max_tokens=8, temperature=0, stop=[stop]
    ).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    spelt = client.completions.create(
        model=MODEL, prompt="a<｜User｜>", max_tokens=1, temperature=0
    ).usage.prompt_tokens
    assert spelt == len(server.app.served.vocabulary.words("a<｜User｜>")) > 2


def test_responses(client, server):
    _, _, text = expected(server, 6)
    reply = client.responses.create(model=MODEL, input="What is kludge?", max_output_tokens=6, temperature=0)
    assert (reply.output_text, reply.status) == (text, "incomplete")
    events = list(
        client.responses.create(model=MODEL, input="What is kludge?", max_output_tokens=6, temperature=0, stream=True)
    )
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")


def test_messages(claude, server):
    ids, _, text = expected(server, 6)
    reply = claude.messages.create(model=MODEL, max_tokens=6, messages=ASK, extra_body={"temperature": 0})
    assert (reply.content[0].text, reply.stop_reason, reply.usage.input_tokens) == (text, "max_tokens", len(ids))
    with claude.messages.stream(model=MODEL, max_tokens=6, messages=ASK, extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == text
    assert claude.messages.count_tokens(model=MODEL, messages=ASK).input_tokens == len(ids)
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(model="claude", max_tokens=6, messages=ASK)
    assert caught.value.body["error"]["type"] == "not_found_error"


@pytest.mark.proof
def test_tools_are_called_by_their_schema(client, claude):
    function = {"name": "set", "description": "Set it.", "strict": True, "parameters": TOOL}
    tools = [{"type": "function", "function": function}]
    how = {"model": MODEL, "messages": ASK, "max_tokens": 110, "temperature": 0, "tools": tools}
    reply = client.chat.completions.create(**how, tool_choice="required", logit_bias={}).choices[0]
    assert reply.finish_reason in {"tool_calls", "length"}  # this model may not stop calling
    call = reply.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "set"
    assert arguments in ({"on": True}, {"on": False})
    streamed = client.chat.completions.create(**how, tool_choice="required", stream=True)
    deltas = [t for c in streamed if c.choices for t in c.choices[0].delta.tool_calls or []]
    assert "".join(t.function.arguments or "" for t in deltas if t.index == 0) == call.function.arguments
    history = [
        *ASK,
        reply.message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"}),
        *({"role": "tool", "tool_call_id": t.id, "content": "done"} for t in reply.message.tool_calls),
    ]
    after = client.chat.completions.create(model=MODEL, messages=history, max_tokens=3, tools=tools)
    assert after.choices[0].finish_reason in {"length", "stop"}
    forced = claude.messages.create(
        model=MODEL,
        max_tokens=110,
        messages=ASK,
        extra_body={"temperature": 0},
        tools=[{"name": "set", "description": "Set it.", "strict": True, "input_schema": TOOL}],
        tool_choice={"type": "any"},
    )
    used = next(b for b in forced.content if b.type == "tool_use")
    assert (used.name, type(used.input["on"])) == ("set", bool)


def test_a_reply_by_a_schema(client):
    schema = {"name": "x", "strict": True, "schema": TOOL}
    reply = client.chat.completions.create(
        model=MODEL, messages=ASK, max_tokens=60, response_format={"type": "json_schema", "json_schema": schema}, seed=1
    ).choices[0]
    assert reply.finish_reason == "stop", reply.message.content
    assert json.loads(reply.message.content) in ({"on": True}, {"on": False})


def test_a_message_by_a_schema(client, claude):
    """As a chat by the same schema, in a thought's company too."""
    schema = {"type": "json_schema", "schema": TOOL}
    told = {"name": "x", "schema": TOOL}
    for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 3}):
        how = {"model": MODEL, "messages": ASK, "max_tokens": 60}
        reply = claude.messages.create(
            **how, extra_body={"temperature": 0, "thinking": thinking, "output_config": {"format": schema}}
        )
        assert json.loads(reply.content[-1].text) in ({"on": True}, {"on": False})
        chat = client.chat.completions.create(
            **how,
            temperature=0,
            response_format={"type": "json_schema", "json_schema": told},
            extra_body={"thinking": thinking},
        )
        assert chat.choices[0].message.content == reply.content[-1].text
        assert chat.usage.prompt_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)


def test_a_thought_ends_with_its_budget(client, claude, server):
    """After so many tokens the thought is ended; until then it is what it would be anyway."""
    _, out, _ = expected(server, 5, thinking=True)
    text = server.app.served.vocabulary.text(out)
    how = {"model": MODEL, "messages": ASK, "max_tokens": 12}
    thinking = {"type": "enabled", "budget_tokens": 5}
    reply = client.chat.completions.create(**how, temperature=0, extra_body={"thinking": thinking})
    said = reply.choices[0].message
    assert said.reasoning_content.strip() == text.strip()
    assert said.content
    assert reply.usage.completion_tokens_details.reasoning_tokens == 5
    other = claude.messages.create(**how, thinking=thinking, extra_body={"temperature": 0})
    assert [block.type for block in other.content] == ["thinking", "text"]
    assert (other.content[0].thinking, other.content[1].text) == (said.reasoning_content, said.content)
    longer = client.chat.completions.create(
        **how, temperature=0, extra_body={"thinking": {"type": "enabled", "budget_tokens": 50}}
    )
    assert longer.choices[0].message.reasoning_content.startswith(said.reasoning_content)


def test_a_thought_comes_before_a_demanded_call(client, claude):
    """Tools are called when they must be, thinking or not; a named one alone."""
    tools = [
        {"type": "function", "function": {"name": name, "parameters": TOOL if name == "set" else {"type": "object"}}}
        for name in ("rest", "set")
    ]
    how = {"model": MODEL, "messages": ASK, "max_tokens": 90, "temperature": 0, "tools": tools}
    thinking = {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 3}}}
    only = {"type": "function", "function": {"name": "set"}}
    for more in ({}, thinking):
        said = client.chat.completions.create(**how, **more, tool_choice=only).choices[0].message
        assert {call.function.name for call in said.tool_calls} == {"set"}
        assert json.loads(said.tool_calls[0].function.arguments) in ({"on": True}, {"on": False})
        assert bool(getattr(said, "reasoning_content", None)) == bool(more)
    asked = {"tools": [{"name": "set", "input_schema": TOOL}], "tool_choice": {"type": "any"}}
    used = claude.messages.create(
        model=MODEL, messages=ASK, max_tokens=90, thinking=thinking["extra_body"]["thinking"], **asked
    )
    assert [block.type for block in used.content][:2] == ["thinking", "tool_use"]


def test_a_json_object_is_an_object(client):
    ask = [{"role": "user", "content": "Say json."}]
    reply = client.chat.completions.create(
        model=MODEL, messages=ask, max_tokens=5, temperature=0, response_format={"type": "json_object"}
    )
    assert reply.choices[0].message.content.startswith("{")


def test_a_tool_must_be_called_or_the_request_is_refused(claude):
    """What the library would take for auto is not taken so."""
    how = {
        "model": MODEL,
        "max_tokens": 2,
        "messages": ASK,
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    }
    for more in (
        {"thinking": {"type": "enabled", "budget_tokens": 2}},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"tool_choice": {"type": "any"}, "tools": []},
        {"extra_body": {"output_config": {"format": {"type": "json_schema", "schema": TOOL}}}},
    ):
        with pytest.raises(
            anthropic.BadRequestError,
            match=r"tool_choice any needs|disable_parallel_tool_use|output_config.format is not|budget_tokens = 2 must be less",
        ):
            claude.messages.create(**{**how, **more})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 17}, r"n = 17 must be a whole number in 1 \.\. 16"),
        ({"extra_body": {"zest": 1}}, "zest is not supported"),
        ({"temperature": 3}, r"temperature = 3 must be 0 or a number in \[0.0001, 2\]"),
        ({"temperature": True}, "temperature = true must be 0 or a number"),
        ({"logit_bias": {"x": 1}}, 'logit_bias: "x" must be a token'),
        ({"logit_bias": {"5": "1"}}, r"logit_bias\.5 = \S+ must be a number in \[-100, 100\]"),
        ({"logit_bias": {"99999": 1}}, "logit_bias: token id 99999 is outside the vocabulary"),
        ({"user": 5}, "user = 5 must be a text"),
        ({"store": True}, "store = true is not supported by this server; leave it out, or give false"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs = true"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream = true"),
        ({"tool_choice": "required"}, "tool_choice required needs tools"),
        ({"extra_body": {"thinking": {"type": "enabled"}}, "reasoning_effort": "none"}, "contradict each other"),
        ({"extra_body": {"thinking": {"type": "disabled", "budget_tokens": 4}}}, r"thinking\.budget_tokens is not"),
        ({"messages": [{**ASK[0], "name": "bob"}]}, r"messages\[0\]\.name is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\]\.content\[0\]\.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, r"content\[0\]\.text = 5 must be"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content is missing"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]\.type = \S+ is not supported"),
        ({"response_format": {"type": "text", "zest": 1}}, r"response_format\.zest is not supported"),
        ({"messages": [{"role": "user", "content": "kludge " * 3000}]}, "maximum context length is 1200 tokens"),
        ({"max_tokens": 1300}, "maximum context length is 1200 tokens"),
        ({"messages": [{"role": "robot", "content": ""}]}, "robot"),
        ({"messages": []}, "message"),
        ({"extra_body": {"max_completion_tokens": 3}}, "max_tokens and max_completion_tokens differ"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort = .*enormous"),
    ],
)
def test_what_is_refused(client, wrong, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": MODEL, "messages": ASK, "max_tokens": 2, **wrong})
