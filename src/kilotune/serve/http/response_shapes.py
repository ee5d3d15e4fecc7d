"""Answers in OpenAI's two shapes, whole and as a stream's events."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

from ..engine.interface import Finish, Scored, Token
from .answers import Answer
from .http_errors import ApiError
from .json_pieces import EVENT, VALUES, WHOLE, Later, pieces_of
from .prompts import Prompts
from .tool_reader import ToolReader, called, delta_of

__all__ = ["ChatShape", "CompletionShape", "Echo", "Scores", "Shape", "Writer", "usage_of"]

Scores = Sequence[Scored | None]

DONE = b"data: [DONE]\n\n"


def _event_of(document: dict[str, Any]) -> Iterator[bytes]:
    """One event of a stream, in pieces."""
    yield b"data: "
    yield from pieces_of(document, EVENT)
    yield b"\n\n"


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
    """How the answers to one request are written, whole and as a stream's events.

    What may be large comes in pieces, each of which is made when it is asked for, and all of them are to be.
    """

    @abstractmethod
    def whole(self, answers: Sequence[Answer], choices: int) -> Iterator[bytes]:
        """The answer to a request without a stream."""

    @abstractmethod
    def begin(self, index: int, scores: Scores | None) -> Iterator[bytes]:
        """What a stream has before an answer's first token. scores: of the prompt's, where they are asked for."""

    @abstractmethod
    def token(self, index: int, token: Token) -> bytes:
        """A token in a stream; nothing where there is nothing to tell."""

    @abstractmethod
    def end(self, index: int, finish: Finish) -> Iterator[bytes]:
        """The end of an answer in a stream."""

    @abstractmethod
    def last(self, finishes: Sequence[Finish], choices: int) -> Iterator[bytes]:
        """The end of a stream."""

    @abstractmethod
    def failed(self, error: ApiError) -> Iterator[bytes]:
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

    def document(
        self, kind: str, choices: list[dict[str, Any]] | Later, usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        """One whole object."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def whole(self, answers: Sequence[Answer], choices: int) -> Iterator[bytes]:
        finishes = [answer.finish for answer in answers if answer.finish is not None]
        made = Later(enumerate(answers), lambda one: self.choice(*one), VALUES)
        document = self.document(self.kind, made, usage_of(finishes, choices))
        return pieces_of({**document, **self.beside(answers)}, WHOLE)

    def beside(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a whole answer has beside its choices."""
        return {}

    def event(self, choice: dict[str, Any]) -> Iterator[bytes]:
        """One event of a stream."""
        return _event_of(self._chunk_of(choice))

    def small(self, choice: dict[str, Any]) -> bytes:
        """One event that is of little, as that of a token is."""
        return b"data: " + EVENT.encode(self._chunk_of(choice)).encode() + b"\n\n"

    def _chunk_of(self, choice: dict[str, Any]) -> dict[str, Any]:
        document = self.document(self.chunk, [choice], None)
        if not self.usage:
            del document["usage"]
        return document

    def last(self, finishes: Sequence[Finish], choices: int) -> Iterator[bytes]:
        if self.usage:
            yield from _event_of(self.document(self.chunk, [], usage_of(finishes, choices)))
        yield DONE

    def failed(self, error: ApiError) -> Iterator[bytes]:
        yield from _event_of(error.document())
        yield DONE

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One whole answer."""

    def scored(self, scores: Scores | None) -> dict[str, Any]:
        """``prompt_logprobs``, as vLLM has them, where they were asked for."""
        if (most := self.prompt_logprobs) is None or scores is None:
            return {}
        return {"prompt_logprobs": Later(scores, lambda one: self._likely(one, most), 4 * (most + 1))}

    def _likely(self, one: Scored | None, most: int) -> dict[str, Any] | None:
        if one is None:
            return None
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
        echo, before = Echo("", (), ()), self._offsets.get(index, 0)
        given: Scores = ()
        if self.echoes and scores is not None:
            echo, given = self.echoes[index], scores
            before = len(echo.text)
        lengths = (len(self.prompts.token(token.id)) for token in tokens)
        *offsets, self._offsets[index] = itertools.accumulate(lengths, initial=before)
        ids = itertools.chain(echo.ids, (token.id for token in tokens))
        return {
            "tokens": Later(ids, self.prompts.token),
            "token_logprobs": Later(itertools.chain(given, tokens), lambda one: None if one is None else one.logprob),
            "top_logprobs": Later(itertools.chain(given, tokens), self._likeliest, 2 + self.logprobs),
            "text_offset": [*echo.offsets, *offsets],
        }

    def _likeliest(self, one: Scored | Token | None) -> dict[str, float] | None:
        """Around a token; they have it with them, as it may be none of these."""
        if one is None or one.logprob is None:
            return None
        likely = {self.prompts.token(number): value for number, value in reversed(one.top[: self.logprobs])}
        return {self.prompts.token(one.id): one.logprob, **likely}

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finish is not None
        text = (self.echoes[index].text if self.echoes else "") + answer.text
        made = self._choice(index, text, self._logprobs(index, answer.tokens, answer.scores), answer.finish.reason)
        return {**made, **self.scored(answer.scores)}

    def begin(self, index: int, scores: Scores | None) -> Iterator[bytes]:
        if not self.echoes:
            return iter(())
        return self.event(self._choice(index, self.echoes[index].text, self._logprobs(index, [], scores), None))

    def token(self, index: int, token: Token) -> bytes:
        if not token.text and self.logprobs is None:
            return b""
        return self.small(self._choice(index, token.text, self._logprobs(index, [token]), None))

    def end(self, index: int, finish: Finish) -> Iterator[bytes]:
        return self.event(self._choice(index, finish.text, None, finish.reason))


@final
class ChatShape(Shape):
    """``/v1/chat/completions``. reader: makes what reads the calls of tools in an answer. kept: ids under which answers
    are kept for feedback, by their index, once they are."""

    kind, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        *common: Any,
        reader: Callable[[], ToolReader | None] | None = None,
        kept: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(*common)
        self._new_reader, self._kept = reader, {} if kept is None else kept
        self._readers: dict[int, ToolReader | None] = {}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {"content": Later(tokens, self._likeliest, 8 * (self.logprobs + 1)), "refusal": None}

    def _likeliest(self, token: Token) -> dict[str, Any]:
        own = self._one(token.id, token.logprob)
        return {**own, "top_logprobs": [self._one(number, value) for number, value in token.top]}

    def _one(self, number: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.prompts.token(number), "logprob": logprob, "bytes": self.prompts.bytes_of(number)}

    def beside(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return self.scored(answers[0].scores)

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
        made = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return {**made, **self._id(index)}

    def _id(self, index: int) -> dict[str, str]:
        return {"feedback_id": self._kept[index]} if index in self._kept else {}

    def _reader(self, index: int) -> ToolReader | None:
        """What reads the calls of one answer."""
        if index not in self._readers:
            self._readers[index] = None if self._new_reader is None else self._new_reader()
        return self._readers[index]

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        made = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.small(made if reason is None else {**made, **self._id(index)})

    def begin(self, index: int, scores: Scores | None) -> Iterator[bytes]:
        yield self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def token(self, index: int, token: Token) -> bytes:
        deltas = [{"content": token.text}] if token.text or self.logprobs is not None else []
        if (reader := self._reader(index)) is not None:
            deltas = [delta_of(piece) for piece in reader.read(token.text)]
            if not deltas and self.logprobs is not None:
                deltas = [{"content": ""}]
        logprobs = self._logprobs([token])
        return b"".join(self._delta(index, one, None if at else logprobs, None) for at, one in enumerate(deltas))

    def end(self, index: int, finish: Finish) -> Iterator[bytes]:
        if (reader := self._reader(index)) is None:
            yield self._delta(index, {"content": finish.text} if finish.text else {}, None, finish.reason)
            return
        pieces = [*reader.read(finish.text), *reader.end()]
        for piece in pieces:
            yield self._delta(index, delta_of(piece), None, None)
        yield self._delta(index, {}, None, reader.reason(finish.reason))
