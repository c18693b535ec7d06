"""Who may come in: the name that a server is called by, browsers on other sites, keys.

A web page of a stranger can send requests to 127.0.0.1 (they need no answer to do harm), and a name
of the stranger's can be made to mean 127.0.0.1 (DNS rebinding). So the Host must be one of this
server's names, and what changes something must not come from another site. Scripts send neither
Origin nor Sec-Fetch-Site, and following a link to this server is not refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.addresses import is_loopback
from serving.errors import ForbiddenError, UnauthorizedError
from serving.http.answers import refuse
from serving.keys import Keys

READING = frozenset(("GET", "HEAD", "OPTIONS"))
OPEN_PATHS = frozenset(("/", "/health", "/ready"))
OPEN_FOLDER = "/page/"  # of the page at /, which asks for a key itself
LOCAL_NAMES = frozenset(("localhost", "127.0.0.1", "::1"))
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRules:
    """What a request must be to come in.

    hosts: names that this server may be called by, None for any
    origins: of other sites whose pages may use it, such as "https://app.example"
    keys: None where everybody may come in
    """

    hosts: frozenset[str] | None
    origins: frozenset[str] = frozenset()
    keys: Keys | None = None

    @classmethod
    def of(
        cls, host: str, names: Iterable[str], origins: Iterable[str], keys: Keys | None
    ) -> "AccessRules":
        """Return the rules of a server that listens on an address, with these names beside."""
        names = frozenset(name.lower() for name in names)
        checked = LOCAL_NAMES | names | {host} if is_loopback(host) else names
        return cls(hosts=checked or None, origins=frozenset(origins), keys=keys)

    def check(self, method: str, path: str, scheme: str, headers: Headers) -> str:
        """Return the caller's name, "" where there are no keys.

        Raises ForbiddenError or UnauthorizedError.
        """
        self.check_site(method, scheme, headers)
        if self.keys is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return ""
        name = self.keys.name(headers.get("authorization", ""))
        if name is None:
            raise UnauthorizedError(
                "give an API key of this server: Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return name

    def check_site(self, method: str, scheme: str, headers: Headers) -> None:
        """Refuse foreign names and browsers on other sites. Raises ForbiddenError."""
        here = _host_and_port(f"{scheme}://{headers.get('host', '')}")
        if self.hosts is not None and here[0] not in self.hosts:
            raise ForbiddenError(
                "this server is not called that; the operator may allow a name with --allow-host",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if method in READING or origin in self.origins:
            return
        foreign = origin is not None and _host_and_port(origin) != here
        if foreign or headers.get("sec-fetch-site") == "cross-site":
            raise ForbiddenError(
                "a page of another site may not use this server; the operator may allow it with "
                "--allow-origin",
                code="cross_site",
            )


def _host_and_port(url: str) -> tuple[str, int | None]:
    """Return the lower-case host and the port, the scheme's own where none stands there."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").lower(), parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return "", None


class AccessMiddleware:
    """The rules before an application; pure ASGI, so that a client that leaves is seen."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, with its caller in `scope["state"]`, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin if origin in self._rules.origins else None

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start" and allowed is not None:
                answered = MutableHeaders(scope=message)
                answered["access-control-allow-origin"] = allowed
                answered["vary"] = "Origin"
            await send(message)

        try:
            if allowed and scope["method"] == "OPTIONS":
                self._rules.check_site("OPTIONS", scope["scheme"], headers)
                await _preflight()(scope, receive, send_allowed)
                return
            caller = self._rules.check(scope["method"], scope["path"], scope["scheme"], headers)
        except (ForbiddenError, UnauthorizedError) as error:
            answer = refuse(error)
            if isinstance(error, UnauthorizedError) and headers.get("sec-fetch-dest") == "empty":
                # A script asked; at "Basic" its browser would open a window for a password.
                answer.headers["www-authenticate"] = 'Bearer realm="latentrt"'
            await answer(scope, receive, send_allowed)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send_allowed)


def _preflight() -> Response:
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": "authorization, content-type, idempotency-key",
            "access-control-max-age": "600",
        },
    )
