"""``/v1/feedback``: what users say of answers, and what became of it; and a namespace's rules for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar, final

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ...fleet.store.documents import Document
from ...fleet.store.names import check_on
from ...train.data.turn_marks import TOOLS
from ..learning import turns
from ..learning.feedback import ANSWER, Feedback, FeedbackRules, Lesson
from ..learning.rollback import roll_back
from ..learning.training import Training
from ..learning.users import model_of
from .feedback_shapes import FeedbackBody, RulesBody, event_object, feedback_object, lesson_object, rules_object
from .generation_routes import caller_of, in_time
from .http_errors import ApiError
from .logs import log
from .management_routes import fit, space_of
from .middleware import noted
from .service import Service, namespace_of
from .training_shapes import page

__all__ = ["Asker", "routes", "training_of"]

T = TypeVar("T")
MAX_PAGE = 1000
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE)]
After = Annotated[str | None, Query(max_length=200)]
Order = Annotated[str, Query(pattern="^(asc|desc)$")]


def training_of(service: Service) -> Training:
    """What learns here.

    Raises:
        ApiError: nothing does.

    """
    if service.training is None:
        raise ApiError(404, "feedback is not taken here; start kilotune serve with --learn")
    return service.training


@final
class Asker:
    """Whose feedback a request is about, and the store that has it."""

    def __init__(self, service: Service, request: Request) -> None:
        caller, training = caller_of(request), training_of(service)
        if caller.user is None:
            told = (
                "feedback is a user's, and this key is no single one's: kilotune keys add --user makes one that is, "
                "and with --signs each request says it in X-Kilotune-User"
            )
            raise ApiError(403, told, code="no_user")
        self.service, self.namespace, self.user = service, namespace_of(caller), caller.user
        self.feedback = training.feedback(self.namespace)

    async def ask(self, call: Callable[[Feedback], T], param: str | None = None) -> T:
        """Ask the store."""
        return await self.service.ask(self.namespace, lambda: call(self.feedback), param)

    async def rules(self) -> FeedbackRules:
        """Those of the namespace.

        Raises:
            ApiError: it takes no feedback.

        """
        rules = await self.service.rules(self.namespace, fresh=True)
        if not rules.enabled:
            told = (
                f"the namespace {self.namespace!r} takes no feedback; who has a manager's key can turn it on: "
                f'PUT /manage/{self.namespace}/feedback {{"enabled": true}}'
            )
            raise ApiError(403, told, code="feedback_off")
        return rules

    async def change(
        self, after: float, call: Callable[[Feedback], T], seen: Callable[[Feedback], object], param: str = "answer"
    ) -> T:
        """Change what there is, and have it learned. Woken before, too: a server may die in between.

        seen: raises where there is nothing to change; nobody is woken then.
        """

        def work() -> T:
            documents = self.feedback.documents
            seen(self.feedback)
            turns.wake(documents, self.user, after)
            found = call(self.feedback)
            turns.wake(documents, self.user, after)
            return found

        return await self.service.ask(self.namespace, work, param)

    async def check_text(self, body: FeedbackBody) -> None:
        """See that a correction can be an assistant's message behind what was asked, and is no mark of a turn there.

        Raises:
            ApiError: it cannot, or all of it is longer than the model takes.

        """
        if body.correction is None:
            return
        service, text = self.service, body.correction
        _, kept = await self.ask(lambda feedback: feedback.answer(body.answer, self.user), "answer")
        tools = [{TOOLS: kept["tools"]}] if kept["tools"] else []
        messages = [*kept["messages"], {"role": "assistant", "content": text}, *tools]
        room = service.engine.max_length
        async with in_time(service.deadline(None)):
            ids = await service.prompts.chat(messages, self.namespace, "closed", "correction", room=room)
        if len(ids) > room:
            told = f"correction: with its messages it has {len(ids)} tokens; this model takes {room}"
            raise ApiError(400, told, param="correction", code="context_length_exceeded")


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """All of them."""
    router = APIRouter(responses=errors, tags=["feedback"])
    _say(router, service)
    _learned(router, service)  # before those with an id, which would take its words for one
    _said(router, service)
    _rules(router, service)
    return router


def _say(router: APIRouter, service: Service) -> None:
    @router.post("/v1/feedback", operation_id="give_feedback", response_model=None)
    async def give(request: Request, body: FeedbackBody) -> Response:
        """Say of an answer that it was good or bad, what the right one is, or that it was better than another one."""
        asker = Asker(service, request)
        noted(request.scope).held.enter_context(service.gate.enter(asker.namespace, 1))
        rules = await asker.rules()
        asker.feedback.check(body.said)
        await asker.check_text(body)
        made, replaced = await asker.change(
            rules.pause_seconds,
            lambda feedback: feedback.add(asker.user, body.said),
            seen=lambda feedback: feedback.answer(body.answer, asker.user),
        )
        log("feedback", namespace=asker.namespace, feedback=made.name, kind=made.data["kind"], replaced=replaced)
        return JSONResponse({**feedback_object(made), "replaced": replaced})


def _said(router: APIRouter, service: Service) -> None:
    @router.get("/v1/feedback", operation_id="list_feedback", response_model=None)
    async def said(request: Request, after: After = None, limit: Limit = 100, order: Order = "desc") -> Response:
        """Your feedback, the newest first."""
        asker, newest = Asker(service, request), order == "desc"
        found = await asker.ask(lambda own: own.ls(asker.user, after=after, newest=newest, limit=limit + 1))
        return JSONResponse(page([feedback_object(one) for one in found], limit))

    @router.get("/v1/feedback/{feedback_id}", operation_id="feedback", response_model=None)
    async def one(request: Request, feedback_id: str) -> Response:
        """One piece of your feedback, with what was asked and answered."""
        asker = Asker(service, request)

        def found(own: Feedback) -> tuple[Document, Lesson | None]:
            document = own.find(feedback_id, asker.user)
            return document, own.lesson(document)

        document, lesson = await asker.ask(found, "feedback_id")
        if lesson is None:
            raise ApiError(404, f"there is no feedback {feedback_id!r:.100} of yours", param="feedback_id")
        return await service.writing.response(lesson_object(document, lesson))

    @router.delete("/v1/feedback/{feedback_id}", operation_id="delete_feedback", response_model=None)
    async def delete(request: Request, feedback_id: str) -> Response:
        """Take feedback back; what was learned from it is learned again without it."""
        asker = Asker(service, request)
        await asker.change(
            0.0,
            lambda own: own.remove(feedback_id, asker.user),
            seen=lambda own: own.find(feedback_id, asker.user),
            param="feedback_id",
        )
        log("feedback taken back", namespace=asker.namespace, feedback=feedback_id)
        return JSONResponse({"id": feedback_id, "object": "feedback", "deleted": True})


def _learned(router: APIRouter, service: Service) -> None:
    @router.get("/v1/feedback/events", operation_id="feedback_events", response_model=None)
    async def events(request: Request, after: After = None, limit: Limit = 20) -> Response:
        """What became of your feedback, the newest first."""
        asker = Asker(service, request)
        found = await asker.ask(
            lambda own: turns.events(own.documents, asker.user, after=after, limit=limit + 1), "after"
        )
        taken = (await service.rules(asker.namespace)).enabled
        return JSONResponse({**page([event_object(one) for one in found], limit), "taken": taken})

    @router.post("/v1/feedback/rollback", operation_id="roll_feedback_back", response_model=None)
    async def back(request: Request) -> Response:
        """Let your own model be what it was before it learned last; or none of it."""
        asker = Asker(service, request)
        try:
            found = await asker.ask(lambda own: roll_back(own.documents, service.adapters, asker.user))
        except ApiError as error:
            raise ApiError(409, error.message) if error.status == 404 else error from error
        version = None if found is None else found.version
        log("feedback rolled back", namespace=asker.namespace, version=version)
        return JSONResponse({"model": model_of(asker.user), "version": version})


def _rules(router: APIRouter, service: Service) -> None:
    async def shown(space: str) -> Response:
        feedback = training_of(service).feedback(space)
        rules, answers = await service.ask(space, lambda: (feedback.rules(), feedback.documents.total(ANSWER)))
        return JSONResponse(rules_object(rules, service.base, answers))

    @router.get("/manage/{namespace}/feedback", operation_id="feedback_rules", response_model=None, tags=["management"])
    async def rules(request: Request, namespace: str) -> Response:
        """Whether a namespace takes feedback, and how."""
        return await shown(space_of(request, namespace))

    @router.put(
        "/manage/{namespace}/feedback", operation_id="set_feedback_rules", response_model=None, tags=["management"]
    )
    async def set_rules(request: Request, namespace: str, body: RulesBody) -> Response:
        """Have a namespace take feedback, or not: then answers that were kept are removed; feedback stays."""
        space, model = space_of(request, namespace), body.model
        feedback = training_of(service).feedback(space)
        if model is not None and model != service.base:
            name, which = service.split(model)
            model = name if which is None else f"{name}/{which}"
            await _check_model(service, space, model)
        made = FeedbackRules(
            enabled=body.enabled,
            keep_seconds=float(body.keep_seconds),
            pause_seconds=float(body.pause_seconds),
            model=None if model == service.base else model,
            scope=body.scope,
        )
        await service.ask(space, lambda: feedback.set_rules(made))
        await service.rules(space, fresh=True)
        log("feedback rules", namespace=space, enabled=made.enabled, model=model, request_id=noted(request.scope).id)
        return await shown(space)


async def _check_model(service: Service, space: str, model: str) -> None:
    """See that personal models can stand on it."""
    try:
        await service.ask(
            space, lambda: fit(lambda: check_on(model), "model") and service.adapters.settle(space, model)
        )
    except ApiError as error:
        if error.status != 404:
            raise
        told = f"model: expected {service.base!r} or a shared adapter, got {model!r}: {error.message}"
        raise ApiError(400, told, param="model") from error
