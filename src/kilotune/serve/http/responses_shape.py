"""Answers in the shape of ``/v1/responses``: one object, or the events in which it grows."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

from ..engine.interface import Finish, Token
from .answers import Answer
from .http_errors import ApiError
from .json_pieces import EVENT, WHOLE, Later, pieces_of
from .prompts import Prompts
from .response_shapes import Scores, Writer
from .responses_body import ResponseBody
from .tool_reader import Piece, ToolReader

__all__ = ["ResponseShape"]


@final
class ResponseShape(Writer):
    """The answer to one request: a message with one text, and calls of tools.

    ::

        response.created, response.in_progress
          response.output_item.added, response.content_part.added
            response.output_text.delta, ...
          response.output_text.done, response.content_part.done, response.output_item.done
          response.output_item.added
            response.function_call_arguments.delta, ...
          response.function_call_arguments.done, response.output_item.done
        response.completed, or .incomplete where the answer was cut off, or .failed

    A whole answer is what its events come to. new_reader: makes what reads the calls of tools.
    """

    def __init__(
        self, body: ResponseBody, prompts: Prompts, new_reader: Callable[[], ToolReader | None] | None = None
    ) -> None:
        self.body, self.prompts = body, prompts
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._reader = None if new_reader is None else new_reader()
        self._count = 0
        self._output: list[dict[str, Any]] = []  # the last one may be still open
        self._open = False
        self._told = True  # whether there are events
        self._tokens: list[Token] = []  # of the last message, where their log-probabilities are told

    # -- the object ----------------------------------------------------------------------------------

    def whole(self, answers: Sequence[Answer], choices: int) -> Iterator[bytes]:
        (answer,) = answers
        assert answer.finish is not None
        self._told = False
        for token in answer.tokens:
            yield self.token(0, token)
        yield from self.end(0, answer.finish)
        yield from pieces_of(self._ended(answer.finish), WHOLE)

    def _ended(self, finish: Finish) -> dict[str, Any]:
        cut = finish.reason == "length"
        usage = {
            "input_tokens": finish.prompt_tokens,
            "input_tokens_details": {"cached_tokens": finish.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": finish.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": finish.prompt_tokens + finish.completion_tokens,
        }
        return self._document(
            _status(finish),
            output=self._output,
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(time.time()),
            usage=usage,
        )

    def _document(self, status: str, **more: Any) -> dict[str, Any]:
        body, choice = self.body, self.body.tool_choice or "auto"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.format.to_dict()},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **more,
        }

    def _logprobs(self, tokens: Sequence[Token]) -> Later:
        """Of tokens that may become more until it is written."""
        return Later(tokens, self._likeliest, 8 * ((self.body.logprobs or 0) + 1))

    def _likeliest(self, token: Token) -> dict[str, Any]:
        likely = [self._likely(number, value) for number, value in token.top]
        return {**self._likely(token.id, token.logprob), "top_logprobs": likely}

    def _likely(self, number: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.prompts.token(number), "logprob": logprob, "bytes": self.prompts.bytes_of(number) or []}

    # -- the events ----------------------------------------------------------------------------------

    def _event(self, kind: str, **told: Any) -> Iterator[bytes]:
        if not self._told:
            return
        document = {"type": f"response.{kind}", "sequence_number": self._count, **told}
        self._count += 1
        begun = f"event: response.{kind}\ndata: "
        if kind.endswith(".delta"):  # of little
            yield f"{begun}{EVENT.encode(document)}\n\n".encode()
            return
        yield begun.encode()
        yield from pieces_of(document, EVENT)
        yield b"\n\n"

    def _of_item(self, kind: str, **told: Any) -> Iterator[bytes]:
        """Of the last item; of its text where it is a message."""
        item = self._output[-1]
        part = {"content_index": 0} if item["type"] == "message" else {}
        return self._event(kind, item_id=item["id"], output_index=len(self._output) - 1, **part, **told)

    def begin(self, index: int, scores: Scores | None) -> Iterator[bytes]:
        begun = self._document("in_progress")
        yield from self._event("created", response=begun)
        yield from self._event("in_progress", response=begun)
        if self._reader is None:
            yield from self._begin_message()

    def token(self, index: int, token: Token) -> bytes:
        if self._reader is None:
            return b"".join(self._content(token.text, [token]))
        return b"".join(self._read(self._reader.read(token.text)))

    def _read(self, pieces: Iterable[Piece]) -> Iterator[bytes]:
        for piece in pieces:
            if piece.call is None:
                yield from self._content(piece.content, [])
                continue
            if piece.id:
                yield from self._begin_call(piece)
            if piece.arguments:
                self._output[-1]["arguments"] += piece.arguments
                yield from self._of_item("function_call_arguments.delta", delta=piece.arguments)

    def _begin_call(self, piece: Piece) -> Iterator[bytes]:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
        return self._begin({**item, "call_id": piece.id, "name": piece.name, "arguments": ""})

    def _begin_message(self) -> Iterator[bytes]:
        item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress"}
        yield from self._begin({**item, "content": []})
        self._tokens = []
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": self._logprobs(self._tokens)}
        self._output[-1]["content"] = [part]
        yield from self._of_item("content_part.added", part=part)

    def _begin(self, item: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close("completed")
        self._output.append(item)
        self._open = True
        yield from self._event("output_item.added", output_index=len(self._output) - 1, item=item)

    def _content(self, text: str, tokens: Sequence[Token]) -> Iterator[bytes]:
        if not self._open or self._output[-1]["type"] != "message":
            yield from self._begin_message()
        told = [] if self.body.logprobs is None else tokens
        self._output[-1]["content"][0]["text"] += text
        self._tokens += told
        if text or told:
            yield from self._of_item("output_text.delta", delta=text, logprobs=self._logprobs(told))

    def _close(self, status: str) -> Iterator[bytes]:
        """The end of the item that is open."""
        if not self._open:
            return
        item, self._open = self._output[-1], False
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            yield from self._of_item("output_text.done", text=part["text"], logprobs=part["logprobs"])
            yield from self._of_item("content_part.done", part=part)
        else:
            yield from self._of_item("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield from self._event("output_item.done", output_index=len(self._output) - 1, item=item)

    def end(self, index: int, finish: Finish) -> Iterator[bytes]:
        if self._reader is None:
            yield from self._content(finish.text, [])
        else:
            yield from self._read([*self._reader.read(finish.text), *self._reader.end()])
            if not self._output:
                yield from self._begin_message()
            elif self._output[-1]["type"] == "function_call":  # whole or not, whatever ended the answer
                yield from self._close("incomplete" if self._reader.open else "completed")
        yield from self._close(_status(finish))

    def last(self, finishes: Sequence[Finish], choices: int) -> Iterator[bytes]:
        return self._event(_status(finishes[0]), response=self._ended(finishes[0]))

    def failed(self, error: ApiError) -> Iterator[bytes]:
        for item in self._output[-1:] if self._open else ():
            item["status"] = "incomplete"
        told = {"code": "server_error", "message": error.message}
        return self._event("failed", response=self._document("failed", error=told, output=self._output))


def _status(finish: Finish) -> str:
    """One that the tokens were not enough for is incomplete."""
    return "incomplete" if finish.reason == "length" else "completed"
