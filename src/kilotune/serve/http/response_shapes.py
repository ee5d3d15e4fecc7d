"""Answers in OpenAI's two shapes, whole and as a stream's events."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

from ..engine.interface import Finish, Scored, Token
from .answers import Answer
from .http_errors import ApiError
from .prompts import Prompts
from .tool_reader import ToolReader, called, delta_of

__all__ = ["ChatShape", "CompletionShape", "Echo", "Scores", "Shape", "Writer", "event_of", "usage_of"]

Scores = Sequence[Scored | None]

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


class Writer(ABC):
    """How the answers to one request are written, whole and as a stream's events."""

    @abstractmethod
    def whole(self, answers: Sequence[Answer], choices: int) -> dict[str, Any]:
        """The answer to a request without a stream."""

    @abstractmethod
    def begin(self, index: int, scores: Scores | None) -> bytes:
        """What a stream has before an answer's first token. scores: of the prompt's, where they are asked for."""

    @abstractmethod
    def token(self, index: int, token: Token) -> bytes:
        """A token in a stream; nothing where there is nothing to tell."""

    @abstractmethod
    def end(self, index: int, finish: Finish) -> bytes:
        """The end of an answer in a stream."""

    @abstractmethod
    def last(self, finishes: Sequence[Finish], choices: int) -> bytes:
        """The end of a stream."""

    @abstractmethod
    def failed(self, error: ApiError) -> bytes:
        """The end of a stream in place of what was to come."""


class Shape(Writer):
    """OpenAI's two shapes with choices. usage: whether a stream ends with the counts.

    logprobs: how many likeliest tokens are told with each token; None: no log-probabilities. prompt_logprobs: the same
    of the prompt's.
    """

    kind: str
    chunk: str

    def __init__(
        self,
        name: str,
        model: str,
        created: int,
        prompts: Prompts,
        usage: bool,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> None:
        self.id, self.model, self.created, self.prompts = name, model, created, prompts
        self.logprobs, self.usage, self.prompt_logprobs = logprobs, usage, prompt_logprobs

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
        finishes = [answer.finish for answer in answers if answer.finish is not None]
        made = [self.choice(index, answer) for index, answer in enumerate(answers)]
        return self.document(self.kind, made, usage_of(finishes, choices))

    def event(self, choice: dict[str, Any]) -> bytes:
        """One event of a stream."""
        document = self.document(self.chunk, [choice], None)
        if not self.usage:
            del document["usage"]
        return event_of(document)

    def last(self, finishes: Sequence[Finish], choices: int) -> bytes:
        counts = event_of(self.document(self.chunk, [], usage_of(finishes, choices))) if self.usage else b""
        return counts + DONE

    def failed(self, error: ApiError) -> bytes:
        return event_of(error.document()) + DONE

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One whole answer."""

    def scored(self, scores: Scores | None) -> dict[str, Any]:
        """``prompt_logprobs``, as vLLM has them, where they were asked for."""
        if (most := self.prompt_logprobs) is None or scores is None:
            return {}
        return {"prompt_logprobs": [None if one is None else self._likely(one, most) for one in scores]}

    def _likely(self, one: Scored, most: int) -> dict[str, Any]:
        ranked = {one.id: (one.logprob, one.rank)}
        ranked |= {token: (value, place) for place, (token, value) in enumerate(one.top[:most], 1) if token != one.id}
        return {
            str(token): {"logprob": value, "rank": rank, "decoded_token": self.prompts.token(token)}
            for token, (value, rank) in ranked.items()
        }


@final
class Echo(NamedTuple):
    """A prompt that comes back. offsets: where each of its tokens begins in the text; needed for log-probabilities."""

    text: str
    ids: Sequence[int]
    offsets: Sequence[int]


@final
class CompletionShape(Shape):
    """``/v1/completions``. echoes: each choice's prompt, where it is wanted back."""

    kind = chunk = "text_completion"

    def __init__(self, *common: Any, echoes: Sequence[Echo] | None) -> None:
        super().__init__(*common)
        self.echoes = echoes
        self._offsets: dict[int, int] = {}

    def _logprobs(self, index: int, tokens: Sequence[Token], scores: Scores | None = None) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self.echoes and scores is not None:
            echo, most = self.echoes[index], self.logprobs
            for token, place, one in zip(echo.ids, echo.offsets, scores, strict=True):
                value, top = (None, ()) if one is None else (one.logprob, one.top[:most])
                self._tell(found, token, place, value, top)
            self._offsets[index] = len(echo.text)
        offset = self._offsets.get(index, 0)
        for made in tokens:
            self._tell(found, made.id, offset, made.logprob, made.top)
            offset += len(self.prompts.token(made.id))
        self._offsets[index] = offset
        return found

    def _tell(
        self, found: dict[str, Any], token: int, offset: int, logprob: float | None, top: Sequence[tuple[int, float]]
    ) -> None:
        """Add one token; the likeliest have it with them, as it may be none of these."""
        text = self.prompts.token(token)
        likely = {self.prompts.token(number): value for number, value in reversed(top)}
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(None if logprob is None else {text: logprob, **likely})
        found["text_offset"].append(offset)

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finish is not None
        text = (self.echoes[index].text if self.echoes else "") + answer.text
        made = self._choice(index, text, self._logprobs(index, answer.tokens, answer.scores), answer.finish.reason)
        return {**made, **self.scored(answer.scores)}

    def begin(self, index: int, scores: Scores | None) -> bytes:
        if not self.echoes:
            return b""
        return self.event(self._choice(index, self.echoes[index].text, self._logprobs(index, [], scores), None))

    def token(self, index: int, token: Token) -> bytes:
        if not token.text and self.logprobs is None:
            return b""
        return self.event(self._choice(index, token.text, self._logprobs(index, [token]), None))

    def end(self, index: int, finish: Finish) -> bytes:
        return self.event(self._choice(index, finish.text, None, finish.reason))


@final
class ChatShape(Shape):
    """``/v1/chat/completions``. reader: makes what reads the calls of tools in an answer."""

    kind, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, *common: Any, reader: Callable[[], ToolReader | None] | None = None) -> None:
        super().__init__(*common)
        self._new_reader = reader
        self._readers: dict[int, ToolReader | None] = {}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
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

    def whole(self, answers: Sequence[Answer], choices: int) -> dict[str, Any]:
        return {**super().whole(answers, choices), **self.scored(answers[0].scores)}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finish is not None
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        reason: str = answer.finish.reason
        if (reader := self._reader(index)) is not None:
            pieces = [*reader.read(answer.text), *reader.end()]
            message["content"] = "".join(piece.content for piece in pieces)
            if calls := called(pieces):
                message |= {"content": message["content"] or None, "tool_calls": calls}
            reason = reader.reason(reason)
        logprobs = self._logprobs(answer.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _reader(self, index: int) -> ToolReader | None:
        """What reads the calls of one answer."""
        if index not in self._readers:
            self._readers[index] = None if self._new_reader is None else self._new_reader()
        return self._readers[index]

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        return self.event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def begin(self, index: int, scores: Scores | None) -> bytes:
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def token(self, index: int, token: Token) -> bytes:
        deltas = [{"content": token.text}] if token.text or self.logprobs is not None else []
        if (reader := self._reader(index)) is not None:
            deltas = [delta_of(piece) for piece in reader.read(token.text)]
            if not deltas and self.logprobs is not None:
                deltas = [{"content": ""}]
        logprobs = self._logprobs([token])
        return b"".join(
            self._delta(index, delta, logprobs if place == 0 else None, None) for place, delta in enumerate(deltas)
        )

    def end(self, index: int, finish: Finish) -> bytes:
        if (reader := self._reader(index)) is None:
            return self._delta(index, {"content": finish.text} if finish.text else {}, None, finish.reason)
        pieces = [*reader.read(finish.text), *reader.end()]
        told = b"".join(self._delta(index, delta_of(piece), None, None) for piece in pieces)
        return told + self._delta(index, {}, None, reader.reason(finish.reason))
