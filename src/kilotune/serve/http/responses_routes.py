"""``/v1/responses``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .generation_routes import (
    STREAMS,
    Run,
    asked_in,
    caller_of,
    check_biases,
    check_generates,
    enter,
    generations_of,
    in_time,
)
from .responses_body import ResponseBody
from .responses_shape import ResponseShape
from .service import Service
from .tool_answers import Calling

__all__ = ["routes"]


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The one route: what is not kept cannot be read, cancelled or deleted."""
    router = APIRouter(responses={**errors, **STREAMS}, tags=["OpenAI"])

    @router.post("/v1/responses", operation_id="responses", response_model=None)
    async def responses(request: Request, body: ResponseBody) -> Response:
        """Answer a text or a conversation."""
        check_generates(service)
        check_biases(service, body)
        tenant = enter(service, request, 1)
        meant = await service.meant(caller_of(request), body.model, asked_in(body.messages))
        calling = Calling.of(body.asks_tools, body, service.prompts, service.settings.tool_format, meant.own)
        messages = body.messages if calling is None else calling.messages(body.messages)
        longest, deadline = service.longest_prompt, service.deadline(body.timeout)
        async with in_time(deadline):
            prompt = await service.prompts.chat(messages, tenant, param="input", own=meant.own, room=longest)
        tokens = service.room(prompt, body.max_output_tokens, None, "input", "max_output_tokens")
        generations = generations_of(service, request, body, meant, [prompt], [tokens], body.logprobs, deadline)
        if calling is not None:
            generations = calling.guided(generations)
        shape = ResponseShape(body, service.prompts, calling and calling.reader)
        return await Run(service, request, body, generations, shape).answer()

    return router
