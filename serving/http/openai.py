"""OpenAI's Images API: generations, edits, variations and models, for its own clients.

What its clients send and nothing here can heed (quality, style, user, …) is not looked at; our own
fields may stand beside. Nothing is kept on the server, so a picture is always in the answer.
"""

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serving.errors import BadRequestError, RefusalError
from serving.http.answers import error_body, in_fields
from serving.http.bodies import Generation, OpenAIFields
from serving.http.documents import FORM, REFUSALS
from serving.http.fields import Catalog, check_whole, file_format
from serving.http.forms import read_form
from serving.http.sse import EventStream, event
from serving.jobs import Job, Jobs
from serving.limits import Limits
from serving.picture_request import DEFAULT_STEPS, PictureRequest

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
NO_TOKENS = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
MOST_PARTIALS = 3
FIELDS = {"num_images_per_prompt": "n"}  # its names of ours, where they differ


def openai_routes(jobs: Jobs, catalog: Catalog, limits: Limits, started: int) -> APIRouter:
    """Return the routes, which refuse with BadRequestError.

    started: when the server was, in seconds of the epoch
    """
    router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=REFUSALS)

    async def answer(
        request: Request, kind: str, body: OpenAIFields, picture_request: PictureRequest
    ) -> Response:
        with in_fields(FIELDS):
            checked = picture_request.checked(limits)
        job = jobs.submit(checked, caller=request.state.caller, api="openai")
        if body.stream:
            events = _events(job, kind, body)
            return EventStream(events, left=lambda: jobs.forget(job))
        try:
            await over_or_left(request, job)
            return JSONResponse(_result(job))
        finally:
            jobs.forget(job)

    @router.post("/images/generations")
    async def generations(request: Request, body: Generation) -> Response:
        """Draw pictures from a prompt."""
        return await answer(request, "image_generation", body, openai_request(body, catalog))

    @router.post("/images/edits", openapi_extra=FORM)
    async def edits(request: Request) -> Response:
        """Paint a picture anew, where its mask is transparent, or as a whole."""
        body, files = await read_form(request, limits)
        picture_request = openai_request(body, catalog)
        image, mask = files.get("image"), files.get("mask")
        if image is None:
            raise BadRequestError("image is missing; send the picture to edit", param="image")
        fields = {"mask_blur": 0.0, **picture_request.fields}
        picture_request = replace(
            picture_request, fields=fields, image=image, mask=mask, mask_by_alpha=True
        )
        return await answer(request, "image_edit", body, picture_request)

    @router.post("/images/variations", openapi_extra=FORM)
    async def variations(request: Request) -> Response:
        """Draw over a picture with an empty prompt."""
        body, files = await read_form(request, limits)
        if "image" not in files:
            raise BadRequestError("image is missing; send the picture to vary", param="image")
        picture_request = replace(openai_request(body, catalog), image=files["image"])
        return await answer(request, "image_generation", body, picture_request)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """List the models of this server."""
        return {"object": "list", "data": [_model(name, started) for name in catalog.models]}

    @router.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        """Say whether there is a model."""
        return _model(catalog.model(name), started)

    return router


def openai_request(body: OpenAIFields, catalog: Catalog) -> PictureRequest:
    """Return what a body requests, without its pictures. Raises BadRequestError."""
    if body.response_format not in (None, "b64_json"):
        raise BadRequestError(
            "response_format must be b64_json; no picture is kept here for a URL to lead to",
            param="response_format",
        )
    if body.background == "transparent":
        raise BadRequestError("background cannot be transparent here", param="background")
    fields = {"prompt": body.prompt, **body.of_request()}
    if body.n is not None:
        fields["num_images_per_prompt"] = body.n
    if body.size not in (None, "auto"):
        size = SIZE.fullmatch(body.size or "")
        if size is None:
            raise BadRequestError(
                f"size is {body.size!r:.60}; give WIDTHxHEIGHT, such as 512x512, or auto",
                param="size",
            )
        fields["width"], fields["height"] = int(size[1]), int(size[2])
    partials = check_whole("partial_images", body.partial_images or 0, 0, MOST_PARTIALS)
    quality = 95 if body.output_compression is None else body.output_compression
    every = 0
    if body.stream and partials:
        every = max(1, (body.num_inference_steps or DEFAULT_STEPS) // (partials + 1))
    return PictureRequest(
        **catalog.hires(fields),
        model=catalog.model(body.model),
        loras=catalog.adapters(body.loras),
        **catalog.steering(body),
        exact=body.exact,
        preview_every=every,
        format=file_format(body.output_format or "png", "output_format"),
        quality=max(check_whole("output_compression", quality, 0, 100), 1),
    )


async def over_or_left(request: Request, job: Job) -> None:
    """Wait until a job is over or its client has left, whichever comes first.

    Raises the job's error, and RefusalError where nobody reads the answer.
    """
    over = asyncio.ensure_future(job.over())
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({over, left}, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            raise RefusalError("the client has left", code="client_left")
        over.result()
    finally:
        over.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _result(job: Job) -> dict[str, Any]:
    """Return the answer of a finished job, as OpenAI's clients read it."""
    pictures = [
        {
            "b64_json": base64.b64encode(picture.data).decode(),
            "seed": picture.settings.get("seed"),
            "batched": picture.batched,
            "notes": picture.settings.get("notes", []),
        }
        for picture in job.pictures
    ]
    return {"created": int(time.time()), "data": pictures, **_output(job), "usage": NO_TOKENS}


def _output(job: Job) -> dict[str, Any]:
    settings = job.pictures[0].settings
    size = f"{settings.get('width', 0)}x{settings.get('height', 0)}"
    return {
        "output_format": job.picture_request.format.lower(),
        "size": size,
        "background": "opaque",
        "quality": "auto",
    }


async def _events(job: Job, kind: str, body: OpenAIFields) -> AsyncIterator[bytes]:
    """Yield a job's previews and pictures as OpenAI's streams have them."""
    partials, most = 0, body.partial_images or 0
    async for step in job.follow():
        if step.name == "preview" and partials < most:
            data = {
                "type": f"{kind}.partial_image",
                "b64_json": base64.b64encode(step.blob).decode(),
                "partial_image_index": partials,
                "created_at": int(time.time()),
                **_output(job),
                "output_format": "jpeg",
            }
            partials += 1
            yield event(f"{kind}.partial_image", data)
    if job.error is not None:
        yield event("error", error_body(job.error))
        return
    for picture in job.pictures:
        data = {
            "type": f"{kind}.completed",
            "b64_json": base64.b64encode(picture.data).decode(),
            "created_at": int(time.time()),
            **_output(job),
            "usage": NO_TOKENS,
        }
        yield event(f"{kind}.completed", data)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "latentrt"}
