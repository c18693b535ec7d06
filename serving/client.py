"""The engine as the process that speaks HTTP sees it, wherever the engine is."""

from collections.abc import Callable
from typing import Protocol

from serving.events import Event
from serving.order import Order

__all__ = ["EngineClient"]


class EngineClient(Protocol):
    """Takes orders; what becomes of them is told to whoever started it."""

    @property
    def is_ready(self) -> bool:
        """Whether orders are drawn now."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """What its process has resident, None where nobody knows."""
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
