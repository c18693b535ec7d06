"""Events reach the event loop in their order; it is woken once for all that have come."""

import pytest

from serving.event_inbox import EventInbox
from serving.events import Event


def test_a_loop_is_woken_once_for_several_events():
    calls, received = [], []
    inbox = EventInbox(calls.append, received.append)
    events = [Event(kind="turn", index=number) for number in range(5)]
    for event in events[:3]:
        inbox.put(event)
    assert len(calls) == 1
    calls.pop()()
    assert received == events[:3]
    for event in events[3:]:
        inbox.put(event)
    assert len(calls) == 1
    calls.pop()()
    assert received == events


def test_an_event_that_comes_meanwhile_wakes_the_loop_again():
    calls, received = [], []
    events = [Event(kind="turn", index=number) for number in range(2)]

    def receive(event):
        received.append(event)
        if event is events[0]:
            inbox.put(events[1])

    inbox = EventInbox(calls.append, receive)
    inbox.put(events[0])
    calls.pop()()
    assert received == events[:1]
    calls.pop()()
    assert received == events


def test_an_event_that_fails_keeps_no_other_back():
    calls, received = [], []

    def receive(event):
        if event.index == 0:
            raise ValueError("a mistake")
        received.append(event.index)

    inbox = EventInbox(calls.append, receive)
    for number in range(3):
        inbox.put(Event(kind="turn", index=number))
    with pytest.raises(ValueError, match="a mistake"):
        calls.pop()()
    calls.pop()()
    assert received == [1, 2]
    assert not calls
