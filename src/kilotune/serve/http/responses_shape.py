"""Answers in the shape of ``/v1/responses``: one object, or the events in which it grows."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, final

from ..engine.interface import Finish, Token
from .answers import Answer
from .http_errors import ApiError
from .prompts import Prompts
from .response_shapes import Scores, Writer
from .responses_body import ResponseBody

__all__ = ["ResponseShape"]


@final
class ResponseShape(Writer):
    """The answer to one request: a message with one text.

    ::

        response.created, response.in_progress
          response.output_item.added, response.content_part.added
            response.output_text.delta, ...
          response.output_text.done, response.content_part.done, response.output_item.done
        response.completed, or .incomplete where the answer was cut off, or .failed
    """

    def __init__(self, body: ResponseBody, prompts: Prompts) -> None:
        self.body, self.prompts = body, prompts
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._count = 0
        self._text = ""
        self._tokens: list[Token] = []

    # -- the object ----------------------------------------------------------------------------------

    def whole(self, answers: Sequence[Answer], choices: int) -> dict[str, Any]:
        (answer,) = answers
        assert answer.finish is not None
        return self._ended(answer.finish, answer.text, answer.tokens)

    def _ended(self, finish: Finish, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
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
            output=[self._message(_status(finish), [self._part(text, tokens)])],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(time.time()),
            usage=usage,
        )

    def _document(self, status: str, **more: Any) -> dict[str, Any]:
        body = self.body
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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.format.to_dict()},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **more,
        }

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(tokens)}

    def _logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        if self.body.logprobs is None:
            return []
        return [
            {
                **self._likely(token.id, token.logprob),
                "top_logprobs": [self._likely(i, value) for i, value in token.top],
            }
            for token in tokens
        ]

    def _likely(self, number: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.prompts.token(number), "logprob": logprob, "bytes": self.prompts.bytes_of(number) or []}

    # -- the events ----------------------------------------------------------------------------------

    def _event(self, kind: str, **told: Any) -> bytes:
        document = {"type": f"response.{kind}", "sequence_number": self._count, **told}
        self._count += 1
        data = json.dumps(document, separators=(",", ":"))
        return f"event: response.{kind}\ndata: {data}\n\n".encode()

    def _of_part(self, kind: str, **told: Any) -> bytes:
        return self._event(kind, item_id=self.item, output_index=0, content_index=0, **told)

    def begin(self, index: int, scores: Scores | None) -> bytes:
        begun = self._document("in_progress")
        return (
            self._event("created", response=begun)
            + self._event("in_progress", response=begun)
            + self._event("output_item.added", output_index=0, item=self._message("in_progress", []))
            + self._of_part("content_part.added", part=self._part("", []))
        )

    def token(self, index: int, token: Token) -> bytes:
        self._tokens.append(token)
        return self._delta(token.text, [token])

    def _delta(self, text: str, tokens: Sequence[Token]) -> bytes:
        self._text += text
        logprobs = self._logprobs(tokens)
        return self._of_part("output_text.delta", delta=text, logprobs=logprobs) if text or logprobs else b""

    def end(self, index: int, finish: Finish) -> bytes:
        held = self._delta(finish.text, [])
        part = self._part(self._text, self._tokens)
        return (
            held
            + self._of_part("output_text.done", text=self._text, logprobs=part["logprobs"])
            + self._of_part("content_part.done", part=part)
            + self._event("output_item.done", output_index=0, item=self._message(_status(finish), [part]))
        )

    def last(self, finishes: Sequence[Finish], choices: int) -> bytes:
        return self._event(_status(finishes[0]), response=self._ended(finishes[0], self._text, self._tokens))

    def failed(self, error: ApiError) -> bytes:
        output = [self._message("incomplete", [self._part(self._text, self._tokens)])]
        told = {"code": "server_error", "message": error.message}
        return self._event("failed", response=self._document("failed", error=told, output=output))


def _status(finish: Finish) -> str:
    """One that the tokens were not enough for is incomplete."""
    return "incomplete" if finish.reason == "length" else "completed"
