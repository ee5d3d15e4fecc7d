"""``/manage``: the adapters of the manager's namespaces, and the service itself."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import JSONResponse, Response

from ...adapter_files.names import composed
from ...adapter_files.own_files import OWN_FILES
from ...errors import AdapterError, ConfigError
from ...fleet.store import Version
from ...fleet.store.adapter_store import Which
from ...fleet.store.names import (
    check_alias,
    check_metadata,
    check_name,
    check_namespace,
    check_new_word,
    check_on,
    check_tags,
    check_which,
)
from ..learning.jobs import CHECKPOINTS
from ..learning.users import PERSONAL
from . import puts as storing
from .http_errors import ApiError
from .logs import log
from .middleware import noted
from .puts import Given, uploaded
from .schemas import AliasesBody, NamesBody
from .service import Service

__all__ = ["fit", "namespace_here", "routes", "space_of"]

MAX_PAGE = 1000
STORED = {
    "type": "object",
    "required": ["name", "version", "sha256", "created", "created_at", "ready", "note"],
    "properties": {
        "name": {"type": "string"},
        "version": {"type": "integer"},
        "sha256": {"type": "string", "description": "Of the contents, as in the lists."},
        "created": {"type": "boolean", "description": "Whether this put made the version."},
        "created_at": {"type": "string", "description": "When it was made, which the lists call created."},
        "ready": {"type": "boolean", "description": "Whether it answers requests at once."},
        "note": {"type": ["string", "null"], "description": "Why it does not."},
    },
}
PUT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The newest version is this one already; nothing was written, but for the alias."},
    201: {"description": "A new version; it is on disk."},
}
for _answer in PUT_ANSWERS.values():
    _answer["content"] = {"application/json": {"schema": STORED}}


def space_of(request: Request, namespace: str) -> str:
    """The namespace of the path, where the key may manage it; another one is as good as not there."""
    caller = noted(request.scope).caller
    assert caller is not None
    if caller.namespace not in (None, namespace):
        raise ApiError(403, f"this key manages the namespace {caller.namespace!r} only", param="namespace")
    noted(request.scope).fields["managed"] = namespace
    fit(lambda: check_namespace(namespace), "namespace")
    return namespace


def namespace_here(service: Service, request: Request, given: str | None) -> str:
    """The namespace that a body names, or the only one that there is for the key."""
    caller, anybody = noted(request.scope).caller, service.keys.open_to
    assert caller is not None
    only = caller.namespace or (None if anybody is None else anybody.namespace)
    if (namespace := given or only) is None:
        told = "namespace: is missing; this key manages all of them, so say whose adapter it is"
        raise ApiError(400, told, param="namespace")
    return space_of(request, namespace)


def fit(check: Any, param: str) -> Any:
    """What cannot be a name, an alias or a tag is a bad request, and not something that is not there."""
    try:
        return check()
    except (AdapterError, ConfigError) as error:
        raise ApiError(400, str(error), param=param) from error


def _which(text: str | None) -> Which:
    if text is None:
        return None
    found: Which = fit(lambda: check_which(int(text) if text.isdecimal() and len(text) < 12 else text), "version")
    return found


def _shown(version: Version, aliases: Mapping[str, int] | None = None) -> dict[str, Any]:
    document = version.to_dict()
    if aliases is not None:
        document["aliases"] = sorted(alias for alias, number in aliases.items() if number == version.version)
    return document


def _metadata(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"metadata: expected a JSON object: {error}", param="metadata") from error
    fit(lambda: check_metadata(found), "metadata")
    return dict(found)


def _own_files(files: Sequence[UploadFile]) -> dict[str, BinaryIO]:
    found: dict[str, BinaryIO] = {}
    for file in files:
        name = file.filename or ""
        if name not in OWN_FILES or name in found:
            why = "was given twice" if name in found else f"expected one of {', '.join(OWN_FILES)}"
            raise ApiError(400, f"files: {name!r:.100}: {why}", param="files")
        found[name] = file.file
    return found


def _put_routes(router: APIRouter, service: Service) -> None:
    @router.put(
        "/{namespace}/adapters/{name}",
        operation_id="put_adapter",
        response_model=None,
        status_code=201,
        responses=PUT_ANSWERS,
    )
    async def put(
        request: Request,
        namespace: str,
        name: str,
        config: Annotated[UploadFile, File(description="adapter_config.json")],
        weights: Annotated[UploadFile, File(description="adapter_model.safetensors")],
        alias: Annotated[str | None, Form(description="Let this alias name the new version.")] = None,
        tags: Annotated[list[str] | None, Form(description="Words to find it by.")] = None,
        metadata: Annotated[str | None, Form(description="A JSON object.")] = None,
        on: Annotated[
            str | None,
            Form(description="The shared adapter that it was trained on top of: NAME, NAME/3 or NAME/alias."),
        ] = None,
        files: Annotated[
            list[UploadFile] | None, File(description=f"What it brings beside them: {', '.join(OWN_FILES)}.")
        ] = None,
    ) -> Response:
        """Put an adapter as the newest version of its name. Whatever is answered, it can be put again.

        Where the newest version has the same files, tags and metadata, that is the version: 200, and `created` is
        false. Any other put is a new version: 201. Both are on disk. `ready` says whether the version answers requests
        at once; where it does not, `note` says why.

        With `on`, the adapter stands on a version of that shared one, of this namespace or of `@shared`, from now on
        and wherever its aliases go. Requests for the adapter's name run both.
        """
        space = space_of(request, namespace)
        fit(lambda: check_name(name), "name")
        if composed(name) == composed(service.base.partition("/")[0]):
            raise ApiError(409, f"{name!r} is what the base is called here; take another name", param="name")
        if name == PERSONAL and service.training is not None:
            raise ApiError(
                409, f"{name!r} is what each user's own model is called here; take another name", param="name"
            )
        if alias is not None:
            fit(lambda: check_new_word("alias", check_alias(alias)), "alias")
        fit(lambda: [check_new_word("tag", tag) for tag in check_tags(tags or ())], "tags")
        if on is not None:
            on = _on(service, on)
        given = Given(
            uploaded(config.file, weights.file, _own_files(files or ())), _metadata(metadata), tags or (), alias, on
        )
        with noted(request.scope).place:
            made = await storing.put(service, space, name, given)
        version, request_id = made.version.version, noted(request.scope).id
        log("put", namespace=space, name=name, version=version, alias=alias, lacks=made.lacks, request_id=request_id)
        return JSONResponse(made.document(), 201 if made.created else 200)


def _on(service: Service, text: str) -> str:
    """What ``on`` says, with the version that a request for that name would mean."""
    fit(lambda: check_on(text), "on")
    name, which = service.split(text)
    return name if which is None else f"{name}/{which}"


def _delete_routes(router: APIRouter, service: Service) -> None:
    @router.delete("/{namespace}/adapters/{name}", operation_id="delete_adapter", response_model=None)
    async def delete(
        request: Request,
        namespace: str,
        name: str,
        version: Annotated[str | None, Query(description="A number, an alias or latest; without it all.")] = None,
        force: Annotated[bool, Query(description="Even if an alias names it, or others stand on it.")] = False,
    ) -> Response:
        """Remove an adapter, or one version of it. Requests that run keep what they began with.

        With the model of a fine-tuning job (`ft:...`) go its checkpoints.
        """
        space, which = space_of(request, namespace), _which(version)
        number: Which = "latest" if version == "latest" else which
        try:
            count = await service.ask(space, lambda: service.adapters.rm(space, name, number, force=force), "name")
            if version is None and name.startswith("ft:"):
                count += await _rm_checkpoints(service, space, name, force)
        except ApiError as error:
            held = "is named by" in error.message or "would answer no more" in error.message
            raise ApiError(409, error.message, param="version") if held else error from error
        log("deleted", namespace=space, name=name, version=version, request_id=noted(request.scope).id)
        return JSONResponse({"name": name, "removed": count})


async def _rm_checkpoints(service: Service, space: str, name: str, force: bool) -> int:
    """Remove what a job published of its earlier epochs; how many versions."""
    adapters = service.adapters

    def remove() -> int:
        found = adapters.ls(space, f"{glob.escape(name)}{CHECKPOINTS}*")
        return sum(adapters.rm(space, one.name, force=force) for one in found)

    return await service.ask(space, remove, "name")


def _list_routes(router: APIRouter, service: Service) -> None:
    @router.get("/{namespace}/adapters", operation_id="list_adapters", response_model=None)
    async def ls(
        request: Request,
        namespace: str,
        pattern: Annotated[str | None, Query(max_length=400, description="* ? [...] as in a shell.")] = None,
        tag: Annotated[list[str] | None, Query(description="Only what has all of these.")] = None,
        after: Annotated[str | None, Query(max_length=400, description="Begin behind this name.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    ) -> Response:
        """The newest version of each adapter, by name."""
        space = space_of(request, namespace)
        tags = fit(lambda: check_tags(tag or ()), "tag")
        found = await service.ask(
            space, lambda: service.adapters.ls(space, pattern, tags=tags, after=after, limit=limit + 1), "pattern"
        )
        shown = [_shown(version) for version in found[:limit]]
        return JSONResponse({"adapters": shown, "more": len(found) > limit})

    @router.get("/{namespace}/adapters/{name}", operation_id="show_adapter", response_model=None)
    async def show(request: Request, namespace: str, name: str) -> Response:
        """All versions of an adapter, with their aliases."""
        space = space_of(request, namespace)
        fit(lambda: check_name(name), "name")
        aliases = await service.ask(space, lambda: service.adapters.aliases(space, name), "name")
        versions = await service.ask(space, lambda: service.adapters.versions(space, name), "name")
        if not versions:  # the error that there is wherever a name means nothing, with the nearest ones
            versions = [await service.ask(space, lambda: service.adapters.info(space, name), "name")]
        return JSONResponse({"name": name, "versions": [_shown(one, aliases) for one in versions]})


def _alias_routes(router: APIRouter, service: Service) -> None:
    @router.post("/{namespace}/aliases/{alias}", operation_id="roll_out", response_model=None)
    async def roll_out(request: Request, namespace: str, alias: str, body: AliasesBody) -> Response:
        """Let an alias name a version of each of these adapters, for all or for none."""
        space = space_of(request, namespace)
        fit(lambda: check_new_word("alias", check_alias(alias)), "alias")
        for which in body.versions.values():
            fit(lambda which=which: check_which(which), "versions")
        moved = await service.ask(space, lambda: service.adapters.roll_out(space, alias, body.versions), "versions")
        log("rolled out", namespace=space, alias=alias, adapters=len(moved), request_id=noted(request.scope).id)
        return JSONResponse({"alias": alias, "versions": moved})

    @router.post("/{namespace}/aliases/{alias}/back", operation_id="roll_back", response_model=None)
    async def roll_back(request: Request, namespace: str, alias: str, body: NamesBody) -> Response:
        """Let an alias name what it named before its last move, for all or for none."""
        space = space_of(request, namespace)
        fit(lambda: check_alias(alias), "alias")
        try:
            moved = await service.ask(space, lambda: service.adapters.roll_back(space, alias, body.names), "names")
        except ApiError as error:
            raise ApiError(409, error.message, param="names") if error.status == 404 else error from error
        log("rolled back", namespace=space, alias=alias, adapters=len(moved), request_id=noted(request.scope).id)
        return JSONResponse({"alias": alias, "versions": moved})

    @router.delete("/{namespace}/adapters/{name}/aliases/{alias}", operation_id="unalias", response_model=None)
    async def unalias(request: Request, namespace: str, name: str, alias: str) -> Response:
        """Take an alias away; the version that it named stays."""
        space = space_of(request, namespace)
        fit(lambda: check_alias(alias), "alias")
        await service.ask(space, lambda: service.adapters.unalias(space, name, alias), "name")
        return JSONResponse({"name": name, "removed": alias})


def _service_routes(router: APIRouter, service: Service) -> None:
    @router.get("", operation_id="service", response_model=None)
    async def show(request: Request) -> Response:
        """The service as it stands."""
        _for_all(request)
        return JSONResponse(_standing(service))

    @router.post("/drain", operation_id="drain", response_model=None)
    async def drain(request: Request) -> Response:
        """Take no new requests, and let those that run go on; /ready says 503 from now on."""
        _for_all(request)
        service.draining = True
        log("draining", request_id=noted(request.scope).id)
        return JSONResponse(_standing(service))

    @router.delete("/drain", operation_id="undrain", response_model=None)
    async def undrain(request: Request) -> Response:
        """Take requests again."""
        _for_all(request)
        service.draining = False
        log("taking requests again", request_id=noted(request.scope).id)
        return JSONResponse(_standing(service))


def _for_all(request: Request) -> None:
    caller = noted(request.scope).caller
    if caller is None or caller.namespace is not None:
        raise ApiError(403, "this needs a manager's key that is of no single namespace")


def _standing(service: Service) -> dict[str, Any]:
    now = service.engine.stats()
    return {
        "base": service.base,
        "draining": service.draining,
        "engine": service.engine.healthy() or "ok",
        "store": service.adapters.store_state() or "ok",
        "keys": service.keys.trouble or "ok",
        "answers": service.gate.count,
        "puts": service.puts.count,
        **{name: getattr(now, name) for name in now.__slots__},
    }


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/manage", responses=errors, tags=["management"])
    _service_routes(router, service)
    _put_routes(router, service)
    _delete_routes(router, service)
    _list_routes(router, service)
    _alias_routes(router, service)
    return router
