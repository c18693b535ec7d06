"""Orders: requests in the engine, and the pictures that they ask for."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving.enlarging_request import EnlargingRequest
from serving.events import Event, Kind
from serving.picture_request import PictureRequest

if TYPE_CHECKING:  # the process that speaks HTTP draws nothing
    from serving.unfinished_picture import UnfinishedPicture


@dataclass(slots=True, kw_only=True, eq=False)
class Order:
    """A request in the engine: pictures of one job.

    indices: of the request's pictures, those that are wanted here; none for all
    caller: whose it is; priority: among the caller's own, the higher first
    left: how many are neither finished nor failed
    """

    job: str
    picture_request: PictureRequest | EnlargingRequest
    caller: str = ""
    priority: int = 0
    indices: Sequence[int] = ()
    cancelled: bool = False
    unfinished_pictures: "Sequence[UnfinishedPicture] | None" = field(default=None, repr=False)
    left: int = field(init=False)

    def __post_init__(self) -> None:
        """Take all pictures where none were named."""
        self.indices = self.indices or range(self.picture_request.count)
        self.left = len(self.indices)


@dataclass(slots=True, kw_only=True, eq=False)
class Picture:
    """One picture of an order, from the queue to its file; number: in the order of arrival."""

    order: Order
    index: int
    number: int
    unfinished: "UnfinishedPicture | None" = None
    batched: bool = False

    @property
    def begun(self) -> "UnfinishedPicture":
        """What is drawn of it, once it was prepared."""
        assert self.unfinished is not None
        return self.unfinished

    @property
    def bucket(self) -> Hashable:
        """Of its next step."""
        return self.begun.bucket

    def event(self, kind: Kind, blob: bytes = b"", **data: Any) -> Event:
        """Tell something of this picture."""
        return Event(kind=kind, job=self.order.job, index=self.index, data=data, blob=blob)
