"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.interface import Finish, Generation, Item, Prompted, Sampling, Token
from ..learning.lessons import question_of
from ..learning.users import PERSONAL
from .answers import Asked, Event, collect, ended_badly, events
from .http_errors import ApiError
from .json_pieces import JsonResponse
from .keeping import HEADER as FEEDBACK_ID
from .keeping import Keeper, keeper_of
from .keys import Key
from .logs import pseudonym
from .middleware import noted
from .response_shapes import ChatShape, CompletionShape, Echo, Writer, usage_of
from .schemas import ChatBody, CompletionBody, GenerationBody, SamplingBody, told_messages
from .service import Meant, Service, namespace_of, seed_of
from .tool_answers import Calling

__all__ = [
    "STREAMS",
    "Run",
    "asked_in",
    "caller_of",
    "check_biases",
    "check_generates",
    "enter",
    "generations_of",
    "in_time",
    "routes",
]

BEGINS = 1024  # tokens of a prompt by which it is judged
SCORED = 1 << 20  # log-probabilities of prompts that one request may have: some 60 MB of JSON
USUAL = 16  # OpenAI's own number of new tokens for a completion
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with stream its events.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}


@final
class EventStream(Response):
    """A stream of events, sent from the request's own task, so that what it holds is let go of there."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"content-type": f"{self.media_type}; charset=utf-8"})
        self._events = events
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@final
class Run:
    """One request on its way: what it asks the engine for, and how the answers are written."""

    def __init__(
        self,
        service: Service,
        request: Request,
        body: SamplingBody,
        generations: list[Generation],
        shape: Writer,
        keeper: Keeper | None = None,
    ) -> None:
        self.service, self.body, self.generations, self.shape = service, body, generations, shape
        self.keeper = keeper
        self.note = noted(request.scope)
        self.note.fields |= {"model": body.model, "user": pseudonym(body.user), "answers": len(generations)}

    async def answer(self) -> Response:
        """The response; a stream's first event is waited for, so that what fails at once has its status."""
        held, engine, metrics = self.note.held, self.service.engine, self.service.metrics
        adapter = self.generations[0].adapter
        labels = metrics.of_adapter(self.generations[0].tenant, None if adapter is None else adapter.name)
        asked = [Asked(engine.generate(one), one, metrics, labels) for one in self.generations]
        self.note.labels, self.note.asked = labels, asked
        stream = await held.enter_async_context(contextlib.aclosing(events(asked)))
        if self.body.stream:
            first = await anext(stream)
            if isinstance(first[1], Finish) and (error := ended_badly(first[1])) is not None:
                raise error
            return EventStream(self._written(first, stream, asked))
        answers = await collect(stream, len(asked))
        finishes = [answer.finish for answer in answers if answer.finish is not None]
        self._count(asked, usage_of(finishes, self.body.choices))
        headers = {}
        if self.keeper is not None:
            await self.keeper.keep({index: answer.text for index, answer in enumerate(answers)})
            if len(answers) == 1 and self.keeper.ids:
                headers[FEEDBACK_ID] = self.keeper.ids[0]
        return JsonResponse(await self.service.writing.all(self.shape.whole(answers, self.body.choices)), headers)

    async def _written(
        self, first: Event, stream: AsyncIterator[Event], asked: Sequence[Asked]
    ) -> AsyncIterator[bytes]:
        finishes: dict[int, Finish] = {}
        begun: set[int] = set()
        index, event = first
        writing = self.service.writing
        try:
            while True:
                if isinstance(event, Finish):
                    if (error := ended_badly(event)) is not None:
                        raise error
                    finishes[index] = event
                await self._hold(index, event)
                texts = await writing.all(self._told(index, event, index not in begun))
                begun.add(index)
                if len(finishes) == len(asked):
                    break
                for text in texts:
                    yield text
                index, event = await anext(stream)
        except ApiError as error:
            self.note.fields["error"] = error.code
            for text in await writing.all(self.shape.failed(error)):
                yield text
            return
        ordered = [finishes[i] for i in range(len(asked))]
        self._count(asked, usage_of(ordered, self.body.choices))
        texts = await writing.all(itertools.chain(texts, self.shape.last(ordered, self.body.choices)))
        await self.note.held.aclose()  # before the client knows, who may ask again at once
        for text in texts:
            yield text

    async def _hold(self, index: int, event: Item) -> None:
        """Gather the answers of a stream, and keep each before its last event is sent."""
        if self.keeper is None or isinstance(event, Prompted):
            return
        self.keeper.add(index, event.text)
        if isinstance(event, Finish):
            await self.keeper.end(index)

    def _told(self, index: int, event: Item, first: bool) -> Iterator[bytes]:
        """What an event tells. first: of its answer."""
        if first:
            yield from self.shape.begin(index, event.scores if isinstance(event, Prompted) else None)
        if isinstance(event, Token):
            yield self.shape.token(index, event)
        elif isinstance(event, Finish):
            yield from self.shape.end(index, event)

    def _count(self, asked: Sequence[Asked], usage: dict[str, Any]) -> None:
        first = [one.first for one in asked if one.first is not None]
        self.note.fields |= {
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "first_token_ms": round(1000 * min(first), 1) if first else None,
        }


def caller_of(request: Request) -> Key:
    """Who asks."""
    caller = noted(request.scope).caller
    assert caller is not None  # the front let it in
    return caller


def check_generates(service: Service) -> None:
    """The base is to write texts."""
    if not service.engine.generates:
        raise ApiError(400, f"{service.base} writes no text; it has /v1/embeddings or /v1/classify", param="model")


def check_biases(service: Service, body: SamplingBody) -> None:
    """Biases are to be of tokens that the model has."""
    if (top := max(map(int, body.logit_bias or ()), default=0)) >= service.prompts.vocabulary:
        told = f"logit_bias: token {top}; the model has {service.prompts.vocabulary}"
        raise ApiError(400, told, param="logit_bias")


def _sampling(
    body: SamplingBody, tokens: int, logprobs: int | None, choice: int, ends: tuple[int, ...] = ()
) -> Sampling:
    return Sampling(
        max_tokens=tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=None if body.top_k in (0, -1) else body.top_k,
        seed=seed_of(body.seed, choice),
        stop=body.stops,
        stop_token_ids=(*(body.stop_token_ids or ()), *(() if body.ignore_eos else ends)),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=body.scored,
        logit_bias=tuple((int(token), value) for token, value in (body.logit_bias or {}).items()),
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        min_p=body.min_p or 0.0,
        grammar=body.grammar,
    )


@contextlib.asynccontextmanager
async def in_time(deadline: float) -> AsyncIterator[None]:
    """For what comes before the engine: a prompt may have to wait for its turn to be rendered.

    Raises:
        ApiError: the deadline came first.

    """
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError:
        raise ApiError(504, "the answer was not done in time; its prompt was not read yet") from None


def generations_of(
    service: Service,
    request: Request,
    body: SamplingBody,
    meant: Meant,
    prompts: Sequence[tuple[int, ...]],
    tokens: Sequence[int],
    logprobs: int | None,
    deadline: float,
) -> list[Generation]:
    """What to ask the engine for: each prompt as often as answers are wanted. tokens: the most of each."""
    caller, name = caller_of(request), noted(request.scope).id
    _check_scored(body, prompts)
    ends = service.prompts.templates.ends(meant.own)
    asked = itertools.product(zip(prompts, tokens, strict=True), range(body.choices))
    return [
        service.generation(
            f"{name}-{place}", caller, meant, prompt, _sampling(body, room, logprobs, choice, ends), deadline
        )
        for place, ((prompt, room), choice) in enumerate(asked)
    ]


def _check_scored(body: SamplingBody, prompts: Sequence[tuple[int, ...]]) -> None:
    if (top := body.scored) is None:
        return
    count = sum(map(len, prompts)) * body.choices * (top + 1)
    if count > SCORED:
        name = "logprobs" if isinstance(body, CompletionBody) and body.echoed == top else "prompt_logprobs"
        told = (
            f"{count} numbers for these prompts, and a request has at most {SCORED}; send fewer, or ask for a lower one"
        )
        raise ApiError(400, f"{name}: {told}", param=name)


def routes(service: Service, errors: dict[int | str, dict[str, Any]]) -> APIRouter:
    """The two routes."""
    router = APIRouter(responses={**errors, **STREAMS}, tags=["OpenAI"])

    @router.post("/v1/completions", operation_id="completions", response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        """Go on with a text."""
        check_generates(service)
        check_biases(service, body)
        tenant = enter(service, request, len(body.prompts) * body.choices)
        meant = await _goes_on(service, caller_of(request), body)
        longest, deadline = service.longest_prompt, service.deadline(body.timeout)
        async with in_time(deadline):
            prompts = [await service.prompts.plain(prompt, "prompt", tenant, longest) for prompt in body.prompts]
            tokens = [service.room(prompt, body.max_tokens, USUAL, "prompt") for prompt in prompts]
            echoes = await _echoes(service, body, prompts, tenant) if body.echo else None
        generations = generations_of(service, request, body, meant, prompts, tokens, body.logprobs, deadline)
        shape = CompletionShape(*_common(service, "cmpl", body, body.logprobs), echoes=echoes)
        return await Run(service, request, body, generations, shape).answer()

    @router.post("/v1/chat/completions", operation_id="chat", response_model=None)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        check_generates(service)
        check_biases(service, body)
        tenant = enter(service, request, body.choices)
        messages = told_messages(body.messages)
        meant = await service.meant(caller_of(request), body.model, asked_in(messages))
        calling = Calling.of(body.asks_tools, body, service.prompts, service.settings.tool_format, meant.own)
        if calling is not None:
            messages = calling.messages(messages)
        longest, deadline = service.longest_prompt, service.deadline(body.timeout)
        async with in_time(deadline):
            prompt = await service.prompts.chat(messages, tenant, body.ending, own=meant.own, room=longest)
        tokens = service.room(prompt, body.limit, None, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        generations = generations_of(service, request, body, meant, [prompt], [tokens], logprobs, deadline)
        if calling is not None:
            generations = calling.guided(generations)
        keeper = None
        if body.ending == "asked":  # what goes on with a message, or behind one, is no answer of its own
            told = None if calling is None else list(calling.ask.tools)
            keeper = await keeper_of(service, caller_of(request), meant, told_messages(body.messages), told)
        kept = None if keeper is None else keeper.ids
        shape = ChatShape(*_common(service, "chatcmpl", body, logprobs), reader=calling and calling.reader, kept=kept)
        return await Run(service, request, body, generations, shape, keeper).answer()

    return router


def enter(service: Service, request: Request, count: int) -> str:
    """Take places for so many answers, before anything slow is done for them; the tenant's name."""
    if count > (most := service.settings.max_choices):
        raise ApiError(
            400, f"{count} answers asked for (prompts times n); a request has at most {most} here", param="n"
        )
    tenant = namespace_of(caller_of(request))
    noted(request.scope).held.enter_context(service.gate.enter(tenant, count))
    return tenant


def asked_in(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a conversation's user says; where that is nothing, its last message."""
    return [one["content"] for one in messages if one["role"] == "user"] or [question_of(messages)]


async def _goes_on(service: Service, caller: Key, body: CompletionBody) -> Meant:
    """What goes on with all prompts of a request.

    Raises:
        ApiError: a user's own model with some of them, and what it stands on with others.

    """
    if body.model != PERSONAL:
        return await service.meant(caller, body.model)
    found = [await service.meant(caller, PERSONAL, [service.prompts.begins(one, BEGINS)]) for one in body.prompts]
    if any(one.adapter != found[0].adapter for one in found):
        told = "prompt: some of these are near what your own model was taught, and others are not; send them one by one"
        raise ApiError(400, told, param="prompt")
    return found[0]


async def _echoes(
    service: Service, body: CompletionBody, prompts: Sequence[tuple[int, ...]], tenant: str
) -> list[Echo]:
    """The prompt of each choice."""
    made = []
    for given, ids in zip(body.prompts, prompts, strict=True):
        plain = isinstance(given, str)
        offsets = [] if body.echoed is None else await service.prompts.offsets(ids, plain, tenant)
        echo = Echo(given if isinstance(given, str) else service.prompts.text(given), ids, offsets)
        made.extend([echo] * body.choices)
    return made


def _common(
    service: Service, prefix: str, body: GenerationBody, logprobs: int | None
) -> tuple[str, str, int, Any, bool, int | None, int | None]:
    usage = bool(body.stream_options and body.stream_options.include_usage)
    name = f"{prefix}-{uuid.uuid4().hex}"
    return name, body.model, int(time.time()), service.prompts, usage, logprobs, body.prompt_logprobs
