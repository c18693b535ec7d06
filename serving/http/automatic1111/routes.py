"""Automatic1111's API, as webuiapi, Open WebUI and SillyTavern use it.

There it is one user's program: one job, one set of options, and `interrupt` ends whatever is drawn.
Here all of that is the caller's own: others' jobs and options are neither seen nor touched.
"""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serving.client import EngineClient
from serving.enlarging_request import EnlargingRequest
from serving.errors import RefusalError
from serving.http.answers import in_fields
from serving.http.automatic1111.answers import drawn, png_info, progress
from serving.http.automatic1111.drawing import image_request, text_request
from serving.http.automatic1111.extras import extra_requests
from serving.http.automatic1111.fields import (
    DrawingBody,
    ExtraBatchBody,
    ExtraBody,
    ImageBody,
    PngInfoBody,
    TextBody,
)
from serving.http.automatic1111.lists import add_lists
from serving.http.automatic1111.names import FIELDS
from serving.http.automatic1111.settings import CallersSettings, Settings
from serving.http.documents import REFUSALS
from serving.http.fields import Catalog
from serving.http.openai import over_or_left
from serving.jobs import DrawnPicture, Job, Jobs
from serving.limits import Limits
from serving.picture_request import PictureRequest

API = "automatic1111"
Body = TypeVar("Body", bound=DrawingBody)
Make = Callable[[Body, Settings, Limits, Catalog], PictureRequest]


class Drawings:
    """The jobs that came by this API; those that were interrupted end with what is finished."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._interrupted: dict[str, list[DrawnPicture]] = {}

    def of(self, caller: str) -> list[Job]:
        """Return a caller's unfinished jobs, the oldest first."""
        unfinished = self._jobs.unfinished()
        return [job for job in unfinished if (job.caller, job.api) == (caller, API)]

    def interrupt(self, caller: str, most: int | None = None) -> None:
        """End those of a caller's that are drawn, or the one that waits longest where none is."""
        jobs = self.of(caller)
        for job in ([job for job in jobs if job.state == "running"] or jobs[:1])[:most]:
            self._interrupted[job.id] = list(job.pictures)
            self._jobs.cancel(job)

    async def draw(
        self, request: Request, body: DrawingBody, picture_request: PictureRequest
    ) -> Response:
        """Draw, and answer when all is there, or what is there after an interruption."""
        job = self._jobs.submit(picture_request, caller=request.state.caller, api=API)
        try:
            await over_or_left(request, job)
            pictures = job.pictures
        except RefusalError:
            if job.id not in self._interrupted:
                raise
            pictures = self._interrupted[job.id]
        finally:
            self._interrupted.pop(job.id, None)
            self._jobs.forget(job)
        answer = json.dumps(drawn(body, job, pictures))  # in ASCII, for halves of characters
        return Response(answer, media_type="application/json")

    async def enlarge(self, request: Request, asked: Sequence[EnlargingRequest]) -> list[str]:
        """Enlarge pictures, and return their files in base64 when all are there."""
        caller, jobs = request.state.caller, list[Job]()
        try:
            for each in asked:
                jobs.append(self._jobs.submit(each, caller=caller, api=API))
            for job in jobs:
                await over_or_left(request, job)
            return [base64.b64encode(job.pictures[0].data).decode() for job in jobs]
        finally:
            for job in jobs:
                self._interrupted.pop(job.id, None)
                self._jobs.forget(job)


def automatic1111_routes(
    jobs: Jobs, engine: EngineClient, catalog: Catalog, limits: Limits
) -> APIRouter:
    """Return the routes of /sdapi/v1."""
    router = APIRouter(prefix="/sdapi/v1", tags=["Automatic1111"], responses=REFUSALS)
    drawings, options = Drawings(jobs), CallersSettings(catalog, limits)

    async def draw(request: Request, body: Body, make: Make[Body]) -> Response:
        """Draw what a body asks for with the caller's options and its own, which may stay."""
        caller, given = request.state.caller, body.override_settings or {}
        with in_fields(FIELDS):
            picture_request = make(body, options.changed(caller, given), limits, catalog)
            if given and body.override_settings_restore_afterwards is False:
                options.keep(caller, given)
            return await drawings.draw(request, body, picture_request)

    @router.post("/txt2img")
    async def txt2img(request: Request, body: TextBody) -> Response:
        """Draw pictures from a prompt."""
        return await draw(request, body, text_request)

    @router.post("/img2img")
    async def img2img(request: Request, body: ImageBody) -> Response:
        """Draw over a picture, where its mask is white or as a whole."""
        return await draw(request, body, image_request)

    @router.post("/extra-single-image")
    async def extra(request: Request, body: ExtraBody) -> JSONResponse:
        """Enlarge a picture."""
        of_caller = options.of(request.state.caller)
        asked = extra_requests(body, [body.image], "image", of_caller, catalog, limits)
        (image,) = await drawings.enlarge(request, asked)
        return JSONResponse({"html_info": "", "image": image})

    @router.post("/extra-batch-images")
    async def extras(request: Request, body: ExtraBatchBody) -> JSONResponse:
        """Enlarge several pictures alike."""
        of_caller = options.of(request.state.caller)
        images = [each.data for each in body.image_list]
        asked = extra_requests(body, images, "imageList", of_caller, catalog, limits)
        return JSONResponse({"html_info": "", "images": await drawings.enlarge(request, asked)})

    @router.get("/progress")
    async def how_far(request: Request, skip_current_image: bool = False) -> JSONResponse:
        """Say how far the caller's own pictures are."""
        mine = drawings.of(request.state.caller)
        return JSONResponse(progress(mine, time.monotonic(), with_image=not skip_current_image))

    @router.post("/interrupt")
    async def interrupt(request: Request) -> dict[str, Any]:
        """End what is drawn for the caller; what is finished of it is answered."""
        drawings.interrupt(request.state.caller)
        return {}

    @router.post("/skip")
    async def skip(request: Request) -> None:
        """End the caller's oldest job alone."""
        drawings.interrupt(request.state.caller, most=1)

    @router.get("/options")
    async def get_options(request: Request) -> dict[str, Any]:
        """Return the caller's options."""
        return options.of(request.state.caller).model_dump()

    @router.post("/options")
    async def set_options(request: Request, body: dict[str, Any]) -> None:
        """Change some of the caller's options, by their names as GET returns them."""
        options.keep(request.state.caller, body)

    @router.post("/png-info")
    async def info(body: PngInfoBody) -> JSONResponse:
        """Return what a picture's file says of itself."""
        return JSONResponse(await asyncio.to_thread(png_info, body.image, limits.upload_pixels))

    add_lists(router, catalog, engine)
    return router
