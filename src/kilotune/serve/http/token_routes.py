"""``/tokenize``, ``/detokenize`` and ``/version``, as vLLM has them."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...train.data.turn_marks import TOOLS
from .generation_routes import in_time
from .json_pieces import Later
from .middleware import noted
from .schemas import DetokenizeBody, TokenizeBody, told_messages
from .service import Meant, Service, namespace_of
from .tool_formats import check_takes_tools

__all__ = ["routes"]


async def _enter(service: Service, request: Request, model: str | None) -> tuple[str, Meant | None]:
    """Take a place before anything slow is done, and see that there is such a model; the tenant's name, and that."""
    caller = noted(request.scope).caller
    assert caller is not None  # the front let it in
    tenant = namespace_of(caller)
    noted(request.scope).held.enter_context(service.gate.enter(tenant, 1))
    if model is None:
        return tenant, None
    noted(request.scope).fields["model"] = model
    return tenant, await service.meant(caller, model)


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The three routes."""
    router = APIRouter(responses=errors, tags=["tokens"])

    @router.post("/tokenize", operation_id="tokenize", response_model=None)
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        """The tokens that a completion of this prompt, or a chat of these messages, begins with."""
        tenant, meant = await _enter(service, request, body.model)
        prompts, own = service.prompts, None if meant is None else meant.own
        if body.messages is not None:
            messages = told_messages(body.messages)
            if body.tools:
                check_takes_tools(prompts.templates.written(own))
                messages.append({TOOLS: [tool.told() for tool in body.tools]})
            async with in_time(service.deadline(None)):
                ids = await prompts.chat(messages, tenant, body.ending, own=own)
        else:
            async with in_time(service.deadline(None)):
                ids = await prompts.tokens(body.prompt or "", body.add_special_tokens is not False, tenant)
        names = Later(ids, lambda number: prompts.names([number])[0]) if body.return_token_strs else None
        return await service.writing.response(
            {"count": len(ids), "max_model_len": service.engine.max_length, "tokens": ids, "token_strs": names}
        )

    @router.post("/detokenize", operation_id="detokenize", response_model=None)
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        """The text of tokens."""
        tenant, _ = await _enter(service, request, body.model)
        async with in_time(service.deadline(None)):
            text = await service.prompts.decoded(body.tokens, "tokens", tenant)
        return JSONResponse({"prompt": text})

    @router.get("/version", operation_id="version", response_model=None)
    async def version() -> Response:
        """Kilotune's version."""
        return JSONResponse({"version": importlib.metadata.version("kilotune")})

    return router
