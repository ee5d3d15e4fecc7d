"""The web page at ``/``: a few files of its own, and nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

from .http_errors import ApiError
from .service import Service

__all__ = ["routes"]

TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = ("index.html", "page.js", "page.css")


def routes(service: Service) -> APIRouter:
    """The page and its files."""
    router = APIRouter(include_in_schema=False)
    folder = files(__package__ or "") / "page"
    texts = {name: (folder / name).read_bytes() for name in FILES}

    def file(name: str) -> Response:
        kind = TYPES[name.rpartition(".")[2]]
        headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
        return Response(texts[name], media_type=f"{kind}; charset=utf-8", headers=headers)

    @router.get("/", response_model=None)
    async def index() -> Response:
        return file("index.html")

    @router.get("/page/{name}", response_model=None)
    async def asset(name: str) -> Response:
        if name not in texts:
            raise ApiError(404, f"there is no /page/{name}")
        return file(name)

    return router
