"""Feedback as requests say it and answers show it."""

from __future__ import annotations

from typing import Any, Literal, final

from pydantic import Field

from ...fleet.store.documents import Document
from ..learning.feedback import FeedbackRules, Lesson, Said
from .bodies import Body

__all__ = ["FeedbackBody", "RulesBody", "event_object", "feedback_object", "lesson_object", "rules_object"]

DAY = 86_400.0
UP = {"up": True, "down": False}


@final
class FeedbackBody(Body):
    """``POST /v1/feedback``: of an answer, one of the three."""

    answer: str = Field(min_length=1, max_length=200, description="The feedback_id of an answer.")
    rating: Literal["up", "down"] | None = None
    correction: str | None = Field(None, description="What the right answer is.")
    better_than: str | None = Field(
        None, min_length=1, max_length=200, description="The feedback_id of a worse answer to the same messages."
    )

    @property
    def said(self) -> Said:
        """As it is kept."""
        rating = None if self.rating is None else UP[self.rating]
        return Said(answer=self.answer, rating=rating, correction=self.correction, better_than=self.better_than)


@final
class RulesBody(Body):
    """``PUT /manage/NAMESPACE/feedback``."""

    enabled: bool
    keep_seconds: float | int = Field(7 * DAY, ge=1, le=90 * DAY, description="How long answers are kept.")
    pause_seconds: float | int = Field(
        30.0, ge=0, le=DAY, description="How long learning waits after a user's last piece of feedback."
    )
    model: str | None = Field(
        None,
        min_length=1,
        max_length=400,
        description="What personal models stand on: the base (null), or a shared adapter.",
    )
    scope: Literal["near", "all"] = Field(
        "near",
        description="What a personal model answers: what is near the questions that its user gave feedback on, or all.",
    )


def rules_object(rules: FeedbackRules, base: str, answers: tuple[int, int]) -> dict[str, Any]:
    """A namespace's rules. answers: how many are kept, and their bytes."""
    return {
        "enabled": rules.enabled,
        "keep_seconds": rules.keep_seconds,
        "pause_seconds": rules.pause_seconds,
        "model": base if rules.model is None else rules.model,
        "scope": rules.scope,
        "answers": answers[0],
        "answer_bytes": answers[1],
    }


def feedback_object(one: Document) -> dict[str, Any]:
    """A piece of feedback, without texts."""
    told = one.data
    rating = None if told["rating"] is None else "up" if told["rating"] else "down"
    return {
        "id": one.name,
        "object": "feedback",
        "created_at": int(one.created),
        "answer": told["answer"],
        "kind": told["kind"],
        "rating": rating,
        "better_than": told["better_than"],
        "model": told["model"],
        "version": told["version"],
    }


def lesson_object(one: Document, lesson: Lesson) -> dict[str, Any]:
    """The same with its texts."""
    texts = {"messages": lesson.messages, "tools": lesson.tools, "content": lesson.answer, "better": lesson.better}
    return {**feedback_object(one), **texts}


def event_object(one: Document) -> dict[str, Any]:
    """What became of feedback."""
    told = {key: one.data[key] for key in ("type", "message", "data")}
    return {"id": one.name, "object": "feedback.event", "created_at": int(one.created), **told}
