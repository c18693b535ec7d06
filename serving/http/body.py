"""Bodies: read whole before anything looks at them, counted while they come, in bounded time."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import BadRequestError, BusyError, RefusalError, TooLargeError, WrongTypeError
from serving.http.answers import refuse
from serving.limits import Limits

AT_ONCE = 8  # largest bodies that may be held at a time, all requests together
TYPES = ("application/json", "multipart/form-data")
FORMS = ("/v1/images/edits", "/v1/images/variations")
AUTOMATIC1111 = "/sdapi/v1/"  # whose clients interrupt and skip without a body


class BodyReader:
    """Reads bodies for an application, and refuses those that are too large, slow or foreign."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the body on in one piece, then whatever else the client does."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []
        try:
            _check_type(scope)
            await self._read(scope, receive, parts)
            body: bytes | None = b"".join(parts)

            async def replay() -> Message:
                nonlocal body
                if body is None:
                    return await receive()
                message = {"type": "http.request", "body": body, "more_body": False}
                body = None
                return message

            await self._app(scope, replay, send)
        except RefusalError as error:
            await refuse(error)(scope, receive, send)
        except ConnectionError:
            return  # the client has left in the middle of it
        finally:
            self._held -= sum(map(len, parts))

    async def _read(self, scope: Scope, receive: Receive, parts: list[bytes]) -> None:
        most = self._limits.body_bytes
        said = Headers(scope=scope).get("content-length", "0")
        too_large = TooLargeError(f"the body is too large; up to {most} bytes are taken")
        if not said.isdecimal() or len(said) > 20 or int(said) > most:
            raise too_large
        read = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    parts.append(message.get("body", b""))
                    read += len(parts[-1])
                    self._held += len(parts[-1])
                    if read > most:
                        raise too_large
                    if self._held > AT_ONCE * most:
                        raise BusyError("many large bodies come in; try again", retry_after=5)
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            raise BadRequestError("the body came too slowly", code="slow_body") from None


def _check_type(scope: Scope) -> None:
    """Refuse what a browser's form can send across sites, where it is not a form that is meant."""
    headers = Headers(scope=scope)
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    bodiless = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    if bodiless and not given and scope["path"].startswith(AUTOMATIC1111):
        return
    wanted = TYPES[scope["path"] in FORMS]
    if given != wanted:
        raise WrongTypeError(f"the body's type must be {wanted}", code="wrong_type")
