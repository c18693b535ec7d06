"""What a server answers in place of a picture.

RefusalError
├── BadRequestError    the request cannot be drawn as it is                       400
├── UnauthorizedError  no key, or a wrong one                                     401
├── ForbiddenError     a browser on another site, a name that is not this host's  403
├── NotFoundError      no such model, picture or page                             404
├── ConflictError      an Idempotency-Key that came with another request          409
├── TooLargeError      more bytes or pixels than are taken                        413
├── WrongTypeError     a body that is neither JSON nor a form where it should be  415
├── BusyError          as much work waits as may                                  429
├── EngineFailedError  drawing failed; asking again would fail again              500
├── UnavailableError   draining, or no engine                                     503
└── TooLateError       the deadline has passed                                    504

Every message is a sentence of ours. What a library said stands in the log, under the request's id.
"""

from dataclasses import dataclass
from typing import ClassVar

DRAWING_FAILED = "drawing this picture failed; the server's log has more under this request's id"
MOST_OF_A_MESSAGE = 500  # characters: messages quote what came


@dataclass(eq=False)
class RefusalError(Exception):
    """The base of every answer that is no picture.

    code: a word that a program can tell it by; param: the field that it is about
    retry_after: seconds after which asking again may help, None where it does not
    """

    message: str
    code: str = "invalid_request"
    param: str | None = None
    retry_after: int | None = None
    status: ClassVar[int] = 400
    kind: ClassVar[str] = "invalid_request_error"

    def __post_init__(self) -> None:
        """Cut a message that quotes too much."""
        if len(self.message) > MOST_OF_A_MESSAGE:
            self.message = self.message[:MOST_OF_A_MESSAGE] + "…"


class BadRequestError(RefusalError):
    """The request cannot be drawn as it is."""


class UnauthorizedError(RefusalError):
    """No key, or a wrong one."""

    status, kind = 401, "authentication_error"


class ForbiddenError(RefusalError):
    """A browser on another site, or a name that is not this host's."""

    status, kind = 403, "permission_error"


class NotFoundError(RefusalError):
    """No such model, picture or page."""

    status = 404


class ConflictError(RefusalError):
    """An Idempotency-Key that came with another request."""

    status = 409


class TooLargeError(RefusalError):
    """More bytes or pixels than are taken."""

    status = 413


class WrongTypeError(RefusalError):
    """A body of another type than the path takes."""

    status = 415


class BusyError(RefusalError):
    """As much work waits as may."""

    status, kind = 429, "rate_limit_error"


class EngineFailedError(RefusalError):
    """Drawing failed; asking again would fail again."""

    status, kind = 500, "server_error"


class UnavailableError(RefusalError):
    """Draining, or no engine."""

    status, kind = 503, "server_error"


class TooLateError(RefusalError):
    """The deadline has passed."""

    status, kind = 504, "server_error"


ALL: tuple[type[RefusalError], ...] = tuple(RefusalError.__subclasses__())
