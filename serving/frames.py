"""Frames: what goes between the server's process and the engine's, as JSON and raw bytes.

A frame is a line of JSON with the lengths of what follows, then that. Nothing in it is run: no
pickle crosses.
"""

import json
from collections.abc import Mapping, Sequence
from typing import IO, Any

from serving.enlarging_request import EnlargingRequest
from serving.events import Event
from serving.order import Order
from serving.picture_request import PictureRequest

MOST_OF_A_HEAD = 2**24


def write_frame(stream: IO[bytes], head: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
    """Write a frame whole. Raises OSError when nobody reads any more."""
    line = json.dumps({**head, "blobs": [len(blob) for blob in blobs]}).encode()
    stream.write(b"%d\n" % len(line) + line + b"".join(blobs))
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytes]] | None:
    """Read a frame; None at the end, and where the writer died in the middle of one."""
    length = stream.readline(20).strip()
    if not length.isdigit() or int(length) > MOST_OF_A_HEAD:
        return None
    line = stream.read(int(length))
    if len(line) < int(length):
        return None
    head: dict[str, Any] = json.loads(line)
    sizes = head.pop("blobs")
    blobs = [stream.read(size) for size in sizes]
    return None if [len(blob) for blob in blobs] != sizes else (head, blobs)


def of_event(event: Event) -> tuple[dict[str, Any], list[bytes]]:
    """Return the frame of an event."""
    head = {"kind": event.kind, "job": event.job, "index": event.index, "data": event.data}
    return head, [event.blob]


def to_event(head: Mapping[str, Any], blobs: Sequence[bytes]) -> Event:
    """Return the event of a frame."""
    return Event(**head, blob=blobs[0])


def of_order(order: Order) -> tuple[dict[str, Any], list[bytes]]:
    """Return the frame of an order."""
    picture_request, pictures = order.picture_request.packed()
    head = {
        "do": "submit",
        "job": order.job,
        "caller": order.caller,
        "priority": order.priority,
        "indices": list(order.indices),
        "draws": isinstance(order.picture_request, PictureRequest),
    }
    return head, [picture_request, *pictures]


def to_order(head: Mapping[str, Any], blobs: Sequence[bytes]) -> Order:
    """Return the order of a frame."""
    picture_request, *pictures = blobs
    fields = {name: head[name] for name in ("job", "caller", "priority", "indices")}
    kind = PictureRequest if head["draws"] else EnlargingRequest
    return Order(**fields, picture_request=kind.unpacked(picture_request, pictures))
