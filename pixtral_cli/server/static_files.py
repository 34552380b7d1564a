"""The files of the chat page and of /docs, as HTTP routes. Knows no model, no key and no other route."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGE = resources.files(__package__) / "page"
SWAGGER = resources.files("fastapi_offline") / "static"
FILES = {
    "/": PAGE / "index.html",
    "/page/style.css": PAGE / "style.css",
    "/page/chat.js": PAGE / "chat.js",
    "/page/client.js": PAGE / "client.js",
    "/page/pictures.js": PAGE / "pictures.js",
    "/page/exchange.js": PAGE / "exchange.js",
    "/page/icon.svg": PAGE / "icon.svg",
    "/docs": PAGE / "docs.html",
    "/docs/docs.js": PAGE / "docs.js",
    "/docs/swagger-ui.css": SWAGGER / "swagger-ui.css",
    "/docs/swagger-ui-bundle.js": SWAGGER / "swagger-ui-bundle.js",
}
"""By address."""
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CACHING = "no-cache"
"""A browser keeps a file, but asks each time whether it has changed: an upgrade shows at once."""


def routes() -> list[Route]:
    """One GET (and HEAD) route for each file."""
    return [Route(address, _endpoint(file), include_in_schema=False) for address, file in FILES.items()]


def _endpoint(file: Traversable) -> Callable[[Request], Awaitable[Response]]:
    kind = next(kind for suffix, kind in KINDS.items() if file.name.endswith(suffix))

    @cache
    def read() -> tuple[bytes, str]:
        content = file.read_bytes()
        return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def send(request: Request) -> Response:
        content, etag = read()
        headers = {"Content-Type": f"{kind}; charset=utf-8", "ETag": etag, "Cache-Control": CACHING}
        if _has(request, etag):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return send


def _has(request: Request, etag: str) -> bool:
    """Whether If-None-Match (RFC 9110, 13.1.2) names `etag`; a proxy that compresses makes it weak, `W/"..."`."""
    named = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    return etag in named or "*" in named
