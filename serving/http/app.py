"""The application: routes, and what stands before them, outermost last."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp

from engine.errors import RequestError
from runtime.images.files import program_version
from serving.client import EngineClient
from serving.errors import BadRequestError, NotFoundError, RefusalError
from serving.event_inbox import EventInbox
from serving.http.access import AccessMiddleware, AccessRules
from serving.http.answers import refuse
from serving.http.automatic1111.controlnet import controlnet_routes
from serving.http.automatic1111.routes import automatic1111_routes
from serving.http.body import BodyReader
from serving.http.docs_page import docs_page
from serving.http.documents import invalid
from serving.http.fields import Catalog
from serving.http.native import native_routes
from serving.http.openai import openai_routes
from serving.http.page import page_routes
from serving.http.request_log import RequestLog
from serving.jobs import Jobs
from serving.limits import Limits
from serving.metrics import CONTENT_TYPE, Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A server before it listens: its jobs, and the application that speaks HTTP."""

    jobs: Jobs
    metrics: Metrics
    app: ASGIApp


def make_service(
    engine: EngineClient,
    catalog: Catalog,
    rules: AccessRules,
    *,
    limits: Limits | None = None,
    rows: int = 8,
) -> Service:
    """Put a server together; the engine starts with the application and stops with it."""
    limits = limits or Limits()
    metrics = Metrics(rows)
    jobs = Jobs(engine, limits, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        engine.start(EventInbox(loop.call_soon_threadsafe, jobs.receive).put)
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    app = FastAPI(
        title="Latentrt",
        version=program_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(openai_routes(jobs, catalog, limits, int(time.time())))
    app.include_router(native_routes(jobs, catalog, limits))
    app.include_router(automatic1111_routes(jobs, engine, catalog, limits))
    app.include_router(controlnet_routes(catalog, limits))
    app.include_router(page_routes())
    _add_state(app, engine, jobs, metrics)
    _add_refusals(app, metrics)
    guarded: ASGIApp = BodyReader(app, limits)
    guarded = AccessMiddleware(guarded, rules)
    return Service(jobs=jobs, metrics=metrics, app=RequestLog(guarded, metrics))


def _add_state(app: FastAPI, engine: EngineClient, jobs: Jobs, metrics: Metrics) -> None:
    """Add what those ask who run the server."""

    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """Say that this process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["state"], responses={503: {"description": "Not ready"}})
    async def ready() -> JSONResponse:
        """Say whether pictures are drawn now: not while starting, nor while going down."""
        if engine.is_ready and not jobs.draining:
            return JSONResponse({"status": "ready"})
        status = "draining" if jobs.draining else "starting"
        return JSONResponse({"status": status}, status_code=503, headers={"retry-after": "1"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Show what the document of OpenAPI says."""
        return docs_page(app.openapi())

    @app.get("/metrics", tags=["state"], response_class=Response)
    async def numbers() -> Response:
        """Return what is counted, for Prometheus."""
        metrics.waiting.set(jobs.admission.jobs)
        metrics.queued_work.set(jobs.admission.seconds)
        metrics.engine_memory.set(engine.memory_bytes or 0)
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_refusals(app: FastAPI, metrics: Metrics) -> None:
    """Answer errors in one shape, whoever raises them."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        answer = refuse(error)
        code = error.code if isinstance(error, RefusalError) else "invalid_request"
        metrics.refused.labels(code).inc()
        return answer

    async def unfit(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await refused(request, invalid(error.errors()))

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):
            answer = await refused(
                request, NotFoundError("there is no such page", code="not_found")
            )
            answer.status_code = error.status_code
            answer.headers.update(error.headers or {})
            return answer
        return await refused(request, BadRequestError("the body cannot be read"))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        raise error  # `RequestLog` answers, for this application and for what stands before it

    app.add_exception_handler(Exception, unexpected)
    app.add_exception_handler(RefusalError, refused)
    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(HTTPException, unknown)
