"""One thread steps the engine; requests come from the event loop and events go back to it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from dsv4_core.graph.engine import Event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from dsv4_core.graph.engine import Engine, Request
    from dsv4_serve.ranks import Lead


class Running:
    """A request that the engine has taken. It is cancelled when nobody holds it any more."""

    def __init__(self, cancel: Callable[[], None], events: asyncio.Queue[Event]) -> None:
        self._cancel, self._queue, self._over = cancel, events, False

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens to it, until it is over."""
        while not self._over:
            event = await self._queue.get()
            self._over = event.finish is not None
            yield event

    def cancel(self) -> None:
        """End it; no error where it is over."""
        if not self._over:
            self._over = True
            self._cancel()

    def __del__(self) -> None:
        self.cancel()


class Worker:
    """Owns the engine. ``failed``: what ended the thread, None while all is well."""

    def __init__(
        self, engine: Engine, observe: Callable[[Engine, float], None] | None = None, lead: Lead | None = None
    ) -> None:
        """``observe(engine, seconds)`` is called after each step, on the thread; ``lead`` tells
        other ranks what to do alike.
        """
        self.engine, self._observe, self.lead = engine, observe, lead
        self.failed: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._thread = threading.Thread(target=self._run, name="dsv4 engine", daemon=True)
        self._thread.start()

    async def submit(self, request: Request) -> Running:
        """Let the engine take a request. Raises what ``Engine.submit`` does, ``RuntimeError`` where
        the thread has ended.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        taken: Future[int] = Future()

        def submit() -> None:
            try:
                name = self.engine.submit(request)
            except Exception as error:  # noqa: BLE001  it goes to the one who asked
                taken.set_exception(error)
                return
            if self.lead:
                self.lead.submitted(request)
            self._listeners[name] = lambda event: _tell(loop, events, event)
            taken.set_result(name)

        if self.failed:
            raise RuntimeError(f"the engine has stopped: {self.failed}")
        self._inbox.put(submit)
        running = Running(lambda: taken.add_done_callback(self._cancel), events)
        await asyncio.shield(asyncio.wrap_future(taken))
        return running

    def _cancel(self, taken: Future[int]) -> None:
        if taken.exception() is not None:
            return
        name = taken.result()

        def cancel() -> None:
            self._listeners.pop(name, None)
            self.engine.cancel(name)
            if self.lead:
                self.lead.cancelled(name)

        self._inbox.put(cancel)

    def stop(self) -> None:
        """End the thread when it comes to it."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                while not self._inbox.empty() or self.engine.idle:
                    try:
                        task = self._inbox.get(timeout=self.lead.patience if self.lead else None)
                    except queue.Empty:
                        break
                    if task is None:
                        if self.lead:
                            self.lead.end()
                        return
                    task()
                if self.lead:
                    self.lead.tell()
                began = time.perf_counter()
                events = self.engine.step()
                if self._observe:
                    self._observe(self.engine, time.perf_counter() - began)
                for event in events:
                    if listener := self._listeners.get(event.id):
                        listener(event)
                    if event.finish:
                        self._listeners.pop(event.id, None)
        except BaseException as error:  # noqa: BLE001  nobody else would hear of it
            self.failed = error
            for name, listener in self._listeners.items():
                listener(Event(name, finish="error", error=RuntimeError(f"the engine has stopped: {error}")))
            self._listeners.clear()


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
