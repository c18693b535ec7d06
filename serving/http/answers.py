"""Answers that are no picture, in the shape of OpenAI's errors, for every API."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.responses import JSONResponse

from engine.errors import RequestError, renamed
from serving.errors import BadRequestError, NotFoundError, RefusalError

SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def error_body(error: RefusalError) -> dict[str, Any]:
    """Return `{"error": {message, type, param, code}}`."""
    body = {
        "message": error.message,
        "type": error.kind,
        "param": error.param,
        "code": error.code,
    }
    return {"error": body}


def refuse(error: Exception) -> JSONResponse:
    """Return the answer for an error of ours; one of the runtime's is a bad request.

    A client's library is told not to ask again where that would fail again.
    """
    refusal = error if isinstance(error, RefusalError) else from_request_error(error)
    headers = dict(SAFE)
    if refusal.retry_after is not None:
        headers["retry-after"] = str(refusal.retry_after)
    else:
        headers["x-should-retry"] = "false"
    if refusal.status == 401:
        headers["www-authenticate"] = 'Bearer realm="latentrt", Basic realm="latentrt"'
    return JSONResponse(error_body(refusal), status_code=refusal.status, headers=headers)


def from_request_error(error: Exception) -> BadRequestError:
    """Say in an API's words what the runtime refuses; its sentence begins with the field."""
    assert isinstance(error, RequestError)
    message = str(error)
    field = message.partition(" ")[0].partition(".")[0]
    param = field if field.isidentifier() and field != "the" else None
    return BadRequestError(message, param=param)


@contextmanager
def in_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Have what is refused within named by an API's own fields.

    names: of the API's fields, by the runtime's
    Raises RequestError, BadRequestError or NotFoundError again, in other words.
    """
    try:
        yield
    except RequestError as error:
        raise RequestError(renamed(str(error), names)) from error
    except (BadRequestError, NotFoundError) as error:
        param = None if error.param is None else names.get(error.param, error.param)
        message = renamed(error.message, names)
        raise type(error)(message, code=error.code, param=param) from error
