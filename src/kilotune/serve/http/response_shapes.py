"""Answers in OpenAI's two shapes, whole and as a stream's events."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

from ..engine.interface import Finish, Token
from .answers import Answer
from .prompts import Prompts

__all__ = ["ChatShape", "CompletionShape", "Shape", "event_of", "usage_of"]

DONE = b"data: [DONE]\n\n"


def event_of(document: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def usage_of(finishes: Sequence[Finish], choices: int) -> dict[str, Any]:
    """The counts of a request; a prompt counts once, however many answers it has."""
    prompts = finishes[::choices]
    prompt, completion = sum(f.prompt_tokens for f in prompts), sum(f.completion_tokens for f in finishes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(f.cached_tokens for f in prompts)},
    }


class Shape(ABC):
    """How the answers to one request are written. usage: whether a stream ends with the counts."""

    kind: str
    chunk: str

    def __init__(self, name: str, model: str, created: int, prompts: Prompts, logprobs: bool, usage: bool) -> None:
        self.id, self.model, self.created, self.prompts = name, model, created, prompts
        self.logprobs, self.usage = logprobs, usage

    def document(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        """One whole object."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def whole(self, answers: Sequence[Answer], choices: int) -> dict[str, Any]:
        """The answer to a request without a stream."""
        finishes = [answer.finish for answer in answers if answer.finish is not None]
        made = [self.choice(index, answer) for index, answer in enumerate(answers)]
        return self.document(self.kind, made, usage_of(finishes, choices))

    def event(self, choice: dict[str, Any]) -> bytes:
        """One event of a stream."""
        document = self.document(self.chunk, [choice], None)
        if not self.usage:
            del document["usage"]
        return event_of(document)

    def counts(self, finishes: Sequence[Finish], choices: int) -> bytes:
        """The last event, where the request wants the counts."""
        return event_of(self.document(self.chunk, [], usage_of(finishes, choices)))

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One whole answer."""

    @abstractmethod
    def begin(self, index: int) -> bytes:
        """What a stream has before an answer's first token."""

    @abstractmethod
    def token(self, index: int, token: Token) -> bytes:
        """A token in a stream; nothing where there is nothing to tell."""

    @abstractmethod
    def end(self, index: int, finish: Finish) -> bytes:
        """The end of an answer in a stream."""


@final
class CompletionShape(Shape):
    """``/v1/completions``. echoes: the text of each choice's prompt, where it is wanted back."""

    kind = chunk = "text_completion"

    def __init__(self, *common: Any, echoes: Sequence[str] | None) -> None:
        super().__init__(*common)
        self.echoes = echoes
        self._offsets: dict[int, int] = {}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offset, offsets = self._offsets.get(index, 0), []
        for token in tokens:
            offsets.append(offset)
            offset += len(self.prompts.token(token.id))
        self._offsets[index] = offset
        return {
            "tokens": [self.prompts.token(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.prompts.token(i): value for i, value in reversed(t.top)} or None for t in tokens],
            "text_offset": offsets,
        }

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finish is not None
        text = (self.echoes[index] if self.echoes else "") + answer.text
        return self._choice(index, text, self._logprobs(index, answer.tokens), answer.finish.reason)

    def begin(self, index: int) -> bytes:
        return self.event(self._choice(index, self.echoes[index], None, None)) if self.echoes else b""

    def token(self, index: int, token: Token) -> bytes:
        if not token.text and not self.logprobs:
            return b""
        return self.event(self._choice(index, token.text, self._logprobs(index, [token]), None))

    def end(self, index: int, finish: Finish) -> bytes:
        return self.event(self._choice(index, finish.text, None, finish.reason))


@final
class ChatShape(Shape):
    """``/v1/chat/completions``."""

    kind, chunk = "chat.completion", "chat.completion.chunk"

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        return {
            "content": [
                {**self._one(t.id, t.logprob), "top_logprobs": [self._one(i, value) for i, value in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }

    def _one(self, number: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.prompts.token(number), "logprob": logprob, "bytes": self.prompts.bytes_of(number)}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finish is not None
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(answer.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish.reason}

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        return self.event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def begin(self, index: int) -> bytes:
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def token(self, index: int, token: Token) -> bytes:
        if not token.text and not self.logprobs:
            return b""
        return self._delta(index, {"content": token.text}, self._logprobs([token]), None)

    def end(self, index: int, finish: Finish) -> bytes:
        delta = {"content": finish.text} if finish.text else {}
        return self._delta(index, delta, None, finish.reason)
