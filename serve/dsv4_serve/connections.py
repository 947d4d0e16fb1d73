"""Connections that bring no request: each has so many seconds for the head of its next one, however
slowly it sends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

HEAD_SECONDS = 30.0


class Connection(H11Protocol):
    """Uvicorn's, which waits for a request's first line as long as the client likes; this one
    closes.
    """

    head_seconds = HEAD_SECONDS
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there."""
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        """Bytes came, or a reply is complete."""
        super().handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._patience is None:
            self._patience = self.loop.call_later(self.head_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def patient(seconds: float) -> type[Connection]:
    """Connections that wait so many seconds for a head."""
    return type("Connection", (Connection,), {"head_seconds": seconds})
