"""Two processes that serve as one: the first answers, the other steps; what is said is what one
rank says.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

pytest.importorskip("torch")
ASK = {"model": "tiny-jargon", "messages": [{"role": "user", "content": "What is kludge?"}], "max_tokens": 8}
SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
ASKS = [
    {"temperature": 0},
    {"seed": 7, "top_k": 20, "logprobs": True, "top_logprobs": 2},
    {"seed": (1 << 52) + 1, "n": 2},
    {"seed": 1, "max_tokens": 60, "response_format": FORMAT},
]


@pytest.fixture(params=[1, 2], ids=["tp", "ep"])
def ranks(request):
    """The addresses of a server of two ranks, and its processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    split = ["--tp", "2"] if request.param == 1 else ["--ep", "2"]
    words = ["serve", "--port", "0", "-b", "reference", "--numerics", "float64", "--no-thinking", "--slots", "4"]
    words += ["--context", "300", "--encoding-profile", "official", *split]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dsv4_core", *words],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    heard = [[], []]

    def read(rank):
        heard[rank] += processes[rank].stderr

    found = []
    for line in iter(processes[0].stderr.readline, ""):
        found.append(line)
        if "serving tiny-jargon at" in line:
            break
    else:
        said = [process.communicate()[1] for process in processes]
        pytest.fail("".join(found) + said[1])
    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    yield line.split()[-1], processes, heard
    for process in processes:
        process.kill()
        process.wait()
    for thread in threads:
        thread.join()
    for process in processes:
        process.stderr.close()


@pytest.mark.proof
def test_what_two_ranks_say_is_what_one_says(ranks, server):
    """The same words as of one rank in float64, sampled and kept to a schema too; a client that
    leaves; an end in order.
    """
    url, processes, heard = ranks
    from conftest import Running
    from dsv4_serve.running import application

    import dsv4_core

    session = dsv4_core.load(backend="reference", numerics="float64", lazy=True)
    one = Running(application(session, slots=4, context=300, thinking=False, profile="official"))

    def said(base, ask):
        reply = httpx.post(f"{base}/chat/completions", json={**ASK, **ask}, timeout=300)
        assert reply.status_code == 200, reply.text
        return [choice["message"]["content"] for choice in reply.json()["choices"]]

    with httpx.stream(
        "POST", f"{url}/chat/completions", json={**ASK, "max_tokens": 200, "stream": True}, timeout=300
    ) as left:
        next(left.iter_lines())
    for ask in ASKS:
        assert said(url, ask) == said(f"{one.url}/v1", ask)
    one.close()
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in processes] == [0, 0], heard
    logged = [json.loads(line) for line in heard[0] if line.startswith("{")]
    assert len(logged) == 1 + len(ASKS)


@pytest.mark.proof
def test_a_rank_that_is_lost_ends_the_server(ranks):
    _, processes, heard = ranks
    processes[1].kill()
    assert processes[0].wait(timeout=60) != 0
    assert "rank 1" in "".join(heard[0])
