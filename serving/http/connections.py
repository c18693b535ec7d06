"""Connections: one that does not say what it wants within a while, or takes nothing, is closed."""

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
STALLED_SECONDS = 30.0
UNSENT = getattr(socket, "TCP_NOTSENT_LOWAT", None)  # not of every system
UNSENT_BYTES = 2**16


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, which waits only so long for a request's line and headers, and for a reader.

    uvicorn's own limit is on what is idle between two requests, not on one that has begun, nor on
    an answer of which the client takes nothing: that would be held for as long as it likes, and
    the end of the server would wait for it.
    """

    header_seconds = HEADER_SECONDS
    stalled_seconds = STALLED_SECONDS
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # whatever the system does not take is noticed
        if UNSENT is not None:  # and it takes little more than the client does
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, UNSENT, UNSENT_BYTES)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Begin to wait where a further request has begun, and stop where one has come."""
        super().data_received(data)
        if not self._is_awaited:
            self._stop()
        elif self._late is None and self.conn.trailing_data[0]:
            self._wait()

    def pause_writing(self) -> None:
        """Begin to wait for the client to take some of what was written."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """Stop that: it has taken everything."""
        self._stop_for_reader()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop()
        self._stop_for_reader()
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

    def _wait_for_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.stalled_seconds, self._give_up, left)

    def _stop_for_reader(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _give_up(self, left: int) -> None:
        """Drop a client that has taken nothing, and wait on for one that is slow."""
        if self.transport.get_write_buffer_size() < left:
            self._wait_for_reader()
        else:
            self._stalled = None
            self.transport.abort()
