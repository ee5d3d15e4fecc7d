"""Answers that are kept for what their user may say of them: of users, in namespaces that take feedback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, final

from ..learning.feedback import Answered, Feedback
from .http_errors import ApiError
from .keys import Key
from .logs import log
from .service import Meant, Service, namespace_of

__all__ = ["HEADER", "Keeper", "keeper_of"]

HEADER = "x-kilotune-feedback-id"
PATIENCE = 5.0  # seconds that an answer waits to be kept


@final
class Keeper:
    """Of one chat.

    Args:
        service: keeps them.
        feedback: of the caller's namespace.
        seconds: how long they are kept.
        first: what all its answers have alike.

    Attributes:
        ids: under what the answers are kept, by their index.

    """

    def __init__(self, service: Service, feedback: Feedback, seconds: float, first: Answered) -> None:
        self._service, self._feedback, self._seconds, self._first = service, feedback, seconds, first
        self._texts: dict[int, list[str]] = {}
        self.ids: dict[int, str] = {}

    def add(self, index: int, text: str) -> None:
        """More of an answer in a stream."""
        self._texts.setdefault(index, []).append(text)

    async def end(self, index: int) -> None:
        """All of an answer in a stream is there: keep it."""
        await self.keep({index: "".join(self._texts.pop(index, ()))})

    async def keep(self, texts: Mapping[int, str]) -> None:
        """Keep answers, on the disk when this returns. One that cannot be kept is given all the same, without an id."""

        def all_of_them() -> dict[int, str]:
            if not self._feedback.taken():  # they may have changed while it was answered
                return {}
            found = {index: self._feedback.keep(self._of(text), self._seconds) for index, text in texts.items()}
            return {index: one.name for index, one in found.items() if one is not None}

        namespace = self._feedback.documents.namespace
        assert namespace is not None
        try:
            async with asyncio.timeout(PATIENCE):
                self.ids |= await self._service.ask(namespace, all_of_them)
        except (ApiError, TimeoutError) as error:
            why = error.message if isinstance(error, ApiError) else f"the store has not answered within {PATIENCE:g} s"
            log("answer not kept", level=logging.WARNING, namespace=namespace, error=why)

    def _of(self, text: str) -> Answered:
        first = self._first
        return Answered(
            user=first.user,
            messages=first.messages,
            tools=first.tools,
            text=text,
            model=first.model,
            version=first.version,
            on=first.on,
        )


async def keeper_of(
    service: Service,
    caller: Key,
    meant: Meant,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> Keeper | None:
    """What keeps the answers to a chat; None: they are not to be kept."""
    if service.training is None or caller.user is None:
        return None
    namespace = namespace_of(caller)
    rules = await service.rules(namespace)
    if not rules.enabled:
        return None
    key = meant.adapter
    on = None if key is None or key.on is None else f"{key.on.namespace}/{key.on.name}/{key.on.version}"
    first = Answered(
        user=caller.user,
        messages=messages,
        tools=tools,
        text="",
        model=service.base if key is None else key.name,
        version=None if key is None else key.version,
        on=on,
    )
    return Keeper(service, service.training.feedback(namespace), rules.keep_seconds, first)
