"""What all bodies of requests have in common: nothing unknown in them, and null asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from .options import Option, check_kind, drop_neutral

__all__ = ["Body"]

MAX_OPTIONS = 100


def _taken(schema: dict[str, Any], body: type[Body]) -> None:
    """In the API's document: options that ask for nothing, and null for any other name."""
    taken = {name: option.schema for name, option in body.neutral.items() if name not in body.model_fields}
    schema["properties"] |= {name: {"anyOf": [kind, {"type": "null"}]} for name, kind in taken.items()}
    schema["additionalProperties"] = {"type": "null"}


class Body(BaseModel):
    """A request's body: nothing unknown in it, and no value bent into another type. What is null asks for nothing.

    neutral: options that are not served, and taken where they ask for nothing. kinds: what its ``type`` may say, where
    OpenAI's or vLLM's API has more of them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_taken)
    neutral: ClassVar[Mapping[str, Option]] = {}
    kinds: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _asks(cls, given: Any) -> Any:
        """What the body asks for; one error for a flood of unknown options, not one for each."""
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_OPTIONS:
            raise ValueError(f"an object with {len(given)} options; there are fewer than {MAX_OPTIONS}")
        if cls.kinds:
            check_kind(given.get("type"), cls.kinds)
        own = {field.alias or name: field for name, field in cls.model_fields.items()}
        asked = {
            name: value
            for name, value in given.items()
            if value is not None or (name in own and own[name].is_required())
        }
        return drop_neutral(asked, cls.neutral, own)
