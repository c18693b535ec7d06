"""Jobs: what was asked for, how far it is, what became of it, and who listens.

All of it lives in the memory of the process that speaks HTTP, on its event loop: finished pictures
are kept for a while, bounded in seconds and in bytes, the oldest going first.
"""

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serving.admission import Admission
from serving.client import EngineClient
from serving.enlarging_request import EnlargingRequest
from serving.errors import (
    BadRequestError,
    ConflictError,
    EngineFailedError,
    NotFoundError,
    RefusalError,
    TooLateError,
    UnavailableError,
)
from serving.events import Event
from serving.limits import Limits
from serving.metrics import Metrics
from serving.order import Order
from serving.picture_request import PictureRequest

State = Literal["queued", "running", "done", "failed", "cancelled"]
OVER = frozenset(("done", "failed", "cancelled"))
NEWEST_ONLY = frozenset(("queued", "preview"))  # events of which an older one says nothing more
EVENTS_KEPT = 64  # of a job, for whoever reads slowly or comes back
FETCH_SECONDS = 10.0  # that a server that ends waits for a finished picture to be fetched
ID_BYTES = 16
FAILURES: Mapping[str, type[RefusalError]] = {
    "engine_failed": EngineFailedError,
    "model_unavailable": UnavailableError,
    "not_finite": EngineFailedError,
}


@dataclass(slots=True, kw_only=True)  # frozen, one a step would take twice as long
class JobEvent:
    """An event as a client reads it; number: counts up within a job."""

    number: int
    name: str
    data: Mapping[str, Any]
    blob: bytes = field(default=b"", repr=False)


@dataclass(slots=True, kw_only=True)
class DrawnPicture:
    """One picture of a job: how far it is, and its file at the end."""

    calls: int = 0
    total: int = 0
    data: bytes = field(default=b"", repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    batched: bool = False
    fetched: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request on its way.

    caller: the name of the key that it came with; api: by which it came
    error: why there are no pictures
    position: how many requests were to be finished before it when that was last told; eta: in about
        how many seconds it is finished, 0 while the rate is not known
    """

    id: str
    picture_request: PictureRequest | EnlargingRequest
    caller: str
    api: str
    created: float
    priority: int = 0
    state: State = "queued"
    pictures: list[DrawnPicture] = field(default_factory=list)
    error: RefusalError | None = None
    undone: float = 0.0
    position: int = -1
    eta: float = 0.0
    ended: float | None = None
    first_step: float | None = None
    events: deque[JobEvent] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    deadline: asyncio.TimerHandle | None = None
    _numbers: int = 0

    def tell(self, name: str, blob: bytes = b"", **data: Any) -> None:
        """Keep an event and wake whoever listens; a newer preview or place replaces an older."""
        self._numbers += 1
        if name in NEWEST_ONLY:
            index = data.get("index")
            for old in [e for e in self.events if e.name == name and e.data.get("index") == index]:
                self.events.remove(old)
        self.events.append(JobEvent(number=self._numbers, name=name, data=data, blob=blob))
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in OVER

    @property
    def kept_bytes(self) -> int:
        """Of its pictures."""
        return sum(len(picture.data) for picture in self.pictures)

    async def follow(self, after: int = 0) -> AsyncIterator[JobEvent]:
        """Yield its events from one on, until it is over; one that reads slowly misses some."""
        while True:
            changed = self.changed
            for event in [event for event in self.events if event.number > after]:
                after = event.number
                yield event
            if self.is_over and not any(event.number > after for event in self.events):
                return
            if not any(event.number > after for event in self.events):
                await changed.wait()

    async def over(self) -> None:
        """Wait until it is over. Raises its error."""
        while not self.is_over:
            await self.changed.wait()
        if self.error is not None:
            raise self.error


class Jobs:
    """All jobs of a server, and the way to its engine.

    Everything here runs on one event loop; `receive` is called there, too.
    """

    def __init__(
        self,
        engine: EngineClient,
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.admission = Admission(limits=limits)
        self.draining = False
        self._engine = engine
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._by_idempotency: dict[tuple[str, str], tuple[str, bytes]] = {}

    def submit(
        self,
        picture_request: PictureRequest | EnlargingRequest,
        *,
        caller: str,
        api: str,
        priority: int = 0,
        deadline_seconds: float | None = None,
    ) -> Job:
        """Take a request on. Raises UnavailableError, BusyError or BadRequestError."""
        if self.draining or not self._engine.is_ready:
            why = "the server is going down" if self.draining else "the engine is starting"
            raise UnavailableError(f"{why}; try again soon", code="not_ready", retry_after=1)
        self.admission.admit(picture_request.work, caller, deadline_seconds)
        job = Job(
            id=secrets.token_hex(ID_BYTES),
            picture_request=picture_request,
            caller=caller,
            api=api,
            created=self._clock(),
            priority=priority,
            undone=picture_request.work,
            pictures=[DrawnPicture() for _ in range(picture_request.count)],
        )
        self._jobs[job.id] = job
        self._tell_places()
        if deadline_seconds is not None:
            loop = asyncio.get_running_loop()
            job.deadline = loop.call_later(deadline_seconds, self._expire, job)
        self._engine.submit(
            Order(job=job.id, picture_request=picture_request, caller=caller, priority=priority)
        )
        return job

    def once(
        self,
        key: str | None,
        body: bytes,
        picture_request: PictureRequest | EnlargingRequest,
        *,
        caller: str,
        **options: Any,
    ) -> Job:
        """Submit a request, or return the job that the same Idempotency-Key has begun.

        body: what the request said, by which two are the same; options: as `submit` takes them
        Raises ConflictError where that was another request, and what `submit` does.
        """
        self._sweep()
        same = hashlib.sha256(body).digest()
        if key is None:
            return self.submit(picture_request, caller=caller, **options)
        known = self._by_idempotency.get((caller, key))
        if known is None or known[0] not in self._jobs:
            job = self.submit(picture_request, caller=caller, **options)
            self._by_idempotency[caller, key] = job.id, same
            return job
        if known[1] != same:
            raise ConflictError(
                "this Idempotency-Key came with another request before; take a new one",
                code="idempotency_key_reused",
            )
        return self._jobs[known[0]]

    def find(self, job_id: str, caller: str) -> Job:
        """Return a caller's job. Raises NotFoundError, for those of others too."""
        self._sweep()
        job = self._jobs.get(job_id)
        if job is None or job.caller != caller:
            raise NotFoundError("there is no such job, or it was long ago", code="job_not_found")
        return job

    def cancel(self, job: Job, why: str = "asked") -> None:
        """Drop a job wherever it is; one that is over stays what it is."""
        if not job.is_over:
            self._engine.cancel(job.id)
            self._metrics.cancelled.labels(why).inc()
            self._end(job, "cancelled", RefusalError("the job was cancelled", code="cancelled"))

    def forget(self, job: Job) -> None:
        """Let go of a job whose answer was given."""
        self.cancel(job, "left")
        self._jobs.pop(job.id, None)

    def receive(self, event: Event) -> None:
        """Take what the engine tells."""
        if event.kind == "turn":
            self._turn(event)
            return
        job = self._jobs.get(event.job)
        if job is None or job.is_over:
            return
        picture = job.pictures[event.index]
        if event.kind == "started":
            picture.total = event.data["total"]
            job.state = "running"
            job.tell("started", index=event.index, total=picture.total)
        elif event.kind == "preview":
            job.tell("preview", event.blob, index=event.index, step=event.data["step"])
        elif event.kind == "finished":
            picture.data, picture.settings = event.blob, event.data["settings"]
            picture.batched = event.data["batched"]
            self._metrics.pictures.inc()
            job.tell("picture", index=event.index, batched=picture.batched)
            if all(each.data for each in job.pictures):
                self._end(job, "done")
        elif event.kind == "failed":
            kind = FAILURES.get(event.data["code"], BadRequestError)
            self._engine.cancel(job.id)
            self._end(job, "failed", kind(event.data["message"], code=event.data["code"]))

    def unfinished(self) -> list[Job]:
        """Return those that are not over, in the order in which they came."""
        return [job for job in self._jobs.values() if not job.is_over]

    @property
    def awaits_fetching(self) -> bool:
        """Whether a picture was finished just now that its client has not fetched yet."""
        since = self._clock() - FETCH_SECONDS
        return any(
            job.state == "done" and (job.ended or 0.0) > since and not picture.fetched
            for job in self._jobs.values()
            for picture in job.pictures
        )

    def _turn(self, event: Event) -> None:
        """Take the progress of all rows of a call."""
        now, done = self._clock(), 0.0
        for job_id, index, calls, total in event.data["rows"]:
            job = self._jobs.get(job_id)
            if job is None or job.is_over:
                continue
            picture, work = job.pictures[index], job.picture_request.work
            picture.calls = calls
            share = min(work / job.picture_request.count / total, job.undone)
            job.undone -= share
            done += share
            if job.first_step is None:
                job.first_step = now
                self._metrics.first_step_seconds.observe(now - job.created)
            job.tell("step", index=index, step=calls, total=total, rows=len(event.data["rows"]))
        self._metrics.turn(len(event.data["rows"]), event.data["limit"], event.data["seconds"])
        if done:
            self.admission.turned(done, event.data["elapsed"])

    def _tell_places(self) -> None:
        """Tell those that wait how many come before them, where that has changed."""
        work = 0.0
        for position, job in enumerate(self.unfinished()):
            work += job.undone
            if job.state == "queued" and job.position != position:
                job.position, job.eta = position, round(self.admission.seconds_of(work), 2)
                job.tell("queued", position=position, eta_s=job.eta)

    def _expire(self, job: Job) -> None:
        if not job.is_over:
            self._engine.cancel(job.id)
            self._metrics.cancelled.labels("deadline").inc()
            late = TooLateError("the deadline passed before it was drawn", code="deadline_exceeded")
            self._end(job, "failed", late)

    def _end(self, job: Job, state: State, error: RefusalError | None = None) -> None:
        if job.deadline is not None:
            job.deadline.cancel()
        job.state, job.error, job.ended = state, error, self._clock()
        if state != "done":
            job.pictures = [DrawnPicture(calls=p.calls, total=p.total) for p in job.pictures]
        self.admission.left(job.undone, job.caller)
        job.undone = 0.0
        self._tell_places()
        if error is None:
            job.tell(state)
        else:
            job.tell(state, code=error.code, message=error.message)
        self._metrics.request_seconds.labels(job.api).observe(job.ended - job.created)
        self._sweep()

    def _sweep(self) -> None:
        """Let go of what is over and too old, or too much."""
        over = [job for job in self._jobs.values() if job.ended is not None]
        held, now = sum(job.kept_bytes for job in over), self._clock()
        for job in over:
            assert job.ended is not None
            if held > self._limits.kept_bytes or now - job.ended > self._limits.kept_seconds:
                held -= job.kept_bytes
                del self._jobs[job.id]
        if len(self._by_idempotency) > len(self._jobs):
            kept = {k: v for k, v in self._by_idempotency.items() if v[0] in self._jobs}
            self._by_idempotency = kept
