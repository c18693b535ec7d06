"""The native API: a picture is a job that can be watched, fetched and cancelled."""

import base64
from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response

from engine.configs.control_net_union import CONTROL_TYPES
from engine.graphs.seamless import AXES
from runtime.control import MODES
from runtime.images.upscaling import UPSCALERS
from runtime.preprocessors.named import PREPROCESSORS
from runtime.presets import PRESETS
from runtime.samplers import SAMPLERS, SCHEDULES
from serving.enlarging_request import EnlargingRequest
from serving.errors import BusyError, NotFoundError
from serving.http.bodies import Picture, Upscaling
from serving.http.documents import REFUSALS
from serving.http.fields import Catalog, native_request, upscaling_request
from serving.http.sse import EventStream, event
from serving.jobs import Job, Jobs
from serving.limits import Limits
from serving.picture_request import PictureRequest

MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def native_routes(jobs: Jobs, catalog: Catalog, limits: Limits) -> APIRouter:
    """Return the routes of /api/v1; NotFoundError and BusyError are among their refusals."""
    router = APIRouter(prefix="/api/v1", tags=["pictures"], responses=REFUSALS)
    streams: Counter[str] = Counter()

    def begun(
        caller: str,
        key: str | None,
        body: Picture | Upscaling,
        asked: PictureRequest | EnlargingRequest,
    ) -> JSONResponse:
        job = jobs.once(
            key,
            body.model_dump_json().encode(),
            asked,
            caller=caller,
            api="native",
            priority=body.priority,
            deadline_seconds=body.deadline_s,
        )
        where = f"/api/v1/pictures/{job.id}"
        return JSONResponse(describe(job), status_code=202, headers={"location": where})

    @router.post("/pictures", status_code=202)
    async def submit(
        request: Request,
        body: Picture,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> JSONResponse:
        """Begin a job; the same Idempotency-Key with the same body begins none twice."""
        asked = native_request(body, catalog, limits)
        return begun(request.state.caller, idempotency_key, body, asked)

    @router.post("/upscales", status_code=202)
    async def upscale(
        request: Request,
        body: Upscaling,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> JSONResponse:
        """Begin to enlarge a picture: a job as those that draw, of one picture."""
        asked = upscaling_request(body, catalog, limits)
        return begun(request.state.caller, idempotency_key, body, asked)

    @router.get("/pictures/{job_id}")
    async def status(request: Request, job_id: str) -> JSONResponse:
        """Say how far a job is, and what its pictures were made with."""
        return JSONResponse(describe(jobs.find(job_id, request.state.caller)))

    @router.delete("/pictures/{job_id}")
    async def cancel(request: Request, job_id: str) -> JSONResponse:
        """Drop a job; one that is over stays what it is."""
        job = jobs.find(job_id, request.state.caller)
        jobs.cancel(job)
        return JSONResponse(describe(job))

    @router.get(
        "/pictures/{job_id}/events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def events(
        request: Request,
        job_id: str,
        last_event_id: Annotated[str | None, Header(max_length=20)] = None,
    ) -> Response:
        """Watch a job: queued, started, step, preview, picture, done, failed, cancelled."""
        job, caller = jobs.find(job_id, request.state.caller), request.state.caller
        if streams[caller] >= limits.streams:
            raise BusyError("you watch many jobs already; leave one", retry_after=5)
        streams[caller] += 1
        said = last_event_id or ""
        seen = int(said) if said.isascii() and said.isdecimal() else 0

        def left() -> None:
            streams[caller] -= 1
            if not streams[caller]:
                del streams[caller]

        return EventStream(_watched(job, seen), left=left)

    @router.get(
        "/pictures/{job_id}/image/{index}",
        response_class=Response,
        responses={200: {"content": {media: {} for media in MEDIA.values()}}},
    )
    async def image(request: Request, job_id: str, index: int) -> Response:
        """Return a finished picture's file."""
        job = jobs.find(job_id, request.state.caller)
        if not 0 <= index < len(job.pictures) or not job.pictures[index].data:
            raise NotFoundError("that picture is not drawn", code="picture_not_found")
        job.pictures[index].fetched = True
        return Response(job.pictures[index].data, media_type=MEDIA[job.picture_request.format])

    @router.get("/capabilities")
    async def capabilities() -> dict[str, Any]:
        """Say what requests may name, and what their limits are."""
        return {
            "models": list(catalog.models),
            "loras": list(catalog.loras),
            "controls": list(catalog.controls),
            "control_modes": list(MODES),
            "control_types": [name for names in CONTROL_TYPES for name in names],
            "preprocessors": list(PREPROCESSORS),
            "samplers": list(SAMPLERS),
            "schedules": list(SCHEDULES),
            "presets": list(PRESETS),
            "upscalers": [*UPSCALERS, *catalog.upscalers],
            "ip_adapters": list(catalog.ip_adapters),
            "seamless": list(AXES),
            "formats": [name.lower() for name in MEDIA],
            "limits": {
                "pictures": limits.pictures,
                "steps": limits.steps,
                "controls": limits.controls,
                "image_prompts": limits.image_prompts,
                "upscaled_pixels": limits.upscaled_pixels,
                "side": limits.side,
                "pixels": limits.pixels,
                "prompt_characters": limits.prompt_characters,
                "loras": limits.loras,
                "body_bytes": limits.body_bytes,
            },
        }

    return router


def describe(job: Job) -> dict[str, Any]:
    """Return what the API says of a job."""
    seeds = job.picture_request.fields.get("seed")  # none where a picture is enlarged
    described: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "model": job.picture_request.model or None,
        **({"position": job.position, "eta_s": job.eta} if job.state == "queued" else {}),
        "pictures": [
            {
                "index": index,
                "step": picture.calls,
                "total": picture.total,
                "seed": seeds[index] if seeds else None,
                "batched": picture.batched,
                "settings": picture.settings or None,
                "notes": picture.settings.get("notes", []),
                "image": f"/api/v1/pictures/{job.id}/image/{index}" if picture.data else None,
            }
            for index, picture in enumerate(job.pictures)
        ],
    }
    if job.error is not None:
        described["error"] = {"code": job.error.code, "message": job.error.message}
    return described


async def _watched(job: Job, seen: int) -> AsyncIterator[bytes]:
    async for step in job.follow(seen):
        data = dict(step.data)
        if step.blob:
            data["jpeg"] = base64.b64encode(step.blob).decode()
        yield event(step.name, data, step.number)
