"""Which replica of those that are there gets a picture: one that has its model and adapters."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from runtime.conditioning.names import MARKS, take_names
from serving.enlarging_request import EnlargingRequest
from serving.picture_request import PictureRequest

WARM = "warm"  # of what a replica tells: names of `model_set`


class Replica(Protocol):
    """What Ray Serve's router knows of a replica."""

    @property
    def replica_id(self) -> Any:
        """Return what tells it from others."""
        ...

    @property
    def routing_stats(self) -> Mapping[str, Any]:
        """Return what it told of itself."""
        ...


R = TypeVar("R", bound=Replica)


def model_set(picture_request: PictureRequest | EnlargingRequest) -> str:
    """Return a name for the model and adapters of a request, those too that its prompt names."""
    prompt = str(picture_request.fields.get("prompt", ""))
    named = take_names(prompt, {}).adapters if MARKS.search(prompt) else ()
    adapters = [*picture_request.loras, *(tag[1:] for tag in named)]
    return " ".join([picture_request.model, *(":".join(map(str, each)) for each in adapters)])


def ranked(models: str, replicas: Iterable[R]) -> list[list[R]]:
    """Return replicas in ranks, of each of which the least loaded that has room is taken.

    First all that have these models; then one by one those that have not, in an order that is
    the models' own (rendezvous hashing): the same go to the same replica, and others elsewhere.
    """
    warm: list[R] = []
    cold: list[R] = []
    for replica in replicas:
        (warm if models in replica.routing_stats.get(WARM, ()) else cold).append(replica)
    cold.sort(key=lambda replica: _weight(models, replica.replica_id))
    return [rank for rank in (warm, *([replica] for replica in cold)) if rank]


def _weight(key: str, replica_id: Any) -> bytes:
    return hashlib.sha256(f"{key} {replica_id}".encode()).digest()


def caller_key(scope: Mapping[str, Any] | None) -> str | None:
    """Return what tells the caller of an HTTP request from others, None where nothing does.

    That is its key, or the address that it comes from where it has none.
    """
    if scope is None:
        return None
    headers = dict(scope.get("headers", ()))
    key = headers.get(b"authorization") or headers.get(b"x-forwarded-for")
    if key is not None:
        return hashlib.sha256(key).hexdigest()  # routers write keys into logs and metrics
    client = scope.get("client")
    return str(client[0]) if client else None
