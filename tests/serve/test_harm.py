"""Whatever one client does, the others are told what they are told alone, and no slot is lost."""

import itertools
import json
import socket
import ssl
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

MODEL = "tiny-jargon"
PATIENCE = 600  # seconds: a machine may do other work
POISON = 1900  # a token that the server of these tests fails on
ON = {"1": -100}  # the reply does not end by itself
ASKS = [  # what the others ask meanwhile: streamed or not, greedy or sampled, of two protocols
    ("chat/completions", {"messages": [{"role": "user", "content": "What is kludge?"}], "temperature": 0, "max_tokens": 9}),
    ("chat/completions", {"messages": [{"role": "user", "content": "What is foo?"}], "seed": 3, "max_tokens": 7, "stream": True}),
    ("completions", {"prompt": [0, 3, 50, 60], "max_tokens": 8, "logprobs": 2, "temperature": 1.0, "seed": 5}),
]  # fmt: skip
STREAMS = {
    "chat/completions": {
        "messages": [{"role": "user", "content": "What is bar?"}],
        "max_tokens": 300,
        "logit_bias": ON,
    },
    "completions": {"prompt": "What is bar?", "max_tokens": 300, "logit_bias": ON},
    "responses": {"input": "What is bar?", "max_output_tokens": 300},
    "messages": {"messages": [{"role": "user", "content": "What is bar?"}], "max_tokens": 300},
}


def told(server, route, body):
    """What a client is told, without what names and dates it."""
    reply = httpx.post(f"{server.url}/v1/{route}", json={"model": MODEL, **body}, timeout=PATIENCE)
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        return json.dumps(reply.json()["choices"])
    data = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for d in data for c in json.loads(d)["choices"])


class Others:
    """Clients that go on asking while something happens, and compare."""

    def __init__(self, server):
        self.server, self.over = server, threading.Event()
        self.alone = [told(server, *ask) for ask in ASKS]

    def _ask(self, which):
        count = 0
        while not (self.over.is_set() and count):
            assert told(self.server, *ASKS[which]) == self.alone[which]
            count += 1

    def while_(self, happens):
        with ThreadPoolExecutor(len(ASKS)) as pool:
            asking = [pool.submit(self._ask, which) for which in range(len(ASKS))]
            try:
                happens(self.server)
            finally:
                self.over.set()
            for one in asking:
                one.result()


def fail_at_poison(model):
    """Let a model fail at a step that holds a certain token."""
    forward = model.forward

    def failing(step, *rest):
        if POISON in model.backend.to_numpy(step.ids).tolist():
            raise RuntimeError("the device hiccups")
        return forward(step, *rest)

    model.forward = failing


@pytest.fixture(scope="module")
def poisoned(server):
    model = server.app.worker.engine.model
    fail_at_poison(model)
    yield server
    del model.forward


def raw(server, *parts, read=0, reset=False):
    """Send bytes as they are, read some, and go: politely, or with a reset."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        for part in parts:
            connection.sendall(part)
        got = connection.recv(read) if read else b""
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return got


def head(route, length, *more):
    lines = [f"POST /v1/{route} HTTP/1.1", "host: x", "content-type: application/json", *more]
    lines += [f"content-length: {length}"] if length is not None else []
    return "\r\n".join([*lines, "", ""]).encode()


def leaves_at_each_token(server):
    for route, body in STREAMS.items():
        for lines in (0, 1, 2, 4, 7, 12):
            with httpx.stream(
                "POST", f"{server.url}/v1/{route}", json={"model": MODEL, "stream": True, **body}, timeout=PATIENCE
            ) as reply:
                for _ in itertools.islice(reply.iter_lines(), lines):
                    pass


def leaves_without_the_reply(server):
    for (route, body), reset in itertools.product(STREAMS.items(), (False, True)):
        content = json.dumps({"model": MODEL, **body}).encode()
        raw(server, head(route, len(content)), content, reset=reset)


def does_not_read(server):
    """A stream that nobody takes: the sender may wait, the engine does not."""
    content = json.dumps({"model": MODEL, "stream": True, **STREAMS["chat/completions"]}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(head("chat/completions", len(content)) + content)
        told(server, *ASKS[0])


def sends_half(server):
    content = json.dumps({"model": MODEL, **STREAMS["chat/completions"]}).encode()
    whole = head("chat/completions", len(content)) + content
    for cut in (1, 20, whole.index(b"\r\n\r\n") + 2, whole.index(b"\r\n\r\n") + 4, len(whole) - 1):
        for reset in (False, True):
            raw(server, whole[:cut], reset=reset)
    chunked = head("chat/completions", None, "transfer-encoding: chunked")
    for body in (b"", b"5\r\n{", b'5\r\n{"a":\r\n', b"zz\r\n", b"-1\r\n{\r\n", b"ffffffffffffffff\r\n{"):
        raw(server, chunked, body, reset=True)


def sits_idle(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
    told(server, *ASKS[0])
    for connection in idle:
        connection.close()


def meets_a_failing_device(server):
    for stream in (False, True):
        body = {"model": MODEL, "prompt": [5, POISON, 6], "max_tokens": 4, "stream": stream}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
        assert reply.status_code == (200 if stream else 500)
        assert "RuntimeError: the device hiccups" in reply.text
    later = {"model": MODEL, "prompt": [5, 6], "max_tokens": 4, "logit_bias": {str(POISON): 100}}  # not in the prompt
    assert httpx.post(f"{server.url}/v1/completions", json=later, timeout=PATIENCE).status_code == 500


def sends_much(server):
    most = server.app.largest
    ones = ["[" + ",".join(["1"] * (most // 2 - 40)) + "]", "[" + ",".join(["[1]"] * (most // 4 - 40)) + "]"]
    texts = [json.dumps("x" * (most - 100)), json.dumps("x " * (most // 2 - 50)), json.dumps("\0" * (most // 6 - 50))]
    bodies = {
        "completions": [f'{{"model": "{MODEL}", "prompt": {one}}}' for one in (*ones, *texts)],
        "chat/completions": [
            f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": {text}}}]}}' for text in texts
        ] + [
            json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}] * 100000}),
            json.dumps({f"a{i}": i for i in range(100000)}),
            '{"model": "' + MODEL + '", "messages": ' + "[" * 100000 + "]" * 100000 + "}",
            '{"model": "' + MODEL + '", "seed": ' + "1" * 100000 + "}",
            '{"a": "' + "x" * most + '"}',
        ],
        "messages": [f'{{"model": "{MODEL}", "max_tokens": 1, "system": {texts[1]}, "messages": []}}'],
    }  # fmt: skip
    for route, several in bodies.items():
        for body in several:
            reply = httpx.post(f"{server.url}/v1/{route}", content=body.encode(), timeout=PATIENCE)
            assert reply.status_code in {400, 404, 413}, (route, body[:80], reply.text[:200])
            assert reply.json()["error"]["message"]
            assert len(reply.text) < 1000


def is_not_unicode(server):
    for route in STREAMS:
        for bad in (
            b"\xff",
            b"\xc3(",
            b"\xed\xa0\x80",
            b"\xf8\x88\x80\x80\x80",
            "\ud800".encode("utf-16", "surrogatepass"),
        ):
            content = b'{"model": "' + bad + b'"}'
            got = raw(server, head(route, len(content)), content, read=400)
            assert got.split()[1] in {b"400", b"404"}, got
        content = b'{"model": "tiny-jargon", "prompt": "\\udc00", "max_tokens": 2}'
        assert raw(server, head(route, len(content)), content, read=400).split()[1] == b"400"
    for line in (b"GET /v1/models/\xff HTTP/1.1", b"GET /v1/models/%ff%fe HTTP/1.1", b"GET /?\xe2\x28 HTTP/1.1"):
        raw(server, line, b"\r\nhost: x\r\nauthorization: Bearer \xff\xfe\r\n\r\n", read=400)


def speaks_no_http(server):
    hello = ssl.MemoryBIO()
    secure = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="x")
    with pytest.raises(ssl.SSLWantReadError):
        secure.do_handshake()
    for words in (b"\0" * 100, b"\r\n\r\n", b"GET\r\n\r\n", hello.read(), b"A" * 100000, b"GET / HTTP/9.9\r\n\r\n",
                  b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}",
                  b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n{}",
                  b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 50):  # fmt: skip
        raw(server, words)


QUICK = (sends_half, meets_a_failing_device)
SLOW = (
    leaves_at_each_token,
    leaves_without_the_reply,
    does_not_read,
    sits_idle,
    sends_much,
    is_not_unicode,
    speaks_no_http,
)


@pytest.mark.parametrize("happens", [*QUICK, *(pytest.param(one, marks=pytest.mark.proof) for one in SLOW)])
def test_nobody_else_is_harmed(poisoned, happens):
    Others(poisoned).while_(happens)
    poisoned.idle()
    assert poisoned.app.worker.engine.stats.free == 4
    assert not poisoned.app.worker.failed


def test_a_head_that_does_not_come(limited):
    """Nothing, a beginning, or a byte now and then: the connection is closed."""
    with socket.create_connection(("127.0.0.1", limited.port), timeout=20) as silent:
        assert silent.recv(10) == b""
    with socket.create_connection(("127.0.0.1", limited.port), timeout=0.2) as trickling:
        for byte in itertools.cycle(b"GET /health HTTP/1.1\r\nx: "):
            try:
                trickling.sendall(bytes([byte]))
                if trickling.recv(10) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
