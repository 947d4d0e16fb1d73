"""One thread steps the engine; requests come from the event loop and events go back to it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from dsv4_core.graph.engine import Event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from dsv4_core.graph.engine import Engine, Request
    from dsv4_serve.ranks import Lead


Heard: TypeAlias = "asyncio.Queue[tuple[int, Event] | None]"


class Running:
    """What a client asked for, one request or several, as the engine works on it. It is cancelled
    when nobody holds it any more.
    """

    def __init__(self, count: int, cancel: Callable[[int], None], queue: Heard) -> None:
        """``cancel(i)``: end the ``i``-th of the requests. ``queue``: where their events come."""
        self._cancel, self._queue, self._open = cancel, queue, set(range(count))

    async def events(self, silence: float) -> AsyncGenerator[tuple[int, Event] | None, None]:
        """What happens, with the request's number, until all are over; None after each so many
        seconds without news.
        """
        loop = asyncio.get_running_loop()
        heard = loop.time()
        timer: asyncio.TimerHandle

        def tick() -> None:
            nonlocal heard, timer
            left = heard + silence - loop.time()
            if left <= 0:
                heard, left = loop.time(), silence
                self._queue.put_nowait(None)
            timer = loop.call_later(left, tick)

        timer = loop.call_later(silence, tick)
        try:
            while self._open:
                told = await self._queue.get()
                if told is not None:
                    heard = loop.time()
                    if told[0] not in self._open:
                        continue
                    if told[1].finish is not None:
                        self._open.discard(told[0])
                yield told
        finally:
            timer.cancel()

    def cancel(self, which: int) -> None:
        """End one of them; no error where it is over."""
        if which in self._open:
            self._open.discard(which)
            self._cancel(which)

    def close(self) -> None:
        """End all that are not over."""
        for which in tuple(self._open):
            self.cancel(which)

    def __del__(self) -> None:
        self.close()


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
        self._listeners: dict[int, tuple[asyncio.AbstractEventLoop, Heard, int]] = {}
        self._thread = threading.Thread(target=self._run, name="dsv4 engine", daemon=True)
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Running:
        """Let the engine take requests: all, or none where it refuses one. Raises what
        ``Engine.submit`` does, ``RuntimeError`` where the thread has ended.
        """
        loop = asyncio.get_running_loop()
        heard: Heard = asyncio.Queue()
        taken: Future[list[int]] = Future()

        def submit() -> None:
            names: list[int] = []
            try:
                for request in requests:
                    names.append(self.engine.submit(request))
                    if self.lead:
                        self.lead.submitted(request)
            except Exception as error:  # noqa: BLE001  it goes to the one who asked
                for name in names:
                    self._end(name)
                taken.set_exception(error)
                return
            self._listeners.update({name: (loop, heard, i) for i, name in enumerate(names)})
            taken.set_result(names)

        if self.failed:
            raise RuntimeError(f"the engine has stopped: {self.failed}")
        running = Running(len(requests), lambda which: taken.add_done_callback(partial(self._cancel, which)), heard)
        self._inbox.put(submit)
        await asyncio.shield(asyncio.wrap_future(taken))
        return running

    def _cancel(self, which: int, taken: Future[list[int]]) -> None:
        if taken.exception() is None:
            name = taken.result()[which]
            self._inbox.put(lambda: self._end(name))

    def _end(self, name: int) -> None:
        self._listeners.pop(name, None)
        self.engine.cancel(name)
        if self.lead:
            self.lead.cancelled(name)

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
                self._tell(events)
        except BaseException as error:  # noqa: BLE001  nobody else would hear of it
            self.failed = error
            why = RuntimeError(f"the engine has stopped: {error}")
            self._tell([Event(name, finish="error", error=why) for name in self._listeners])

    def _tell(self, events: Sequence[Event]) -> None:
        """Pass a step's events on, all that go to one event loop by one call."""
        told: dict[asyncio.AbstractEventLoop, list[tuple[Heard, int, Event]]] = {}
        for event in events:
            if listener := self._listeners.get(event.id):
                loop, heard, which = listener
                told.setdefault(loop, []).append((heard, which, event))
            if event.finish:
                self._listeners.pop(event.id, None)
        for loop, several in told.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_hear, several)


def _hear(several: list[tuple[Heard, int, Event]]) -> None:
    for heard, which, event in several:
        heard.put_nowait((which, event))
