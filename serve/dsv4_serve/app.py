"""Routes, limits, the key and the log: everything of a server that is about HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsv4_core.graph.cache import CacheError
from dsv4_core.graph.engine import BusyError
from dsv4_serve import completions, protocol
from dsv4_serve.forms import BODIES
from dsv4_serve.openapi import document
from dsv4_serve.refusal import RefusedError
from dsv4_serve.schema import check
from dsv4_serve.waiting import watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.requests import Request

    from dsv4_core.graph.engine import Event
    from dsv4_serve.metrics import Metrics
    from dsv4_serve.served import Served
    from dsv4_serve.worker import Running, Worker

LOG = logging.getLogger("dsv4.serve")
KEEP_ALIVE = 10.0  # seconds of silence after which a stream gets a comment, so that nobody between gives up


class App:
    """The server of one model. ``draining``: no new requests are taken, those under way end."""

    def __init__(
        self,
        served: Served,
        worker: Worker,
        metrics: Metrics,
        *,
        key: str | None = None,
        largest: int = 10 << 20,
        body_seconds: float = 30.0,
        keep_alive: float = KEEP_ALIVE,
    ) -> None:
        """``key``: what clients must give. ``largest``: bytes of a body. ``body_seconds``: how long
        one may take to come, and the head before it.
        """
        self.served, self.worker, self.metrics = served, worker, metrics
        self.key, self.largest, self.body_seconds, self.keep_alive = key, largest, body_seconds, keep_alive
        self.draining = False

    def asgi(self) -> Starlette:
        """The application."""
        post, get = ["POST"], ["GET"]
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._route("chat", self._protocol("chat")), methods=post),
                Route("/v1/responses", self._route("responses", self._protocol("responses")), methods=post),
                Route("/v1/messages", self._route("messages", self._protocol("messages")), methods=post),
                Route("/v1/messages/count_tokens", self._route("messages", self._count), methods=post),
                Route("/v1/completions", self._route("completions", self._completions), methods=post),
                Route("/v1/models", self._route("models", self._models), methods=get),
                Route("/v1/models/{name:path}", self._route("models", self._models), methods=get),
                Route("/tokenize", self._route("tokenize", self._tokenize), methods=post),
                Route("/detokenize", self._route("tokenize", self._detokenize), methods=post),
                Route("/metrics", self._metrics, methods=get),
                Route("/health", self._health, methods=get),
                Route("/ready", self._ready, methods=get),
                Route("/version", self._version, methods=get),
                Route("/openapi.json", self._openapi, methods=get),
                Route("/", self._page, methods=get),
            ],
            exception_handlers={404: _no_such_route, 405: _no_such_route},
        )

    # what every route of the protocols shares

    def _route(
        self, name: str, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            began, anthropic = time.monotonic(), name == "messages"
            try:
                self._check_key(request)
                self._check_open(request)
                response = await handle(request)
            except RefusedError as error:
                response = _error(error, anthropic=anthropic)
            except BusyError as error:
                response = _error(
                    RefusedError(f"overloaded: {error}", status=429, kind="rate_limit_error"), anthropic=anthropic
                )
            except (CacheError, ValueError, RecursionError) as error:
                response = _error(RefusedError(str(error)), anthropic=anthropic)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it; nginx's number for it, in log and metrics
            except Exception as error:
                LOG.exception("a request failed")
                status = 503 if self.worker.failed else 500
                response = _error(RefusedError.failed(error, status=status), anthropic=anthropic)
            if response.status_code in {429, 503}:
                response.headers["retry-after"] = "1"
            self.metrics.requests.labels(name, response.status_code).inc()
            if response.status_code != 200 or not isinstance(response, StreamingResponse):
                self._log(name, response.status_code, began)
            return response

        return answer

    def _log(self, route: str, status: int, began: float, **more: Any) -> None:
        LOG.info(json.dumps({"route": route, "status": status, "seconds": round(time.monotonic() - began, 4), **more}))

    def _check_open(self, request: Request) -> None:
        if self.draining and request.method == "POST":
            raise RefusedError("the server is shutting down; try another or later", status=503, kind="server_error")

    def _check_key(self, request: Request) -> None:
        if self.key is None:
            return
        given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise RefusedError("the API key is missing or wrong", status=401, kind="authentication_error")

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object that a request brings."""

        async def read() -> bytes:
            parts: list[bytes] = []
            size = 0
            async for part in request.stream():
                size += len(part)
                if size > self.largest:
                    raise RefusedError(f"the body is larger than {self.largest} bytes", status=413)
                parts.append(part)
            return b"".join(parts)

        try:
            raw = await asyncio.wait_for(read(), self.body_seconds)
        except asyncio.TimeoutError:
            raise RefusedError(f"the body did not come within {self.body_seconds:g} s", status=408) from None
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise RefusedError(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise RefusedError('the body must be a JSON object, as {"model": ...}')
        return body

    async def _events(
        self, running: Running, began: float, silence: float
    ) -> AsyncGenerator[tuple[int, Event] | None, None]:
        """What happens to a client's requests, with each one's number, timed; None after each
        ``silence`` seconds without news. In the end they are cancelled.
        """
        last: dict[int, float] = {}
        try:
            async with contextlib.aclosing(running.events(silence)) as events:
                async for told in events:
                    if told is not None:
                        which, event = told
                        if event.chosen:
                            now = time.monotonic()
                            before = last.get(which)
                            (self.metrics.first if before is None else self.metrics.between).observe(
                                now - (before or began)
                            )
                            last[which] = now
                        if event.error:
                            raise event.error
                    yield told
        finally:
            running.close()

    # the protocols

    def _protocol(self, kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            began = time.monotonic()
            body = await self._body(request)
            name = f"{ {'chat': 'chatcmpl', 'responses': 'resp', 'messages': 'msg'}[kind] }-{uuid.uuid4().hex}"
            asked = await asyncio.to_thread(protocol.asked, kind, body, self.served, name)
            running = await self.worker.submit(asked.requests)
            if asked.stream:
                stream = self._streamed(kind, asked, running, began)
                return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            choices = asked.choices
            async with watched(request) as gone, contextlib.aclosing(self._events(running, began, 0.5)) as events:
                async for event in events:
                    if gone.is_set():
                        break
                    if event:
                        choices.add(*event)
                        if choices.is_finished(event[0]):
                            running.cancel(event[0])
                    if choices.finished:
                        break
            return Response(choices.whole(), media_type="application/json")

        return handle

    async def _streamed(
        self, kind: str, asked: protocol.Asked, running: Running, began: float
    ) -> AsyncGenerator[str, None]:
        tokens, choices = 0, asked.choices
        try:
            async with contextlib.aclosing(self._events(running, began, self.keep_alive)) as events:
                async for event in events:
                    if event is None:
                        yield ": still working\n\n"
                        continue
                    tokens += event[1].chosen is not None
                    for text in choices.stream(*event):
                        yield text
                    if choices.is_finished(event[0]):
                        running.cancel(event[0])
                    if choices.finished:
                        break
            yield choices.done()
        except Exception as error:
            LOG.exception("a stream failed")
            body = RefusedError.failed(error).body(anthropic=kind == "messages")
            yield f"event: error\ndata: {json.dumps(body)}\n\n"
        finally:
            running.close()
            finished = choices.finished
            choices.close()
            self._log(kind, 200, began, prompt=len(asked.requests[0].prompt), tokens=tokens, finished=finished)

    async def _count(self, request: Request) -> Response:
        body = {"max_tokens": 1, **await self._body(request)}
        asked = await asyncio.to_thread(protocol.asked, "messages", body, self.served, "count", counted=True)
        return JSONResponse({"input_tokens": len(asked.requests[0].prompt)})

    async def _completions(self, request: Request) -> Response:
        began = time.monotonic()
        body = await self._body(request)
        asked = await asyncio.to_thread(completions.asked, body, self.served)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": self.served.clock(),
            "model": self.served.name,
        }
        running = await self.worker.submit([one.request for one in asked])
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            stream = self._streamed_completions(asked, running, head, began, usage=usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        async with watched(request) as gone, contextlib.aclosing(self._events(running, began, 0.5)) as events:
            async for event in events:
                if gone.is_set():
                    break
                if event and not asked[event[0]].finish:
                    asked[event[0]].push(event[1])
                    if asked[event[0]].finish:
                        running.cancel(event[0])
                if all(one.finish for one in asked):
                    break
        choices = [one.choice(i, one.text) for i, one in enumerate(asked)]
        return JSONResponse({**head, "choices": choices, "usage": _usage(asked)})

    async def _streamed_completions(
        self,
        asked: list[completions.Completion],
        running: Running,
        head: dict[str, Any],
        began: float,
        *,
        usage: bool,
    ) -> AsyncGenerator[str, None]:
        try:
            async with contextlib.aclosing(self._events(running, began, self.keep_alive)) as events:
                async for event in events:
                    if event is None:
                        yield ": still working\n\n"
                        continue
                    i, one = event[0], asked[event[0]]
                    if one.finish:  # by a stop text, before the engine heard of it
                        continue
                    since = len(one.logprobs["tokens"])
                    text = one.push(event[1])
                    yield f"data: {json.dumps({**head, 'choices': [one.choice(i, text, since=since)]})}\n\n"
                    if one.finish:
                        running.cancel(i)
                    if all(other.finish for other in asked):
                        break
            if usage:
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(asked)})}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:
            LOG.exception("a stream failed")
            yield f"data: {json.dumps(RefusedError.failed(error).body(anthropic=False))}\n\n"
        finally:
            running.close()
            self._log("completions", 200, began, prompts=len(asked), tokens=sum(one.generated for one in asked))

    # the small ones

    async def _models(self, request: Request) -> Response:
        name = request.path_params.get("name")
        if name is not None:
            self.served.check_model(name)
        engine = self.served.engine
        model = {
            "id": self.served.name,
            "object": "model",
            "created": self.served.started,
            "owned_by": "dsv4",
            "context_length": engine.capacity,
        }
        return JSONResponse(model if name is not None else {"object": "list", "data": [model]})

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        check(body, BODIES["tokenize"])
        ids = self.served.vocabulary.words(body["prompt"])
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.served.engine.capacity})

    async def _detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        check(body, BODIES["detokenize"])
        vocab = self.served.engine.model.config.vocab_size
        if max(body["tokens"], default=0) >= vocab:
            raise RefusedError(f"tokens must be a list of ids in 0 .. {vocab - 1}", param="tokens")
        return JSONResponse({"prompt": self.served.vocabulary.text(body["tokens"])})

    async def _metrics(self, request: Request) -> Response:
        del request
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _health(self, request: Request) -> Response:
        del request
        failed = self.worker.failed
        return JSONResponse(
            {"status": "failed", "why": str(failed)} if failed else {"status": "ok"}, 503 if failed else 200
        )

    async def _ready(self, request: Request) -> Response:
        del request
        ready = not self.worker.failed and not self.draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _version(self, request: Request) -> Response:
        del request
        return JSONResponse({"version": version("dsv4")})

    async def _openapi(self, request: Request) -> Response:
        del request
        return JSONResponse(document(version("dsv4")))

    async def _page(self, request: Request) -> Response:
        del request
        return HTMLResponse(files("dsv4_serve").joinpath("page.html").read_text(encoding="utf-8"))


def _error(error: RefusedError, *, anthropic: bool) -> Response:
    return JSONResponse(error.body(anthropic=anthropic), error.status)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    what = "no such route" if status == 404 else "this route takes another method"
    refused = RefusedError(f"{request.method} {request.url.path}: {what}", status=status)
    return _error(refused, anthropic=request.url.path.startswith("/v1/messages"))


def _usage(asked: list[completions.Completion]) -> dict[str, int]:
    prompt = sum(len(one.request.prompt) for one in asked if one.first)
    generated = sum(one.generated for one in asked)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
