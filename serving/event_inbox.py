"""The way of events from the engine's thread to the event loop, which is woken once for several."""

from collections import deque
from collections.abc import Callable

from serving.events import Event


class EventInbox:
    """Hands events on, in their order.

    call: has something called on the event loop, soon, from any thread
    receive: takes an event there
    """

    def __init__(
        self, call: Callable[[Callable[[], None]], object], receive: Callable[[Event], None]
    ) -> None:
        self._call = call
        self._receive = receive
        self._events: deque[Event] = deque()
        self._called = False

    def put(self, event: Event) -> None:
        """Take an event on any thread."""
        self._events.append(event)
        if not self._called:
            self._called = True
            self._call(self._hand_on)

    def _hand_on(self) -> None:
        self._called = False  # first: what comes from here on has the loop woken again
        try:
            for _ in range(len(self._events)):
                self._receive(self._events.popleft())
        finally:
            if self._events and not self._called:  # an event that failed keeps no other back
                self._called = True
                self._call(self._hand_on)
