"""The web page: static files that come with the package, read once at start and served under a strict content policy."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from aiohttp import web

CONTENT_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"
"""Whatever an answer smuggles into the page, no inline script or style runs and no other host is asked."""

_FILES = (
    ("/", "index.html", "text/html"),
    ("/page.css", "page.css", "text/css"),
    ("/page.js", "page.js", "text/javascript"),
    ("/page.svg", "page.svg", "image/svg+xml"),
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def page_routes() -> list[web.RouteDef]:
    """`/` and the files it names. Each answers If-None-Match (RFC 9110 section 13.1.2), so that a reload costs no body."""
    static = files("read_side") / "static"
    return [web.get(path, _serve(_PageFile((static / name).read_bytes(), kind))) for path, name, kind in _FILES]


@dataclass(frozen=True, slots=True)
class _PageFile:
    body: bytes
    content_type: str

    @property
    def etag(self) -> str:
        return sha256(self.body).hexdigest()[:32]


def _serve(file: _PageFile) -> Handler:
    headers = {
        "ETag": f'"{file.etag}"',
        # The browser asks each time, so that a page and a script of different versions never meet.
        "Cache-Control": "no-cache",
        "Content-Security-Policy": CONTENT_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    async def handler(request: web.Request) -> web.Response:
        if any(tag.value in {file.etag, "*"} for tag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=file.body, content_type=file.content_type, charset="utf-8", headers=headers)

    return handler
