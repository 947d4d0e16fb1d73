"""One server on the embedded model for all tests of a run, on a free port of this machine."""

import asyncio
import threading
import time

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("deepseek_recipe")
pytest.importorskip("llguidance")

import uvicorn
from dsv4_serve.running import application, configuration

import dsv4_core


def made(**options):
    """An application on the embedded model, greedy enough to compare: batch invariant."""
    session = dsv4_core.load(backend="reference", batch_invariant=True, lazy=True)
    return application(session, **{"slots": 4, "context": 1200, "thinking": False, "profile": "official", **options})


class Running:
    """An application that listens, in a thread."""

    def __init__(self, app):
        self.app = app
        self.server = uvicorn.Server(configuration(app, port=0))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def idle(self):
        """Wait until no request is left in the engine."""
        while not self.app.worker.engine.idle:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.app.worker.stop()


@pytest.fixture(scope="session")
def server():
    running = Running(made())
    yield running
    running.close()


@pytest.fixture(scope="session")
def limited():
    """A server with a key, one slot, one place in the queue and small bodies."""
    running = Running(
        made(slots=1, queue=1, key="secret", largest=5000, body_seconds=0.5, keep_alive=0.01, name="small")
    )
    yield running
    running.close()
