"""``/v1/embeddings`` and ``/v1/classify``."""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...errors import KilotuneError
from ..engine.interface import Vector
from .http_errors import ApiError, of_library
from .json_pieces import VALUES, Later
from .logs import pseudonym
from .middleware import noted
from .schemas import ClassifyBody, EmbeddingBody, InputBody
from .service import Service, namespace_of

__all__ = ["routes"]


async def _vectors(service: Service, request: Request, body: InputBody, what: str) -> list[Vector]:
    if len(body.inputs) > (most := service.settings.max_inputs):
        raise ApiError(400, f"input: {len(body.inputs)} texts; a request has at most {most} here", param="input")
    caller = noted(request.scope).caller
    assert caller is not None
    tenant = namespace_of(caller)
    with service.gate.enter(tenant, 1):  # before anything slow is done
        meant = await service.meant(caller, body.model)
        labels = service.metrics.of_adapter(tenant, None if meant.adapter is None else meant.adapter.name)
        texts = [await service.prompts.whole(text, "input", tenant) for text in body.inputs]
        longest = min(service.engine.max_length, service.settings.max_prompt or service.engine.max_length)
        for place, text in enumerate(texts):
            if len(text) > longest:
                told = f"input[{place}]: has {len(text)} tokens; this model takes {longest}"
                raise ApiError(400, told, param="input", code="context_length_exceeded")
        call = service.engine.embed if what == "embed" else service.engine.classify
        noted(request.scope).labels = labels
        noted(request.scope).fields |= {"model": body.model, "user": pseudonym(body.user), "inputs": len(texts)}
        try:
            async with asyncio.timeout(service.settings.max_seconds):
                vectors = await call(tenant, meant.adapter, texts)
        except TimeoutError:
            raise ApiError(504, "the answer was not done in time") from None
        except KilotuneError as error:
            raise of_library(error, "model") from error
    tokens = sum(vector.tokens for vector in vectors)
    noted(request.scope).fields["prompt_tokens"] = tokens
    service.metrics.prompt.labels(service.metrics.label(tenant)).inc(tokens)
    service.metrics.by_adapter.prompt.labels(*labels).inc(tokens)
    return vectors


def _usage(vectors: list[Vector]) -> dict[str, int]:
    tokens = sum(vector.tokens for vector in vectors)
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The two routes."""
    router = APIRouter(responses=errors, tags=["OpenAI"])

    @router.post("/v1/embeddings", operation_id="embeddings", response_model=None)
    async def embeddings(request: Request, body: EmbeddingBody) -> Response:
        """Embed texts."""
        if not service.engine.embeds:
            raise ApiError(400, f"{service.base} makes no embeddings", param="model")
        vectors = await _vectors(service, request, body, "embed")
        size = len(vectors[0].values)
        if body.dimensions not in (None, size):
            raise ApiError(
                400, f"dimensions: this model's embeddings have {size}, and cannot be cut", param="dimensions"
            )
        packed = body.encoding_format == "base64"

        def told(one: tuple[int, Vector]) -> dict[str, Any]:
            index, vector = one
            values = _packed(vector) if packed else vector.values
            return {"object": "embedding", "index": index, "embedding": values}

        data = Later(enumerate(vectors), told, VALUES)
        made = {"object": "list", "data": data, "model": body.model, "usage": _usage(vectors)}
        return await service.writing.response(made)

    @router.post("/v1/classify", operation_id="classify", response_model=None)
    async def classify(request: Request, body: ClassifyBody) -> Response:
        """Classify texts: each label's probability, and the likeliest label."""
        labels = service.engine.labels
        if labels is None:
            raise ApiError(400, f"{service.base} is no classifier", param="model")
        vectors = await _vectors(service, request, body, "classify")
        data = Later(enumerate(vectors), lambda one: _classified(one[0], one[1], labels), VALUES)
        made = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return await service.writing.response({**made, "model": body.model, "data": data, "usage": _usage(vectors)})

    return router


def _classified(index: int, one: Vector, labels: Sequence[str]) -> dict[str, Any]:
    scores = torch.tensor(one.values, dtype=torch.float64)
    chances = scores.softmax(0).tolist()
    best = int(scores.argmax())
    names = labels if len(labels) == len(chances) else tuple(f"LABEL_{i}" for i in range(len(chances)))
    found = {"index": index, "label": names[best], "probs": chances, "scores": list(one.values)}
    return {**found, "labels": list(names), "num_classes": len(chances)}


def _packed(vector: Vector) -> str:
    """As OpenAI's clients ask for it: float32, little-endian, in base64."""
    values = array("f", vector.values)
    if values.itemsize != 4:  # pragma: no cover
        raise ApiError(500, "no float32 here")
    return base64.b64encode(values.tobytes()).decode()
