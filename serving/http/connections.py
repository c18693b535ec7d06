"""Connections: one that does not say what it wants within a while is closed."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, which waits only so long for a request's line and headers.

    uvicorn's own limit is on what is idle between two requests, not on one that has begun.
    """

    header_seconds = HEADER_SECONDS
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Begin to wait where a further request has begun, and stop where one has come."""
        super().data_received(data)
        if not self._is_awaited:
            self._stop()
        elif self._late is None and self.conn.trailing_data[0]:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop()
        super().connection_lost(exc)

    @property
    def _is_awaited(self) -> bool:
        """Whether no request is under way whose headers have come."""
        answered: Any = self.cycle is None or self.cycle.response_complete
        return bool(answered) and self.conn.their_state is h11.IDLE

    def _wait(self) -> None:
        self._late = self.loop.call_later(self.header_seconds, self._close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        self._late = None
        if self._is_awaited and not self.transport.is_closing():
            self.transport.close()
