"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, as vLLM has them, for who manages adapters.

An adapter that is loaded from a folder is put into the store, with all that a put does, and a mark of where it came
from; what has the mark can be unloaded. What was put otherwise is loaded already, and is not unloaded: the store may
have the only copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field

from ...adapter_files.names import composed
from ...errors import has_control
from ...fleet.store import Version
from ...fleet.store.names import check_name
from ..learning.users import PERSONAL
from . import puts as storing
from .adapter_folders import opened
from .http_errors import ApiError
from .logs import log
from .management_routes import fit, namespace_here
from .middleware import noted
from .options import LORA
from .puts import Given, uploaded
from .schemas import Body
from .service import Service

__all__ = ["LoadBody", "UnloadBody", "routes"]

MARK = "loaded_from"
AGAIN = "If you want to load the adapter in place, set 'load_inplace' to True."


class AdapterBody(Body):
    """What both have."""

    neutral = LORA
    lora_name: str = Field(min_length=1, max_length=400)
    namespace: str | None = Field(
        None, min_length=1, max_length=400, description="Not vLLM's: whose adapter, where the key manages all."
    )


@final
class LoadBody(AdapterBody):
    """``/v1/load_lora_adapter``."""

    lora_path: str = Field(
        min_length=1,
        max_length=4096,
        description="A folder that the operator allows, or what the store has: NAME, NAME/3, NAME/alias.",
    )
    load_inplace: bool | None = Field(None, description="Take the place of one of this name.")


@final
class UnloadBody(AdapterBody):
    """``/v1/unload_lora_adapter``."""


@final
class Loading:
    """Loads and unloads, those of one name one after the other."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._turns: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = weakref.WeakValueDictionary()

    def turn(self, space: str, name: str) -> asyncio.Lock:
        """Whose turn it is with a name."""
        return self._turns.setdefault((space, composed(name)), asyncio.Lock())

    async def load(self, space: str, body: LoadBody) -> str | None:
        """Why it does not answer yet; None where it does."""
        if not body.lora_path.startswith("/"):
            return await self._stored(space, body)
        if has_control(body.lora_path):
            raise ApiError(400, "lora_path: holds control characters", param="lora_path")
        if not self.service.settings.adapter_folder:
            told = "lora_path: this service loads from no folders; it is started with --adapter-folder DIR for that"
            raise ApiError(403, told, param="lora_path")
        before = await self._versions(space, body.lora_name)
        if before and not body.load_inplace:
            told = f"The lora adapter {body.lora_name!r} has already been loaded. {AGAIN}"
            raise ApiError(400, told, param="lora_name")
        given = Given(
            functools.partial(self._bring, body.lora_path),
            {MARK: body.lora_path},
            (),
            version if isinstance(version := self.service.settings.version, str) else None,
        )
        try:
            made = await storing.put(self.service, space, body.lora_name, given)
        except ApiError as error:  # vLLM has 400 for what a put calls 422
            raise ApiError(400, error.message, param="lora_path") if error.status == 422 else error from error
        if made.created:
            await self._drop(space, before)
        return made.lacks

    def _bring(self, path: str, folder: Path) -> None:
        """In a thread of the puts."""
        settings = self.service.settings
        with opened(path, settings.adapter_folder, settings.max_adapter) as (config, weights, files):
            uploaded(config, weights, files)(folder)

    async def _stored(self, space: str, body: LoadBody) -> str | None:
        """What the store has is served by its own name; it is read now, so that it answers at once."""
        adapters, service = self.service.adapters, self.service
        name, which = service.split(body.lora_path)
        own, own_which = service.split(body.lora_name)
        key = await service.ask(space, lambda: adapters.resolve(space, name, which), "lora_path")
        named = await service.ask(space, lambda: adapters.resolve(space, own, own_which), "lora_name")
        if (named.name, named.version) != (key.name, key.version):
            told = f"lora_name: the store has it as {name!r}; it answers by that name, and by its versions and aliases"
            raise ApiError(400, told, param="lora_name")
        await service.ask(space, lambda: adapters.load(key), "lora_path")
        return None

    async def unload(self, space: str, name: str) -> None:
        """Raises ApiError: 404: there is none. 409: it was put, or is in use by others."""
        service, adapters = self.service, self.service.adapters
        found = await self._versions(space, name)
        if not found:
            raise ApiError(404, f"The lora adapter {name!r} cannot be found.", param="lora_name")
        if put := [one.version for one in found if MARK not in one.metadata]:
            told = f"The lora adapter {name!r} was put into the store, not loaded (version {put[0]}); "
            raise ApiError(409, f"{told}DELETE /manage/{space}/adapters/{name} removes it for good", param="lora_name")
        try:
            await service.ask(space, lambda: adapters.rm(space, name), "lora_name")
        except ApiError as error:
            raise ApiError(409, error.message, param="lora_name") if error.status == 404 else error from error

    async def _versions(self, space: str, name: str) -> Sequence[Version]:
        try:
            return await self.service.ask(space, lambda: self.service.adapters.versions(space, name))
        except ApiError as error:
            if error.status != 404:
                raise
            return []

    async def _drop(self, space: str, before: Sequence[Version]) -> None:
        """What was loaded in this place before goes, unless somebody has named it, or stands on it."""
        for one in before:
            if MARK in one.metadata:
                remove = functools.partial(self.service.adapters.rm, space, one.name, one.version)
                with contextlib.suppress(ApiError):
                    await self.service.ask(space, remove)


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The two routes."""
    text: dict[int | str, dict[str, Any]] = {
        **errors,
        200: {"description": "What was done.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    }
    router = APIRouter(prefix="/v1", responses=text, tags=["management"])
    loading = Loading(service)

    def enter(request: Request, body: AdapterBody) -> str:
        """The namespace, with a place for a put taken in it."""
        space = namespace_here(service, request, body.namespace)
        fit(lambda: check_name(body.lora_name), "lora_name")
        noted(request.scope).place.enter_context(service.puts.enter(space, 1))
        return space

    @router.post("/load_lora_adapter", operation_id="load_lora_adapter", response_class=PlainTextResponse)
    async def load(request: Request, body: LoadBody) -> Response:
        """Serve an adapter by this name, from a folder that the operator allows or from the store."""
        taken = {composed(service.base.partition("/")[0]), *([] if service.training is None else [PERSONAL])}
        if composed(body.lora_name) in taken:
            told = f"The lora adapter name {body.lora_name!r} conflicts with a served base model."
            raise ApiError(400, told, param="lora_name")
        space = enter(request, body)
        with noted(request.scope).place:
            async with loading.turn(space, body.lora_name):
                lacks = await loading.load(space, body)
        log("loaded", namespace=space, name=body.lora_name, lacks=lacks, request_id=noted(request.scope).id)
        more = "" if lacks is None else f" It is read when it is first asked for: {lacks}."
        return PlainTextResponse(f"Success: LoRA adapter {body.lora_name!r} added successfully.{more}")

    @router.post("/unload_lora_adapter", operation_id="unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(request: Request, body: UnloadBody) -> Response:
        """Serve an adapter no more that was loaded from a folder, which stays as it is."""
        space = enter(request, body)
        with noted(request.scope).place:
            async with loading.turn(space, body.lora_name):
                await loading.unload(space, body.lora_name)
        log("unloaded", namespace=space, name=body.lora_name, request_id=noted(request.scope).id)
        return PlainTextResponse(f"Success: LoRA adapter {body.lora_name!r} removed successfully.")

    return router
