"""A server put together and run: weights, engine, worker, routes; SIGTERM lets what is under way end."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import click
import uvicorn

from dsv4_core.graph.engine import Engine
from dsv4_core.text.fixed_texts import Profile, fixed_texts
from dsv4_core.text.tokenizer import Vocabulary
from dsv4_serve.app import App
from dsv4_serve.metrics import Metrics
from dsv4_serve.served import Served
from dsv4_serve.worker import Worker

if TYPE_CHECKING:
    from dsv4_core.session import Session


def application(
    session: Session,
    *,
    name: str | None = None,
    slots: int = 8,
    context: int | None = None,
    queue: int = 64,
    chunk: int = 512,
    drafts: bool = False,
    thinking: bool = True,
    profile: Profile | None = None,
    **limits: Any,
) -> App:
    """Load a session's weights and make its server; ``limits``: see ``App``.

    Raises ``ValueError`` for a checkpoint without a tokenizer and for what the engine and the encoder refuse, before weights
    load where it can be known.
    """
    directory, config = session.directory, session.config
    if session.tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer.json; a server needs it: copy it beside config.json")
    texts = fixed_texts(directory, profile)
    most = config.max_position_embeddings
    if context is not None and context > most:
        raise ValueError(f"--context {context}: the model has {most} positions (max_position_embeddings)")
    engine = Engine(
        session.model,
        slots=slots,
        capacity=context or min(8192, most),
        chunk=chunk,
        queue=queue,
        drafts=session.load_drafter() if drafts else 0,
    )
    served = Served(
        name or directory.name,
        directory,
        engine,
        Vocabulary(session.tokenizer),
        texts,
        session.defaults.ends,
        thinking=thinking,
    )
    metrics = Metrics()
    metrics.copy(engine)
    return App(served, Worker(engine, metrics.observe), metrics, **limits)


def listen(app: App, host: str, port: int, drain_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT; then refuse what is new and end what is under way, for so many seconds."""
    config = uvicorn.Config(
        app.asgi(), host=host, port=port, log_level="warning", timeout_graceful_shutdown=drain_seconds, lifespan="off"
    )
    server = _Server(config, app)
    asyncio.run(server.serve())


class _Server(uvicorn.Server):
    """Says where it listens, and tells the application when it is to end."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        served, engine = self._app.served, self._app.served.engine
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                click.echo(f"serving {served.name} at http://{host}:{port}/v1", err=True)
        texts = served.texts
        click.echo(
            f"{engine.slots} slots of {engine.capacity} tokens, {engine.cache.nbytes / 1e6:.1f} MB of cache; chat texts: "
            + (f"{texts.profile}, from {texts.source}" if texts else "none (tools, formats and efforts are refused)")
            + f"; thinking {'on' if served.thinking else 'off'} where a request does not say; "
            + ("clients need the key" if self._app.key else "no key: whoever reaches this address may ask"),
            err=True,
        )

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._app.draining = True
        click.echo(f"{signal.Signals(sig).name}: no new requests; those under way end", err=True)
        del frame
        self.force_exit = self.should_exit  # asked twice: at once
        self.should_exit = (
            True  # not the base's, which would end the process by the signal: draining is an end like another
        )
