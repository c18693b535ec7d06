"""The engine as the process that speaks HTTP sees it, wherever the engine is."""

from collections.abc import Callable
from typing import Protocol

from serving.events import Event
from serving.loop import Loop, Order

__all__ = ["EngineClient", "LocalEngine"]


class EngineClient(Protocol):
    """Takes orders; what becomes of them is told to whoever started it."""

    @property
    def is_ready(self) -> bool:
        """Whether orders are drawn now."""
        ...

    def start(self, tell: Callable[[Event], None]) -> None:
        """Begin to draw; tell: takes events, on any thread."""
        ...

    def submit(self, order: Order) -> None:
        """Draw an order's pictures."""
        ...

    def cancel(self, job: str) -> None:
        """Drop a job's pictures, if they are still there."""
        ...

    def stop(self) -> None:
        """End, whatever is unfinished."""
        ...


class LocalEngine:
    """An engine in threads of this process: for tests, and where nothing may start a process."""

    def __init__(self, make: Callable[[Callable[[Event], None]], Loop]) -> None:
        self._make = make
        self._loop: Loop | None = None

    @property
    def is_ready(self) -> bool:
        """As `EngineClient` says."""
        return self._loop is not None

    def start(self, tell: Callable[[Event], None]) -> None:
        """As `EngineClient` says."""
        self._loop = self._make(tell)
        self._loop.start()

    def submit(self, order: Order) -> None:
        """As `EngineClient` says."""
        assert self._loop is not None
        self._loop.submit(order)

    def cancel(self, job: str) -> None:
        """As `EngineClient` says."""
        if self._loop is not None:
            self._loop.cancel(job)

    def stop(self) -> None:
        """As `EngineClient` says."""
        if self._loop is not None:
            self._loop.stop()
            self._loop = None
