"""Forms: their fields and files, held in memory alone."""

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serving.errors import BadRequestError
from serving.http.bodies import OpenAIFields
from serving.http.documents import invalid
from serving.limits import Limits

FILES = ("image", "image[]", "mask")


class FormParser(MultiPartParser):
    """Starlette's, which writes no file to a disk: the body was bounded before."""

    spool_max_size = 0  # any size, for tempfile.SpooledTemporaryFile


async def read_form(request: Request, limits: Limits) -> tuple[OpenAIFields, dict[str, bytes]]:
    """Return the fields and the files of a form. Raises BadRequestError."""
    parser = FormParser(
        request.headers,
        request.stream(),
        max_files=limits.files,
        max_fields=limits.fields,
        max_part_size=limits.body_bytes,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError):
        raise BadRequestError("the form cannot be read, or has too many parts") from None
    try:
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        try:
            body = OpenAIFields.model_validate(fields)
        except ValidationError as error:
            raise invalid(error.errors()) from None
        return body, await _files(form)
    finally:
        await form.close()


async def _files(form: FormData) -> dict[str, bytes]:
    """Return the picture and the mask of a form; of several pictures none can be left out."""
    files: dict[str, bytes] = {}
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            if name in FILES:
                raise BadRequestError(
                    f"{name} is a text; send the file itself, nothing is fetched", param="image"
                )
            continue
        key = name.removesuffix("[]")
        if name not in FILES or key in files:
            raise BadRequestError("one image is taken, and one mask beside it", param="image")
        files[key] = await value.read()
    return files
