"""What a request says of its answer's form: ``response_format``, ``structured_outputs``, and vLLM's older names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ..engine.interface import Grammar
from .bodies import Body
from .json_values import written
from .options import STRUCTURED, Option, Told

__all__ = ["FormBody", "ResponseFormat", "Schema", "schema_text"]

Schema = Annotated[dict[str, Any] | bool, Field(description="A JSON schema."), AfterValidator(written)]
SchemaText = Annotated[
    dict[str, Any] | bool | str, Field(description="A JSON schema, or its text."), AfterValidator(written)
]
Written = Annotated[str, Field(min_length=1, max_length=2**18)]
Choices = Annotated[list[Annotated[str, Field(max_length=2**16)]], Field(min_length=1, max_length=10_000)]


def schema_text(schema: dict[str, Any] | bool | str) -> str:
    """A JSON schema as text."""
    return schema if isinstance(schema, str) else json.dumps(schema)


@final
class JsonSchema(Body):
    """strict false: keywords that answers cannot be held to are passed over; else they are refused."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: Schema = Field(alias="schema")
    description: Told | None = None
    strict: bool | None = None


@final
class ResponseFormat(Body):
    """OpenAI's: any text, any JSON object, or JSON that fits a schema."""

    kinds = ("text", "json_object", "json_schema")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _one(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            told = "is missing" if self.json_schema is None else "only with type: json_schema"
            raise PydanticCustomError("lacking", told, {"option": "json_schema"})
        return self

    def grammars(self) -> Iterator[Grammar]:
        """What it asks for."""
        if self.type == "json_object":
            yield Grammar(kind="json", text='{"type": "object"}', place="response_format")
        if self.json_schema is not None:
            yield Grammar(
                kind="json",
                text=schema_text(self.json_schema.schema_),
                place="response_format.json_schema.schema",
                lenient=self.json_schema.strict is False,
            )


@final
class StructuredOutputs(Body):
    """vLLM's: one of these."""

    neutral: ClassVar[Mapping[str, Option]] = STRUCTURED
    json_: SchemaText | None = Field(None, alias="json")
    regex: Written | None = Field(None, description="For the whole answer; of Rust's kind, without look-arounds.")
    choice: Choices | None = None
    grammar: Written | None = Field(None, description="Lark's form, or llama.cpp's (GBNF).")
    json_object: bool | None = None


class FormBody(Body):
    """The options of all requests for text that say what form it has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaText | None = None
    guided_regex: Written | None = None
    guided_choice: Choices | None = None
    guided_grammar: Written | None = None

    @property
    def grammar(self) -> Grammar | None:
        """What the answer has to fit; None: any text will do."""
        return next(self._grammars(), None)

    @model_validator(mode="after")
    def _one_form(self) -> FormBody:
        asked = [grammar.place.partition(".")[::2] for grammar in self._grammars()]
        if len(asked) > 1:
            (first, own), (name, more) = asked[:2]
            told = f"not together with {first}" if name != first else f"not {own} together with {more}"
            raise ValueError(f"{name}: {told}; an answer has one form")
        return self

    def _grammars(self) -> Iterator[Grammar]:
        if self.response_format is not None:
            yield from self.response_format.grammars()
        if (more := self.structured_outputs) is not None:
            if more.json_object:
                yield Grammar(kind="json", text='{"type": "object"}', place="structured_outputs.json_object")
            yield from _written(more.json_, more.regex, more.choice, more.grammar, "structured_outputs.")
        yield from _written(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, "guided_")


def _written(
    schema: dict[str, Any] | bool | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    place: str,
) -> Iterator[Grammar]:
    if schema is not None:
        yield Grammar(kind="json", text=schema_text(schema), place=f"{place}json")
    if regex is not None:
        yield Grammar(kind="regex", text=regex, place=f"{place}regex")
    if choice is not None:
        yield Grammar(kind="choice", text=json.dumps(choice), place=f"{place}choice")
    if grammar is not None:
        yield Grammar(kind="grammar", text=grammar, place=f"{place}grammar")
