"""What the engine's loop tells of: plain facts that can go to another process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["taken", "started", "turn", "preview", "finished", "failed", "ready"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    kind: "taken" from the queue, "started" and "finished" of a picture, "preview" with a JPEG,
        "turn" of all rows of a call, "failed" with a sentence, "ready" of the engine
    job, index: whose picture; "" where it is nobody's
    data: by kind; started: total. turn: seconds of the step, elapsed since the last where rows
        waited, limit of rows now, and rows as [job, index, calls, total]. preview: step.
        finished: settings, batched. failed: code, message
    blob: a file
    """

    kind: Kind
    job: str = ""
    index: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    blob: bytes = field(default=b"", repr=False)
