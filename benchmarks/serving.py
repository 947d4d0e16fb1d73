"""What a server gives to 1, 4, 16 and 64 clients at once: tokens a second, time to the first token,
time between tokens.

    python benchmarks/serving.py [--backend torch] [--clients 1 4 16 64] [--llama DIR]
    [--beside NAME URL MODEL] [--report FILE]

It starts ``dsv4 serve`` on the embedded model and asks for streamed completions of ids, greedily,
each client one after the other. ``--llama``: llama.cpp's server on the same weights, asked the same
in turn; DIR is what ``vs_llama_cpp.py DIR prepare`` made, and the server is built there when it is
missing (minutes). ``--beside``: another server of OpenAI's protocol that already runs. CPU seconds
are the server's own: on a machine that does other work they say more than the clock.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import psutil

from dsv4_core.checkpoint.weights import embedded


async def ask(client, url, model, prompt, tokens) -> tuple[float, np.ndarray]:
    """One streamed request: seconds to the first token, and between the others."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    began = time.perf_counter()
    async with client.stream("POST", f"{url}/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{url}: {reply.status_code} {(await reply.aread())[:300]!r}")
        times = [
            time.perf_counter()
            async for line in reply.aiter_lines()
            if line.startswith("data: {") and json.loads(line[6:])["choices"]
        ]
    return times[0] - began, np.diff(times)


async def load(url, model, clients, requests, tokens, length, vocab) -> list[tuple[float, np.ndarray]]:
    """Each of the clients asks its share of the requests; times of all."""
    rng = np.random.default_rng(clients)
    prompts = [rng.integers(10, vocab, length).tolist() for _ in range(requests)]
    # llama.cpp's server drops some requests that come on a connection that had one before
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=1200, limits=limits) as client:

        async def one(number) -> list[tuple[float, np.ndarray]]:
            return [await ask(client, url, model, prompt, tokens) for prompt in prompts[number::clients]]

        return [times for several in await asyncio.gather(*map(one, range(clients))) for times in several]


def measured(url, model, process, clients, given) -> dict[str, object]:
    """A row of the table."""
    requests = max(given.requests, clients)
    cpu = sum(process.cpu_times()[:2]) if process else 0.0
    began = time.perf_counter()
    times = asyncio.run(load(url, model, clients, requests, given.tokens, given.prompt, given.vocab))
    seconds = time.perf_counter() - began
    spent = sum(process.cpu_times()[:2]) - cpu if process else None
    first = np.array([t[0] for t in times])
    between = np.concatenate([t[1] for t in times])
    made = requests + len(between)
    return {
        "clients": clients,
        "requests": requests,
        "tokens/s": round(made / seconds, 1),
        "tokens/CPU s": spent and round(made / spent, 1),
        "first token ms": [round(1000 * float(np.percentile(first, q)), 1) for q in (50, 99)],
        "between ms": [round(1000 * float(np.percentile(between, q)), 1) for q in (50, 99)],
    }


CONVERT = """
import sys
sys.path[:0] = [sys.argv.pop(1)]
from conversion.deepseek import DeepseekV4Model
DeepseekV4Model.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
import convert_hf_to_gguf
convert_hf_to_gguf.main()
"""  # its converter tells tokenizers by what they give, and does not know the embedded model's


@contextlib.contextmanager
def running(words) -> Iterator[subprocess.Popen[bytes]]:
    """A server, ended whatever happens here; what it says goes to a file, so that no pipe fills."""
    with tempfile.TemporaryFile() as said, subprocess.Popen(list(map(str, words)), stderr=said) as process:
        process.said = said
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(90)  # serve's own limit is 60
            except subprocess.TimeoutExpired:
                process.kill()
                print(f"{words[0]}: did not end in 90 s after SIGTERM", file=sys.stderr)


def until(process, ready) -> str:
    """Wait for what ``ready`` gives."""
    while not (found := ready()):
        if process.poll() is not None:
            process.said.seek(0)
            raise SystemExit(f"ended with status {process.returncode}: {process.said.read().decode()[-500:]}")
        time.sleep(0.2)
    return found


def dsv4_url(process) -> str | None:
    """Where it says that it serves."""
    said = os.pread(process.said.fileno(), 10000, 0).decode()
    return next((line.split()[-1] for line in said.splitlines()[:-1] if "serving tiny-jargon at" in line), None)


def llama_server(folder, slots, context) -> tuple[list[object], str]:
    """Build llama.cpp's server and convert the embedded model by llama.cpp's own script: the
    command that starts the one on the other, and its URL.
    """
    sources = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"), None)
    if sources is None:
        raise SystemExit(f"{folder} has no llama.cpp; run: python benchmarks/vs_llama_cpp.py {folder} prepare")
    server, model = folder / "build/bin/llama-server", folder / "embedded.gguf"
    if not server.exists():
        settings = ("-S", sources, "-B", folder / "build", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF")
        for words in (settings, ("--build", folder / "build", "--target", "llama-server", "-j2")):
            subprocess.run(["cmake", *map(str, words)], check=True)  # noqa: S607  as in PATH
    if not model.exists():
        making = model.with_suffix(".part")
        subprocess.run([sys.executable, "-c", CONVERT, sources, embedded(), "--outfile", making], check=True)
        making.rename(model)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    words = [server, "-m", model, "--port", port, "-np", str(slots), "-c", str(slots * context), "--no-webui"]
    words += ["--no-repack"] * (" amx_tile" in Path("/proc/cpuinfo").read_text())  # as vs_llama_cpp.py says
    return words, f"http://127.0.0.1:{port}"


def healthy(url) -> str | None:
    """The API's address, once llama.cpp's server is ready."""
    with contextlib.suppress(httpx.TransportError):
        if httpx.get(f"{url}/health").status_code == 200:
            return f"{url}/v1"
    return None


def main() -> None:
    """Measure, print, write the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=16, help="at least; each client asks one or more")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=40, help="tokens of a prompt")
    parser.add_argument("--vocab", type=int, default=2000)
    parser.add_argument("--beside", nargs=3, metavar=("NAME", "URL", "MODEL"), action="append", default=[])
    parser.add_argument("--llama", type=Path, metavar="DIR")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    words = [sys.executable, "-m", "dsv4_core", "serve", "-b", given.backend, "--port", 0, "--context", 256]
    rows = {}
    with contextlib.ExitStack() as ended:
        process = ended.enter_context(running([*words, "--slots", max(given.clients)]))
        url = until(process, lambda: dsv4_url(process))
        servers = [("dsv4", url, "tiny-jargon", psutil.Process(process.pid))]
        servers += [(name, other, model, None) for name, other, model in given.beside]
        if given.llama:
            command, at = llama_server(given.llama, max(given.clients), 256)
            llama = ended.enter_context(running(command))
            servers.append(("llama.cpp", until(llama, lambda: healthy(at)), "embedded", psutil.Process(llama.pid)))
        first = argparse.Namespace(**{**vars(given), "requests": 2})
        for clients in given.clients:
            for name, at, model, who in servers:
                measured(at, model, who, clients, first)  # a server that has seen so many before
                rows.setdefault(name, []).append(measured(at, model, who, clients, given))
                print(name, json.dumps(rows[name][-1]), flush=True)
    report = {
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "backend": given.backend,
        "prompt": given.prompt,
        "tokens": given.tokens,
        "percentiles": [50, 99],
        "load of the machine": [round(x, 1) for x in psutil.getloadavg()],
        "processors": psutil.cpu_count(),
        "versions": {name: version(name) for name in ("dsv4", "torch", "numpy", "starlette", "uvicorn")},
        "rows": rows,
    }
    if given.report:
        given.report.parent.mkdir(parents=True, exist_ok=True)
        given.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
