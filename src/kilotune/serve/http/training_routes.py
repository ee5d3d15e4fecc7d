"""``/v1/files`` and ``/v1/fine_tuning``: OpenAI's fine-tuning API, over this service's own base."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, TypeVar, final

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ...errors import KilotuneError, did_you_mean
from ...fleet.store.documents import Document, Documents
from ..learning.graders import Graded, Grader, read_grader
from ..learning.jobs import CHECKPOINT, EVENT, FILE, JOB, Jobs
from ..learning.users import PERSONAL
from .http_errors import ApiError, of_library
from .logs import log
from .middleware import noted
from .service import Service, hiding, namespace_of, others
from .training_shapes import (
    GraderBody,
    JobBody,
    RunBody,
    checkpoint_object,
    event_object,
    file_object,
    graded_object,
    job_object,
    page,
)

__all__ = ["routes"]

T = TypeVar("T")
MAX_PAGE = 10_000
PIECE = 1_000_000
BYTES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
DAYS = 30 * 86_400
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
After = Annotated[str | None, Query(max_length=200)]


@final
class _Asker:
    """Whose files and jobs a request is about, and the store that has them."""

    def __init__(self, service: Service, request: Request) -> None:
        caller = noted(request.scope).caller
        assert caller is not None
        if service.training is None:
            raise ApiError(404, "fine-tuning is not served here; start kilotune serve with --learn")
        _check_options(request)
        if not caller.trains:
            told = "this key may not upload files or train; kilotune keys add --trains makes one that may"
            raise ApiError(403, told)
        self._service, self.training, self.namespace = service, service.training, namespace_of(caller)
        self._caller, self.user = caller, caller.user

    async def documents(self, call: Callable[[Documents], T], param: str | None = None) -> T:
        """Ask the store for files or jobs."""
        own = self.training.documents(self.namespace)
        return await self._service.ask(self.namespace, lambda: call(own), param)

    async def jobs(self, call: Callable[[Jobs], T], param: str | None = None) -> T:
        """Ask for something of jobs."""
        own = self.training.jobs(self.namespace)
        return await self._service.ask(self.namespace, lambda: call(own), param)

    async def grade(self, call: Callable[[], T]) -> T:
        """Do something with a grader, beside the loop; one of each namespace at a time."""
        async with self.training.grading.lane(self.namespace) as lane:
            try:
                return await lane.run(call)
            except KilotuneError as error:
                raise of_library(error, "grader") from error

    async def file(self, name: str) -> Document:
        """A file of the namespace."""
        found = await self.documents(lambda documents: documents.find(FILE, name))
        if found is None:
            raise ApiError(404, f"there is no file {name!r}", param="file_id")
        return found

    async def model(self, model: str) -> str:
        """What a job's model means now: of "personal", the asker's live version, or what that would stand on.

        Raises:
            ApiError: it is nothing to go on from.

        """
        if model == PERSONAL:
            meant = await self._service.meant(self._caller, model)
            key = meant.adapter
            model = self._service.base if key is None else f"{key.name}/{key.version}"
        await self._check_model(model)
        return model

    async def _check_model(self, model: str) -> None:
        name, training = self._service.split(model)[0], self.training
        if others(self._caller, name):
            raise ApiError(404, f"there is no adapter {name!r}", param="model")
        try:
            await self._service.ask(self.namespace, lambda: training.check_model(self.namespace, model), "model")
        except ApiError as error:
            raise hiding(self._caller, name, error) from error

    def shown(self, job: Document) -> dict[str, Any]:
        """A job as OpenAI has it."""
        return job_object(job, self.namespace)


def _check_options(request: Request) -> None:
    """Refuse what a request asks for in its query and the route does not know: a filter, say."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise ApiError(
                400, f"{name:.50}: there is no such option.{did_you_mean(name[:50], known)}", param=name[:50]
            )


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The routes of both."""
    router = APIRouter(prefix="/v1", responses=errors, tags=["fine-tuning"])
    _uploads(router, service)
    _files(router, service)
    _jobs(router, service)
    _lists(router, service)
    _graders(router, service)
    return router


def _uploads(router: APIRouter, service: Service) -> None:
    @router.post("/files", operation_id="upload_file", response_model=None)
    async def upload(
        request: Request,
        file: Annotated[UploadFile, File()],
        purpose: Annotated[str, Form(max_length=100)],
        anchor: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
        seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=DAYS)] = None,
    ) -> Response:
        """Upload a file of training data: JSON lines."""
        asker = _Asker(service, request)
        if purpose != "fine-tune":
            raise ApiError(400, f"purpose: {purpose!r} is not served; taken is 'fine-tune'", param="purpose")
        if (anchor is None) != (seconds is None) or anchor not in (None, "created_at"):
            raise ApiError(400, "expires_after: expected anchor 'created_at' and seconds", param="expires_after")
        told = {"filename": (file.filename or "file.jsonl")[:200], "purpose": purpose, "user": asker.user}
        body = [piece async for piece in _pieces(file)]
        until = None if seconds is None else time.time() + seconds
        quota = asker.training.limits.file_bytes
        made = await asker.documents(
            lambda documents: documents.add(FILE, told, body=body, until=until, quota=quota), "file"
        )
        log("file uploaded", namespace=asker.namespace, file=made.name, bytes=made.size)
        return JSONResponse(file_object(made))


def _files(router: APIRouter, service: Service) -> None:
    @router.get("/files", operation_id="list_files", response_model=None)
    async def files(
        request: Request,
        purpose: Annotated[str | None, Query(max_length=100)] = None,
        after: After = None,
        limit: Limit = MAX_PAGE,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    ) -> Response:
        """Your files, the newest first."""
        asker = _Asker(service, request)
        newest = order == "desc"
        found = await asker.documents(lambda all_: all_.ls(FILE, after=after, newest=newest, limit=limit + 1))
        chosen = [one for one in found if purpose is None or one.data["purpose"] == purpose]
        return JSONResponse(page([file_object(one) for one in chosen], limit))

    @router.get("/files/{file_id}", operation_id="file", response_model=None)
    async def one(request: Request, file_id: str) -> Response:
        """One of your files."""
        return JSONResponse(file_object(await _Asker(service, request).file(file_id)))

    @router.delete("/files/{file_id}", operation_id="delete_file", response_model=None)
    async def delete(request: Request, file_id: str) -> Response:
        """Remove a file. A job that has not read it yet fails."""
        asker = _Asker(service, request)
        await asker.file(file_id)
        await asker.documents(lambda documents: documents.rm(FILE, file_id))
        log("file removed", namespace=asker.namespace, file=file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    @router.get("/files/{file_id}/content", operation_id="file_content", response_model=None, responses=BYTES)
    async def content(request: Request, file_id: str) -> Response:
        """A file as it was uploaded."""
        asker = _Asker(service, request)
        await asker.file(file_id)
        body = asker.training.documents(asker.namespace).body(FILE, file_id)
        return StreamingResponse(body, media_type="application/octet-stream")


async def _pieces(file: UploadFile) -> Any:
    while piece := await file.read(PIECE):
        yield piece


def _jobs(router: APIRouter, service: Service) -> None:
    @router.post("/fine_tuning/jobs", operation_id="create_job", response_model=None)
    async def create(request: Request, body: JobBody) -> Response:
        """Have a model trained from a file."""
        asker = _Asker(service, request)
        asked = replace(body.asked, user=asker.user, model=await asker.model(body.model))
        if asked.grader is not None:
            await asker.grade(lambda: read_grader(asked.grader, "method.reinforcement.grader"))
        job = await asker.jobs(lambda jobs: jobs.create(asked))
        log("job created", namespace=asker.namespace, job=job.name, model=body.model)
        return JSONResponse(asker.shown(job))

    @router.get("/fine_tuning/jobs/{job_id}", operation_id="job", response_model=None)
    async def one(request: Request, job_id: str) -> Response:
        """One of your jobs."""
        asker = _Asker(service, request)
        return JSONResponse(asker.shown(await asker.jobs(lambda jobs: jobs.find(job_id))))

    def moves(what: str, move: Callable[[Jobs, str], Document], does: str) -> None:
        async def moved(request: Request, job_id: str) -> Response:
            asker = _Asker(service, request)
            job = await asker.jobs(lambda jobs: move(jobs, job_id))
            log(f"job {what}", namespace=asker.namespace, job=job_id)
            return JSONResponse(asker.shown(job))

        moved.__doc__ = does
        place = f"/fine_tuning/jobs/{{job_id}}/{what}"
        router.add_api_route(place, moved, methods=["POST"], operation_id=f"{what}_job", response_model=None)

    moves("cancel", Jobs.cancel, "End a job.")
    moves("pause", Jobs.pause, "Let a job wait; it shows as queued.")
    moves("resume", Jobs.resume, "Let a paused job go on.")


def _lists(router: APIRouter, service: Service) -> None:
    @router.get("/fine_tuning/jobs", operation_id="jobs", response_model=None)
    async def jobs(request: Request, after: After = None, limit: Limit = 20) -> Response:
        """Your jobs, the newest first."""
        asker = _Asker(service, request)
        found = await asker.documents(lambda all_: all_.ls(JOB, after=after, newest=True, limit=limit + 1))
        return JSONResponse(page([asker.shown(one) for one in found], limit))

    def children(what: str, kind: str, show: Callable[[Document], dict[str, Any]], does: str) -> None:
        async def listed(request: Request, job_id: str, after: After = None, limit: Limit = 20) -> Response:
            asker = _Asker(service, request)
            await asker.jobs(lambda jobs: jobs.find(job_id))
            found = await asker.documents(
                lambda all_: all_.ls(kind, parent=job_id, after=after, newest=True, limit=limit + 1)
            )
            return JSONResponse(page([show(one) for one in found], limit))

        listed.__doc__ = does
        place = f"/fine_tuning/jobs/{{job_id}}/{what}"
        router.add_api_route(place, listed, methods=["GET"], operation_id=f"job_{what}", response_model=None)

    children("events", EVENT, event_object, "What a job has told, the newest first.")
    children("checkpoints", CHECKPOINT, checkpoint_object, "The models that a job has made.")


def _graders(router: APIRouter, service: Service) -> None:
    @router.post("/fine_tuning/alpha/graders/run", operation_id="run_grader", response_model=None)
    async def run(request: Request, body: RunBody) -> Response:
        """Grade an answer."""
        asker = _Asker(service, request)

        def graded() -> tuple[Grader, Graded, float]:
            grader, began = read_grader(body.grader), time.monotonic()
            found = grader.grade(body.item or {}, body.model_sample)
            return grader, found, time.monotonic() - began

        return JSONResponse(graded_object(*await asker.grade(graded)))

    @router.post("/fine_tuning/alpha/graders/validate", operation_id="validate_grader", response_model=None)
    async def validate(request: Request, body: GraderBody) -> Response:
        """See whether there can be such a grader."""
        await _Asker(service, request).grade(lambda: read_grader(body.grader))
        return JSONResponse({"grader": body.grader})
