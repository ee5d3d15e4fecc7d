"""Forgetting a person: asked for by a manager, or by the person; and how far it is."""

from __future__ import annotations

from typing import Any, final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ...fleet.store.documents import Document
from ..learning.forgetting import FORGETTING
from ..learning.users import check_user
from .bodies import Body
from .feedback_routes import Asker, training_of
from .http_errors import ApiError
from .logs import log
from .management_routes import fit, space_of
from .service import Service

__all__ = ["ForgetBody", "routes"]


@final
class ForgetBody(Body):
    """``POST /manage/NAMESPACE/forget``. In the body and not in the path, which logs have."""

    user: str = Field(min_length=1, max_length=400, description="Whom; as keys and claims name them.")


def _shown(one: Document) -> dict[str, Any]:
    """queued, running, or done, with what went and what was made anew."""
    finished = one.data.get("finished")
    return {
        "id": one.name,
        "object": "forgetting",
        "created_at": int(one.created),
        "finished_at": None if finished is None else int(finished),
        "status": one.state,
        "counts": one.data["counts"],
    }


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """All of them."""
    router = APIRouter(responses=errors)
    _manage(router, service)
    _own(router, service)
    return router


async def _asked(service: Service, space: str, user: str) -> Response:
    forgetting = training_of(service).forgetting
    made = await service.ask(space, lambda: forgetting.ask(space, user))
    log("forgetting", namespace=space, forgetting=made.name)
    return JSONResponse(_shown(made), 202)


async def _found(service: Service, space: str, name: str) -> Response:
    documents = training_of(service).documents(space)
    found = await service.ask(space, lambda: documents.find(FORGETTING, name))
    if found is None:
        raise ApiError(404, f"nobody is forgotten under {name!r:.100}", param="forgetting_id")
    return JSONResponse(_shown(found))


def _manage(router: APIRouter, service: Service) -> None:
    @router.post(
        "/manage/{namespace}/forget", operation_id="forget", response_model=None, status_code=202, tags=["management"]
    )
    async def forget(request: Request, namespace: str, body: ForgetBody) -> Response:
        """Forget a person: all that is theirs goes, and what was trained on it is trained again without it."""
        space = space_of(request, namespace)
        training_of(service)
        fit(lambda: check_user(body.user), "user")
        return await _asked(service, space, body.user)

    @router.get(
        "/manage/{namespace}/forget/{forgetting_id}",
        operation_id="forgetting",
        response_model=None,
        tags=["management"],
    )
    async def far(request: Request, namespace: str, forgetting_id: str) -> Response:
        """How far it is."""
        return await _found(service, space_of(request, namespace), forgetting_id)


def _own(router: APIRouter, service: Service) -> None:
    @router.delete("/v1/feedback", operation_id="forget_me", response_model=None, status_code=202, tags=["feedback"])
    async def forget_me(request: Request) -> Response:
        """Forget you: your answers, feedback, files, jobs and models, and what others' models learned of them."""
        asker = Asker(service, request)
        return await _asked(service, asker.namespace, asker.user)

    @router.get(
        "/v1/feedback/forget/{forgetting_id}", operation_id="forgetting_me", response_model=None, tags=["feedback"]
    )
    async def far(request: Request, forgetting_id: str) -> Response:
        """How far it is."""
        return await _found(service, Asker(service, request).namespace, forgetting_id)
