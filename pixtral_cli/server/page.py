"""Requests for the chat page's own files in, those files out. Knows no model, no key and no other route."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HTML, CSS, JS = (f"text/{kind}; charset=utf-8" for kind in ("html", "css", "javascript"))
SVG = "image/svg+xml; charset=utf-8"
FILES = {
    "/": ("index.html", HTML),
    "/page/style.css": ("style.css", CSS),
    "/page/chat.js": ("chat.js", JS),
    "/page/client.js": ("client.js", JS),
    "/page/pictures.js": ("pictures.js", JS),
    "/page/turn.js": ("turn.js", JS),
    "/page/icon.svg": ("icon.svg", SVG),
}
"""What is served without a key: address -> (file of the package's folder `page`, content type)."""
KEPT = "no-cache"
"""Kept, but asked for again each time: an upgrade shows at once."""


def routes() -> list[Route]:
    """One GET (and HEAD) route for each file of the page."""
    return [Route(address, _endpoint(*file), include_in_schema=False) for address, file in FILES.items()]


def _endpoint(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = (resources.files(__package__) / "page" / name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"Content-Type": kind, "ETag": etag, "Cache-Control": KEPT}

    async def file(request: Request) -> Response:
        if _has(request, etag):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return file


def _has(request: Request, etag: str) -> bool:
    """Whether If-None-Match (RFC 9110, 13.1.2) names `etag`; a proxy that compresses makes it weak, `W/"..."`."""
    named = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    return etag in named or "*" in named
