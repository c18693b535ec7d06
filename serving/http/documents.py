"""What the OpenAPI document says beside the types, and how a body that does not fit is told."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import ALL, BadRequestError

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    each.status: {
        "description": (each.__doc__ or "").splitlines()[0],
        "content": {"application/json": {"schema": _ERROR}},
    }
    for each in ALL
}
_FILE = {"type": "string", "format": "binary"}
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": _FILE,
                        "mask": _FILE,
                        "prompt": {"type": "string"},
                        "model": {"type": "string"},
                        "n": {"type": "integer", "minimum": 1},
                        "size": {"type": "string"},
                    },
                }
            }
        },
    }
}


def invalid(errors: Sequence[Mapping[str, Any]]) -> BadRequestError:
    """Say in a sentence of ours what pydantic found first; what came is not quoted."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = ".".join(place)[:100].encode("ascii", "backslashreplace").decode()
    if first["type"] == "missing":
        return BadRequestError(f"{name or 'the body'} is missing", param=name or None)
    if first["type"] == "extra_forbidden":
        return BadRequestError(
            f"{name!r} is no field; /docs lists them", code="unknown_field", param=name
        )
    if first["type"] == "json_invalid" or not name:
        return BadRequestError("the body is no JSON object", code="invalid_json")
    wanted = first["type"].removesuffix("_parsing").removesuffix("_type").replace("_", " ")
    return BadRequestError(f"{name} is not what it must be ({wanted})", param=name)
