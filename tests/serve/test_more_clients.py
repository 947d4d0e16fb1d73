"""Clients that bring many packages, against the server on the embedded model, without a network.
`make proof` installs them.
"""

import asyncio
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from dsv4_serve.openapi import document

from dsv4_core.checkpoint.weights import embedded
from dsv4_core.contract.choosing import log_softmax
from dsv4_core.graph.evaluate import teacher_forced

MODEL = "tiny-jargon"
ASK = [{"role": "user", "content": "What is kludge?"}]
CHAT = {"model": MODEL, "messages": ASK, "max_tokens": 6, "temperature": 0}
WEATHER = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}},
    "required": ["warm"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def text(server):
    """What the server says to ASK."""
    return httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=120).json()["choices"][0]["message"][
        "content"
    ]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing of these packages asks the network for prices, templates or news."""
    for name in ("LITELLM_LOCAL_MODEL_COST_MAP", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "True" if name.startswith("LITE") else "1")
    monkeypatch.setenv("OPENAI_API_KEY", "any")


@pytest.fixture
def their_loops():
    """litellm leaves event loops open, which the end of the run would count as ours."""
    yield
    for one in gc.get_objects():
        if isinstance(one, asyncio.BaseEventLoop) and not one.is_running() and not one.is_closed():
            one.close()


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")  # theirs
def test_litellm(server, text, their_loops):
    litellm = pytest.importorskip("litellm")
    litellm.telemetry = False
    how = {**CHAT, "model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "any"}
    reply = litellm.completion(**how)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (text, "length")
    assert reply.usage.completion_tokens == 6
    assert "".join(c.choices[0].delta.content or "" for c in litellm.completion(**how, stream=True)) == text
    thought = litellm.completion(**how, reasoning_effort="low").choices[0].message
    assert thought.reasoning_content
    with pytest.raises(litellm.NotFoundError, match="'gpt' is not served here"):
        litellm.completion(**{**how, "model": "openai/gpt"})
    with pytest.raises(litellm.BadRequestError, match="maximum context length"):
        litellm.completion(**{**how, "max_tokens": 5000})
    spoken = asyncio.run(
        litellm.anthropic.messages.acreate(
            model=f"anthropic/{MODEL}", api_base=server.url, api_key="any", max_tokens=6, messages=ASK, temperature=0
        )
    )
    assert spoken["content"][0]["text"] == text


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
def test_langchain(server, text):
    langchain = pytest.importorskip("langchain_openai")
    how = {"model": MODEL, "base_url": f"{server.url}/v1", "api_key": "any", "temperature": 0, "max_retries": 0}
    chat = langchain.ChatOpenAI(**how, max_tokens=6)
    reply = chat.invoke("What is kludge?")
    assert (reply.content, reply.usage_metadata["output_tokens"]) == (text, 6)
    assert "".join(part.content for part in chat.stream("What is kludge?")) == text
    assert [r.content for r in chat.batch(["What is kludge?"] * 3)] == [text] * 3
    kept = langchain.ChatOpenAI(**how, max_tokens=60).with_structured_output(
        {"title": "weather", **WEATHER}, method="json_schema", strict=True
    )
    assert kept.invoke("Is it warm?") in ({"warm": True}, {"warm": False})
    tools = langchain.ChatOpenAI(**how, max_tokens=60).bind_tools(
        [{"title": "weather", "description": "Tell it.", **WEATHER}], tool_choice="any", strict=True
    )
    call = tools.invoke("Is it warm?").tool_calls[0]
    assert (call["name"], type(call["args"]["warm"])) == ("weather", bool)


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_as_dsv4_logits_does(server):
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=MODEL,
        tokenizer=str(embedded()),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        batch_size=3,
        max_length=1000,
    )
    pairs = [
        ("A kludge is", " a clever hack"),
        ("foo", " bar"),
        ("The jargon file", " lists words, and baz"),
        ("A", " B"),
    ]
    found = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i, ("none", i, 1)) for i, pair in enumerate(pairs)], disable_tqdm=True
    )
    model = server.app.worker.engine.model
    for (context, words), (score, greedy) in zip(pairs, found, strict=True):
        known, own = lm._encode_pair(context, words)
        ids = [*known, *own]
        raw = log_softmax(teacher_forced(model, np.array([ids]), prefill=len(known))["logits"][0])
        wanted = [raw[i, token] for i, token in enumerate(own)]
        assert score == pytest.approx(sum(wanted), abs=1e-5)
        assert greedy == all(int(raw[i].argmax()) == token for i, token in enumerate(own))


def test_the_document_names_every_route(server):
    told = httpx.get(f"{server.url}/openapi.json").json()
    assert told == document(told["info"]["version"])
    routes = {route.path.replace(":path", "") for route in server.app.asgi().routes}
    assert routes == told["paths"].keys()


@pytest.mark.proof
def test_schemathesis_finds_no_fault(server):
    """Requests drawn from the document, right and wrong: no 500, no status, type or form that the
    document does not name.
    """
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [Path(sys.executable).parent / "st", "run", f"{server.url}/openapi.json", "--checks", checks]
    command += ["--max-examples", os.environ.get("DSV4_EXAMPLES", "40"), "--generation-deterministic", "--no-color"]
    command += ["--request-timeout", "120", "--suppress-health-check", "all", "--warnings", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    server.idle()
    assert server.app.worker.engine.stats.free == 4


@pytest.mark.proof
def test_aiperf(server, tmp_path):
    """It brings 127 packages, so it stands in an environment of its own: DSV4_AIPERF names its
    command. Told to be offline, it takes a tokenizer from the hub's cache alone; a directory is
    read without a network when it is not told so.
    """
    command = os.environ.get("DSV4_AIPERF")
    if not command:
        pytest.skip("DSV4_AIPERF does not name aiperf's command")
    words = ["profile", "-m", MODEL, "--url", server.url, "--endpoint-type", "chat", "--streaming", "--ui", "none"]
    words += ["--tokenizer", embedded(), "--concurrency", "4", "--request-count", "12", "--use-server-token-count"]
    words += ["--synthetic-input-tokens-mean", "40", "--output-tokens-mean", "12", "--artifact-dir", tmp_path]
    told = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False, timeout=900, env=told)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(next(tmp_path.rglob("profile_export_aiperf.json")).read_text())
    assert report["request_count"]["avg"] == 12
    assert report["output_token_throughput"]["avg"] > 0
