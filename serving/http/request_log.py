"""What is noted of every request: an id, its status, its time; nothing of what it says."""

import logging
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import EngineFailedError
from serving.http.answers import SAFE, refuse
from serving.metrics import Metrics

log = logging.getLogger("latentrt.serving")


class RequestLog:
    """Numbers, times and counts requests, and answers for what nobody expected."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; a line in the log and a count come of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, began, status = secrets.token_hex(8), time.monotonic(), 0
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in SAFE.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_numbered)
        except Exception:
            log.exception("request %s failed", request_id)
            if not status:
                failed = EngineFailedError("something went wrong here", code="internal_error")
                await refuse(failed)(scope, receive, send_numbered)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            seconds = time.monotonic() - began
            log.info("%s %s %s %d %.3f s", request_id, scope["method"], route, status, seconds)
