"""The application: routes, their errors, and the document that describes them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from ...errors import KilotuneError
from . import embedding_routes as encoding
from . import feedback_routes as saying
from . import forgetting_routes as forgetting
from . import generation_routes as generating
from . import lora_routes as loading
from . import management_routes as managing
from . import model_routes as modelling
from . import responses_routes as responding
from . import token_routes as tokens
from . import training_routes as training
from . import web_page as pages
from .feedback_shapes import FeedbackBody
from .http_errors import ApiError, of_library, of_parsing, of_validation
from .middleware import Front, internal, noted
from .responses_body import ResponseBody
from .schemas import ChatBody, ClassifyBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from .service import Service
from .training_shapes import JobBody

__all__ = ["create_app"]

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
STATUSES = {
    400: "The request is wrong.",
    401: "No valid key.",
    403: "The key is not for this.",
    404: "There is no such thing, for this key.",
    408: "The body did not arrive in time.",
    409: "It does not go with what is there.",
    413: "The body is too large.",
    415: "The body is of another kind, or compressed.",
    422: "The adapter is damaged, of another base, or not fit to be served.",
    429: "Too many answers or puts at once; Retry-After says when to come again.",
    500: "A fault of the service.",
    501: "It needs a package that is not installed here.",
    503: "The store is away, or the service is ending; Retry-After says when to come again.",
    504: "It was not done in time.",
    507: "The disk is full.",
}
KNOWN = {
    "/v1/completions": sorted(CompletionBody.model_fields),
    "/v1/chat/completions": sorted(ChatBody.model_fields),
    "/v1/responses": sorted(ResponseBody.model_fields),
    "/v1/embeddings": sorted(EmbeddingBody.model_fields),
    "/v1/classify": sorted(ClassifyBody.model_fields),
    "/v1/load_lora_adapter": sorted(loading.LoadBody.model_fields),
    "/v1/unload_lora_adapter": sorted(loading.UnloadBody.model_fields),
    "/v1/fine_tuning/jobs": sorted(JobBody.model_fields),
    "/v1/feedback": sorted(FeedbackBody.model_fields),
    "/tokenize": sorted(TokenizeBody.model_fields),
    "/detokenize": sorted(DetokenizeBody.model_fields),
}
QUIET: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "auto_configure": False,
}  # middleware.py does


def create_app(service: Service) -> ASGIApp:
    """The whole service as an ASGI application, for an engine that has been started."""
    app = FastAPI(
        title="kilotune",
        version=importlib.metadata.version("kilotune"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=QUIET,
    )
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
        for status, text in STATUSES.items()
    }
    _handlers(app)
    app.include_router(modelling.routes(service, errors))
    _health(app, service, errors)
    app.include_router(generating.routes(service, errors))
    app.include_router(responding.routes(service, errors))
    app.include_router(encoding.routes(service, errors))
    app.include_router(tokens.routes(service, errors))
    app.include_router(training.routes(service, errors))
    app.include_router(saying.routes(service, errors))
    app.include_router(forgetting.routes(service, errors))
    app.include_router(managing.routes(service, errors))
    app.include_router(loading.routes(service, errors))
    app.include_router(pages.routes(service))
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return cross_origin(Front(app, service), service.settings.cors_origin)


def cross_origin(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The application for pages of these origins, too: around all else, so that errors carry the header.

    A preflight has no key and needs none. Credentials (cookies) are never allowed, for the service has no use for any:
    who asks has a key, which a page sends by itself.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "PUT", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after", "x-kilotune-feedback-id"),
        allow_private_network="*" not in origins,
    )


# -- errors ------------------------------------------------------------------------------------------


def _handlers(app: FastAPI) -> None:
    def told(request: Request, error: ApiError) -> Response:
        noted(request.scope).fields["error"] = error.code
        return JSONResponse(error.document(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> Response:
        return told(request, error)

    @app.exception_handler(KilotuneError)
    async def library(request: Request, error: KilotuneError) -> Response:
        return told(request, of_library(error))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return told(request, internal(noted(request.scope).id))  # the front logs it

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        if isinstance(error.body, bytes) and error.body:  # FastAPI parses no body of another kind
            return told(
                request, ApiError(415, f"the body's content-type: expected application/json, got {kind!r:.100}")
            )
        return told(request, of_validation(error.errors(), KNOWN.get(request.url.path, ())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        texts = {404: f"there is no {request.url.path}", 405: f"{request.url.path} takes no {request.method}"}
        message = texts.get(error.status_code, str(error.detail))
        if error.__cause__ is not None and error.status_code == 400:  # FastAPI says only that it could not parse it
            return told(request, of_parsing(error.__cause__))
        return told(request, ApiError(error.status_code, message, headers=error.headers))


# -- health ------------------------------------------------------------------------------------------


def _health(app: FastAPI, service: Service, errors: dict[int | str, dict[str, Any]]) -> None:
    @app.get("/health", operation_id="health", response_model=None, tags=["health"])
    async def health() -> Response:
        """200 while the engine works; else the process is to be started anew."""
        trouble = service.engine.healthy()
        return JSONResponse({"status": "ok" if trouble is None else "failed"}, 200 if trouble is None else 503)

    @app.get("/ready", operation_id="ready", response_model=None, tags=["health"])
    async def ready() -> Response:
        """200 while requests are taken, and are to be sent here."""
        state = "failed" if service.engine.healthy() else "draining" if service.draining or service.leaving else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    text: dict[int | str, dict[str, Any]] = {**errors, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", operation_id="metrics", response_class=PlainTextResponse, responses=text, tags=["health"])
    async def metrics(request: Request) -> Response:
        """For Prometheus; with a monitor's or a manager's key. A manager of one namespace gets its series alone."""
        caller = noted(request.scope).caller
        text = service.metrics.text(None if caller is None else caller.namespace)
        return Response(text, media_type="text/plain; version=0.0.4")


def _document(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's document, with the errors as they are and the key that is needed."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes, description=__doc__)
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in made["paths"].items():
            for operation in operations.values():
                if path not in ("/health", "/ready", "/"):
                    operation["security"] = [{"key": []}]
                if operation["responses"].get("422", {}).get("content", {}).get("application/json", {}) and (
                    "HTTPValidationError" in str(operation["responses"]["422"])
                ):
                    del operation["responses"]["422"]
        app.openapi_schema = made
    return app.openapi_schema
