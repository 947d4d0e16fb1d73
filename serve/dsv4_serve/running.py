"""A server put together and run: weights, engine, worker, routes; SIGTERM lets what is under way
end.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import socket
from typing import TYPE_CHECKING, Any

import click
import uvicorn

from dsv4_core.graph.engine import Engine
from dsv4_core.text.fixed_texts import Profile, fixed_texts
from dsv4_core.text.tokenizer import Vocabulary
from dsv4_serve.app import App
from dsv4_serve.connections import patient
from dsv4_serve.metrics import Metrics
from dsv4_serve.ranks import Lead, follow
from dsv4_serve.served import Served
from dsv4_serve.worker import Worker

if TYPE_CHECKING:
    from dsv4_core.session import Session


def application(session: Session, *, queue: int = 64, **options: Any) -> App:
    """Load a session's weights and make its server; of several ranks the first one's. ``options``:
    see ``served_by`` and ``App``.
    """
    own = {name: options.pop(name) for name in list(options) if name in _OPTIONS}
    served = served_by(session, queue=queue, **own)
    metrics = Metrics()
    metrics.copy(served.engine)
    ranks = session.ranks.ranks
    return App(served, Worker(served.engine, metrics.observe, Lead(ranks) if ranks else None), metrics, **options)


def served_by(
    session: Session,
    *,
    name: str | None = None,
    slots: int = 8,
    context: int | None = None,
    queue: int | None = None,
    chunk: int = 512,
    drafts: bool = False,
    confidence: float = 0.0,
    thinking: bool = True,
    profile: Profile | None = None,
) -> Served:
    """Load a session's weights and make its engine, on each rank alike.

    Raises ``ValueError`` for a checkpoint without a tokenizer and for what the engine and the
    encoder refuse, before weights load where it can be known.
    """
    directory, config = session.directory, session.config
    if name is not None and not name.strip():
        raise ValueError("--name is empty; requests could not name the model: leave it out, or give a word")
    if session.tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer.json; a server needs it: copy it beside config.json")
    texts = fixed_texts(directory, profile)
    most = config.max_position_embeddings
    if context is not None and context > most:
        raise ValueError(
            f"--context {context}: the model has {most} positions (max_position_embeddings of config.json)"
        )
    if drafts and not config.draft:
        raise ValueError("--speculative: this checkpoint has no MTP block and no DSpark drafter; leave it out")
    if confidence and (not drafts or config.draft != "dspark"):
        raise ValueError(
            f"--draft-confidence {confidence}: only DSpark's drafts (--speculative) have one; leave it out"
        )
    capacity = context or min(8192, most)
    session.ranks.agree({"serving": [slots, capacity, chunk, drafts, confidence]})
    engine = Engine(
        session.model,
        slots=slots,
        capacity=capacity,
        chunk=chunk,
        queue=queue,
        drafts=session.load_drafter() if drafts else 0,
        confidence=confidence,
    )
    return Served(
        name or directory.name,
        directory,
        engine,
        Vocabulary(session.tokenizer),
        texts,
        session.defaults.ends,
        thinking=thinking,
    )


_OPTIONS = inspect.signature(served_by).parameters.keys()


def follow_first(session: Session, **options: Any) -> None:
    """Be one of the other ranks, until the first one ends; signals are its business."""
    for sort in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sort, signal.SIG_IGN)
    served = served_by(session, **options)
    assert session.ranks.ranks is not None
    follow(
        served.engine,
        session.ranks.ranks,
        lambda kind, schema, thinking, budget: served.constraint(kind, schema, thinking=thinking, budget=budget),
    )


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, before weights load; raise ``ValueError`` where it
    cannot be.
    """
    own = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except (OSError, UnicodeError) as error:
        if own is not None:
            own.close()
        why = error.strerror if isinstance(error, OSError) else "it is no host's name"
        raise ValueError(
            f"--host {host} --port {port}: nobody can listen there ({why}); --port 0 takes a free port"
        ) from None
    return own


def listen(app: App, address: socket.socket, drain_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT; then refuse what is new and end what is under way, for so many
    seconds.

    Where other ranks follow, an engine that fails ends the server: they wait in an exchange that is
    not to be.
    """
    server = _Server(configuration(app, timeout_graceful_shutdown=drain_seconds), app)
    asyncio.run(server.serve(sockets=[address]))
    if app.worker.lead and app.worker.failed:
        raise app.worker.failed
    app.worker.stop()


def configuration(app: App, **more: Any) -> uvicorn.Config:
    """How uvicorn runs the application; ``more``: its own settings."""
    return uvicorn.Config(app.asgi(), http=patient(app.body_seconds), log_level="warning", lifespan="off", **more)


class _Server(uvicorn.Server):
    """Says where it listens, and tells the application when it is to end."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        served, engine = self._app.served, self._app.served.engine
        for server in self.servers:
            for each in server.sockets:
                host, port = each.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                click.echo(f"serving {served.name} at http://{host}:{port}/v1", err=True)
        texts = served.texts
        click.echo(
            f"{engine.slots} slots of {engine.capacity} tokens, {engine.cache.nbytes / 1e6:.1f} MB of cache; chat texts: "
            + (f"{texts.profile}, from {texts.source}" if texts else "none (tools, formats and efforts are refused)")
            + f"; thinking {'on' if served.thinking else 'off'} where a request does not say; "
            + ("clients need the key" if self._app.key else "no key: whoever reaches this address may ask"),
            err=True,
        )

    async def on_tick(self, counter: int) -> bool:
        worker = self._app.worker
        return await super().on_tick(counter) or bool(worker.lead and worker.failed)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._app.draining = True
        click.echo(f"{signal.Signals(sig).name}: no new requests; those under way end", err=True)
        del frame
        self.force_exit = self.should_exit  # asked twice: at once
        self.should_exit = (
            True  # not the base's, which would end the process by the signal: draining is an end like another
        )
