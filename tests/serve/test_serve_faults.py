"""What a server bears: clients that leave, bodies that are none, too many at once, the end."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from click.testing import CliRunner

from dsv4_core import cli

ASK = [{"role": "user", "content": "What is kludge?"}]
CHAT = {"model": "tiny-jargon", "messages": ASK, "max_tokens": 12, "temperature": 0}
LONG = {"model": "small", "messages": ASK, "max_tokens": 400, "logit_bias": {"1": -100}, "stream": True}
KEY = {"authorization": "Bearer secret"}


def said(server, **more):
    reply = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, **more}, timeout=600)
    return reply.json()["choices"][0]["message"]["content"]


def free(server):
    server.idle()
    return server.app.worker.engine.stats.free


def test_a_client_that_leaves_at_any_token_harms_nobody(server):
    """Its slot is free again, and what another is told meanwhile is what it is told alone."""
    alone = said(server)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for tokens in range(5):
            other = pool.submit(said, server)
            body = {**CHAT, "max_tokens": 500, "stream": True, "logit_bias": {"1": -100}}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=600) as reply:
                lines = reply.iter_lines()
                for _ in range(2 * tokens):
                    next(lines)
            assert other.result() == alone
            assert free(server) == 4
    assert server.app.worker.engine.stats.finished["cancelled"] >= 5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"properties": [1]}, "Invalid schema for function 'look'"),
        ({"required": 5}, "Invalid schema for function 'look'"),
        ({"type": "object", "properties": {"a": {"type": "nope"}}}, "Invalid schema for function 'look'"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "the schema cannot be enforced"),
        ({"type": "object", "properties": {"a": True}}, ""),
    ],
)
def test_parameters_of_a_tool_that_are_no_schema_are_refused(server, parameters, message):
    tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "tools": [tool]}, timeout=600)
    assert reply.status_code == (400 if message else 200), reply.text
    assert message in reply.text


@pytest.mark.proof
def test_company_changes_nobodys_words(server):
    """Many at once, of different lengths, some sampled: each is told what it is told alone."""
    asks = [
        {"messages": [{"role": "user", "content": "kludge " * i}], "temperature": i % 2, "seed": i} for i in range(1, 9)
    ]
    alone = [said(server, **ask) for ask in asks]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda ask: said(server, **ask), asks)) == alone
    assert free(server) == 4


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[1]", 400, "the body must be a JSON object"),
        (b'{"temperature": NaN}', 400, "not JSON"),
        (b"[" * 4000, 400, "not JSON"),
        (b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800 and more"}]}', 400, "surrogate"),
        (b'{"a": "' + b"x" * 6000 + b'"}', 413, "larger than 5000 bytes"),
        (b"{}", 400, "model is missing; it must be a text"),
    ],
)
def test_bodies_that_are_none(limited, body, status, message):
    for route in ("chat/completions", "responses", "messages", "completions"):
        reply = httpx.post(f"{limited.url}/v1/{route}", content=body, headers=KEY, timeout=600)
        assert reply.status_code == status
        assert message in json.dumps(reply.json(), ensure_ascii=False)


def test_a_body_that_does_not_come(limited):
    with socket.create_connection(("127.0.0.1", limited.port)) as half:
        half.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\ncontent-length: 100\r\n\r\n{"
        )
        assert b"408" in half.recv(100)


def test_the_key(limited):
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"x-api-key": "secre"},
        {"authorization": "Bearer sécret".encode()},
    ):
        reply = httpx.post(f"{limited.url}/v1/chat/completions", json={}, headers=headers)
        assert (reply.status_code, reply.json()["error"]["type"]) == (401, "authentication_error")
    assert httpx.get(f"{limited.url}/v1/models", headers={"x-api-key": "secret"}).status_code == 200
    assert httpx.get(f"{limited.url}/health").json() == {"status": "ok"}


def test_overload_and_silence(limited):
    """One runs, one waits, the third is told to come back; the one that waits gets comments until
    it is its turn.
    """
    url = f"{limited.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=LONG, headers=KEY, timeout=600) as first:
        running = first.iter_lines()  # held: an iterator that is dropped closes its connection
        next(running)
        with httpx.stream("POST", url, json=LONG, headers=KEY, timeout=600) as second:
            waiting = second.iter_lines()
            assert next(waiting) == ": still working"
            third = httpx.post(url, json=LONG, headers=KEY, timeout=600)
            assert (third.status_code, third.headers["retry-after"]) == (429, "1")
            assert "1 requests wait, and 1 may" in third.json()["error"]["message"]
    assert free(limited) == 1


def test_metrics_and_the_small_routes(server):
    said(server, max_tokens=2)
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        "requests_total",
        "time_to_first_token_seconds_bucket",
        "generated_total",
        "hit_tokens_total",
        "free 4.0",
    ):
        assert f"dsv4_{name}" in text
    assert httpx.get(f"{server.url}/ready").json() == {"ready": True}
    words = httpx.post(f"{server.url}/tokenize", json={"prompt": "a<｜User｜>"}).json()["tokens"]
    assert not set(words) & set(server.app.served.vocabulary.control)
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": words}).json() == {"prompt": "a<｜User｜>"}
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["message"] == "GET /nowhere: no such route"
    refused = httpx.get(f"{server.url}/v1/messages/batches").json()  # in its clients' own form
    assert (refused["type"], refused["error"]["type"]) == ("error", "not_found_error")
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.get(f"{server.url}/").headers["content-type"].startswith("text/html")


def test_draining(limited, monkeypatch):
    monkeypatch.setattr(limited.app, "draining", True)
    reply = httpx.post(f"{limited.url}/v1/chat/completions", json=LONG, headers=KEY)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert httpx.get(f"{limited.url}/ready").status_code == 503
    assert httpx.get(f"{limited.url}/health").status_code == 200


def test_a_failure_of_one_step_and_of_the_engine(server, monkeypatch):
    """A request that cannot be served ends with an error; an engine that breaks is told by
    /health.
    """
    engine = server.app.worker.engine
    alone = said(server)
    monkeypatch.setattr(engine.model, "forward", lambda step: (_ for _ in ()).throw(RuntimeError("hiccup")))
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=600)
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "RuntimeError: hiccup")
    streamed = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=600)
    assert "hiccup" in streamed.text
    monkeypatch.undo()
    assert said(server) == alone
    assert free(server) == 4


def test_sigterm_lets_a_stream_end():
    """The command itself: it says where it listens, serves, and after SIGTERM ends what is under
    way, refuses the rest.
    """
    words = ["serve", "--port", "0", "-b", "reference", "--no-thinking", "--slots", "2", "--context", "100"]
    command = [sys.executable, "-m", "dsv4_core", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        url = next(line for line in process.stderr if "serving tiny-jargon at" in line).split()[-1]
        body = {**CHAT, "max_tokens": 40, "stream": True, "logit_bias": {"1": -100}}
        body["stream_options"] = {"include_usage": True}
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=600) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        told = process.stderr.read()
    assert process.returncode == 0
    assert "data: [DONE]" in rest
    assert any('"completion_tokens":40' in line for line in rest)
    assert "SIGTERM: no new requests" in told
    logged = json.loads(next(line for line in told.splitlines() if line.startswith("{")))
    assert (logged["route"], logged["tokens"], logged["finished"]) == ("chat", 40, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--context", "100000"], "--context 100000: the model has 4096 positions"),
        (["--slots", "0"], "0 is not in the range"),
        (["no/such/model"], "no such directory"),
        (["--name", " "], "--name is empty"),
        (["--host", "no..host"], "--host no..host --port 8000: nobody can listen there"),
    ],
)
def test_a_command_that_cannot_be_served(words, message):
    result = CliRunner().invoke(cli.root, ["serve", "-b", "reference", *words])
    assert result.exit_code != 0
    assert message in result.output + str(result.exception)


def test_a_port_that_another_has(server):
    result = CliRunner().invoke(cli.root, ["serve", "-b", "reference", "--port", str(server.port)])
    assert result.exit_code != 0
    assert f"--port {server.port}: nobody can listen there (Address already in use)" in str(result.exception)
