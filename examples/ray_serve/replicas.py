"""Replicas of ``dsv4 serve`` behind one address, by Ray Serve.

    pip install 'dsv4[serve,torch]' 'ray[serve]' httpx
    REPLICAS=2 DSV4_SERVE="-b torch" serve run replicas:app

Each replica is a process of its own with its own weights and its own prefixes; Ray starts it again
when it has ended. ``DSV4_SERVE``: what ``dsv4 serve`` is told (a model's directory, a backend,
slots).
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

PASSED_ON = ("content-type", "authorization", "x-api-key", "anthropic-version")


@serve.deployment(num_replicas=int(os.environ.get("REPLICAS", "2")), max_ongoing_requests=64)
class Replica:
    """One server and the way to it."""

    def __init__(self, arguments: str) -> None:
        command = [sys.executable, "-m", "dsv4_core", "serve", "--port", "0", *shlex.split(arguments)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603  the operator's words
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "serving " in line:
                break
        else:
            raise RuntimeError("dsv4 serve ended: " + "".join(said[-5:]))
        url = said[-1].split()[-1].removesuffix("/v1")
        threading.Thread(target=shutil.copyfileobj, args=(self.process.stderr, sys.stderr), daemon=True).start()
        self.client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(None, connect=10))

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        if self.process.poll() is not None:
            raise RuntimeError(f"dsv4 serve ended with status {self.process.returncode}")

    async def __call__(self, request: Request) -> StreamingResponse:
        headers = {name: value for name, value in request.headers.items() if name in PASSED_ON}
        asked = self.client.build_request(
            request.method, request.url.path, content=await request.body(), headers=headers
        )
        reply = await self.client.send(asked, stream=True)

        async def parts():
            try:
                async for part in reply.aiter_raw():
                    yield part
            finally:
                await reply.aclose()  # a client that left leaves its slot free

        return StreamingResponse(parts(), reply.status_code, media_type=reply.headers.get("content-type"))

    def __del__(self) -> None:
        self.process.terminate()
        self.process.wait()


app = Replica.bind(os.environ.get("DSV4_SERVE", ""))
