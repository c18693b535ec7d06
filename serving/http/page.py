"""The page at /: files of this package, which load nothing from elsewhere and run nothing in line.

The files are no secret, so they need no key; what they ask the server for does.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from serving.errors import NotFoundError

FOLDER = Path(__file__).parents[1] / "page"
FIRST = "index.html"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFile:
    """A file of the page; tag: what a browser that has it already is told by."""

    data: bytes
    media_type: str
    tag: str

    @classmethod
    def read(cls, path: Path) -> "PageFile":
        """Read a file of the package."""
        data = path.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        return cls(data=data, media_type=TYPES[path.suffix], tag=tag)

    def answer(self, known: str | None) -> Response:
        """Return the file, or that the browser has it; known: its If-None-Match."""
        headers = {
            "cache-control": "no-cache",  # kept, and asked after: an upgrade is seen at once
            "content-security-policy": POLICY,
            "etag": self.tag,
        }
        if known is not None and self.tag in known:
            return Response(status_code=304, headers=headers)
        return Response(self.data, media_type=self.media_type, headers=headers)


def page_routes() -> APIRouter:
    """Return the routes of the page and its files; NotFoundError is among their refusals."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: PageFile.read(path) for path in FOLDER.iterdir() if path.suffix in TYPES}

    @router.get("/")
    async def page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
        """Show the page."""
        return files[FIRST].answer(if_none_match)

    @router.get("/page/{name}")
    async def file(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
        """Return a file of the page."""
        if name not in files:
            raise NotFoundError("there is no such page", code="not_found")
        return files[name].answer(if_none_match)

    return router
