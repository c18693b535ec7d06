"""Server-sent events, as the HTML standard has them: `event:`, `id:`, `data:`, an empty line."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

KEEP_ALIVE = 10.0  # seconds after which a comment shows that the connection lives
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def event(name: str, data: Mapping[str, Any], number: int | None = None) -> bytes:
    """Return one event; number: what a client that comes back says it has seen."""
    seen = "" if number is None else f"id: {number}\n"
    return f"event: {name}\n{seen}data: {json.dumps(data)}\n\n".encode()


async def kept_alive(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield events, and a comment whenever none has come for a while."""
    pending: asyncio.Task[bytes] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE)
            if not done:
                yield b": waiting\n\n"
                continue
            task, pending = pending, None
            try:
                yield task.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()


class EventStream(StreamingResponse):
    """The answer that sends events; `left` is called when it ends, whoever has ended it."""

    def __init__(self, events: AsyncIterator[bytes], left: Callable[[], None]) -> None:
        super().__init__(kept_alive(events), media_type="text/event-stream", headers=HEADERS)
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()
