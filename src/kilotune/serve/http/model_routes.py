"""``/v1/models``: what a caller may ask, and ``/v1/usage``: what came of it lately."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ...fleet.store import Version
from ..learning.users import PERSONAL
from .generation_routes import caller_of
from .http_errors import ApiError
from .keys import Key
from .service import Service, hiding, namespace_of, others

__all__ = ["routes"]

MAX_PAGE = 1000
LAST = "\U0010ffff"  # no name is behind one that goes on with this


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """All of them."""
    router = APIRouter(responses=errors, tags=["OpenAI"])
    _many(router, service)
    _one(router, service)

    @router.get("/v1/usage", operation_id="usage", response_model=None)
    async def usage(request: Request) -> Response:
        """Your own last answers in numbers."""
        namespace = namespace_of(caller_of(request))
        return JSONResponse({"namespace": namespace, **service.metrics.recent(namespace).to_dict()})

    return router


def _model(service: Service, version: Version, template: tuple[bool, bool]) -> dict[str, Any]:
    told = version.to_dict()
    more = {key: told[key] for key in ("version", "sha256", "tags", "stands_on")}
    return {
        "id": version.name,
        "object": "model",
        "created": int(version.created.timestamp()),
        "owned_by": "you",
        "root": service.base,
        "parent": service.base,
        "max_model_len": service.engine.max_length,
        "chat_template": template[0],
        "own_chat_template": template[1],
        "kilotune": more,
    }


def _base(service: Service, name: str | None = None) -> dict[str, Any]:
    """The base, or what a user's own model is called."""
    return {
        "id": name or service.base,
        "object": "model",
        "created": service.created,
        "owned_by": "kilotune",
        "root": service.base,
        "parent": None if name is None else service.base,
        "max_model_len": service.engine.max_length,
        "chat_template": service.prompts.chats,
        "own_chat_template": False,
        "kilotune": None,
    }


async def _listed(service: Service, caller: Key, after: str | None, limit: int) -> list[Version]:
    """Adapters by name; to one who is a user, users' own models are listed under the one name only."""
    namespace, space = namespace_of(caller), service.adapters

    async def some(after: str | None, limit: int) -> list[Version]:
        return await service.ask(namespace, lambda: space.ls(namespace, after=after, limit=limit), "after")

    found = await some(after, limit) if limit else []
    if caller.user is None or not found:
        return found
    kept = [one for one in found if not one.name.startswith(f"{PERSONAL}:")]
    if len(kept) < len(found) == limit:  # they come one behind the other
        kept += await some(max(found[-1].name, f"{PERSONAL}:{LAST}"), limit - len(kept))
    return kept


def _many(router: APIRouter, service: Service) -> None:
    @router.get("/v1/models", operation_id="models", response_model=None)
    async def models(
        request: Request,
        after: Annotated[str | None, Query(max_length=400, description="Begin behind this name.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    ) -> Response:
        """The base, and the newest version of each of your adapters, by name; a page at a time."""
        caller, namespace = caller_of(request), namespace_of(caller_of(request))
        first = [_base(service)]
        if caller.user is not None and service.training is not None:
            first.append(_base(service, PERSONAL))
        names = [one["id"] for one in first]
        if after in names:
            first, after = first[names.index(after) + 1 :], None
        elif after is not None:
            first = []
        found = await _listed(service, caller, after, limit - len(first) + 1)
        templates = await service.templates(namespace, found)
        data = [*first, *(_model(service, *one) for one in zip(found, templates, strict=True))]
        more, data = len(data) > limit, data[:limit]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": data, "has_more": more, **ends})


def _one(router: APIRouter, service: Service) -> None:
    @router.get("/v1/models/{model:path}", operation_id="model", response_model=None)
    async def model(request: Request, model: str) -> Response:
        """The base, or one of your adapters: NAME, NAME/VERSION or NAME/ALIAS."""
        if model == service.base:
            return JSONResponse(_base(service))
        caller, namespace, (name, which) = caller_of(request), namespace_of(caller_of(request)), service.split(model)
        if model == PERSONAL and caller.user is not None and service.training is not None:
            return JSONResponse(_base(service, PERSONAL))
        if others(caller, name):
            raise ApiError(404, f"there is no adapter {name!r}", param="model")
        try:
            info = await service.ask(namespace, lambda: service.adapters.info(namespace, name, which), "model")
        except ApiError as error:
            raise hiding(caller, name, error) from error
        aliases = await service.ask(namespace, lambda: service.adapters.aliases(namespace, name), "model")
        (template,) = await service.templates(namespace, [info])
        document = _model(service, info, template)
        document["id"], document["kilotune"]["aliases"] = model, aliases
        return JSONResponse(document)
