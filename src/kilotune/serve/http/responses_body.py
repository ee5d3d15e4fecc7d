"""What ``/v1/responses`` takes: a text or a conversation in, a text out. Nothing is kept of an answer."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, final

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from ..engine.interface import Grammar
from .bodies import Body
from .json_values import json_fault
from .options import ITEM, PART, REASONING, RESPONSE, TEXT, Metadata, Told
from .schemas import MAX_LOGPROBS, SamplingBody, Text
from .structured import Schema, schema_text
from .tool_bodies import CallBody, CalledFunction, Name, ToolAsk, ToolsBody, check_arguments

__all__ = ["ResponseBody"]

CallId = Annotated[str, Field(min_length=1, max_length=200)]
LOGPROBS = "message.output_text.logprobs"
KEPT_NOTHING = "answers are not kept here"


@final
class ItemPart(Body):
    """A part of a message."""

    neutral = PART
    kinds = ("input_text", "output_text")
    type: Literal["input_text", "output_text"]
    text: Text


def _joined(content: str | list[ItemPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


@final
class Item(Body):
    """A message; an answer's, too, as it came."""

    neutral = ITEM
    kinds = ("message", "function_call", "function_call_output")
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Annotated[list[ItemPart], Field(min_length=1, fail_fast=True)]


@final
class CallItem(Body):
    """A call that the model made, as it came."""

    neutral = ITEM
    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: Annotated[str, Field(max_length=2**20)]

    @model_validator(mode="after")
    def _writable(self) -> CallItem:
        check_arguments(self.arguments)
        return self

    def told(self) -> dict[str, Any]:
        """As a chat template takes it."""
        function = CalledFunction(name=self.name, arguments=self.arguments)
        return CallBody(id=self.call_id, type="function", function=function).told()


@final
class OutputItem(Body):
    """What came of a call."""

    neutral = ITEM
    type: Literal["function_call_output"]
    call_id: CallId
    output: Text | Annotated[list[ItemPart], Field(min_length=1, fail_fast=True)]


def _kind(given: Any) -> str:
    """Which item it is; what is none of these is told of as a message."""
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return {"function_call": "Call", "function_call_output": "Output"}.get(str(kind), "Message")


Items = Annotated[
    Annotated[Item, Tag("Message")] | Annotated[CallItem, Tag("Call")] | Annotated[OutputItem, Tag("Output")],
    Discriminator(_kind),
]


@final
class ResponseTool(Body):
    """A function that may be called."""

    kinds = ("function",)
    type: Literal["function"]
    name: Name
    description: Told | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _of_an_object(self) -> ResponseTool:
        if (fault := json_fault(self.parameters)) is not None:
            raise PydanticCustomError("lacking", "{fault}", {"option": "parameters", "fault": fault})
        if (self.parameters or {}).get("type", "object") != "object":
            told = "type: expected 'object', for arguments have names"
            raise PydanticCustomError("lacking", told, {"option": "parameters"})
        return self

    def function(self) -> dict[str, Any]:
        """As chats have it."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


@final
class NamedTool(Body):
    """Which tool is to be called."""

    kinds = ("function",)
    type: Literal["function"]
    name: Name


@final
class TextFormat(Body):
    """Any text, any JSON object, or JSON that fits a schema.

    strict false: keywords that answers cannot be held to are passed over; else they are refused.
    """

    kinds = ("text", "json_object", "json_schema")
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    schema_: Schema | None = Field(None, alias="schema")
    description: Told | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TextFormat:
        own = {"name": self.name, "schema": self.schema_}
        for option, value in own.items():
            if (value is not None) != (self.type == "json_schema"):
                told = "is missing" if value is None else "only with type: json_schema"
                raise PydanticCustomError("lacking", told, {"option": option})
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the answer has to fit; None: any text will do."""
        if self.schema_ is not None:
            text, lenient = schema_text(self.schema_), self.strict is False
            return Grammar(kind="json", text=text, place="text.format.schema", lenient=lenient)
        if self.type == "json_object":
            return Grammar(kind="json", text='{"type": "object"}', place="text.format")
        return None

    def to_dict(self) -> dict[str, Any]:
        """As an answer has it."""
        return self.model_dump(by_alias=True, exclude_none=True)


@final
class TextOptions(Body):
    """Of the answer's text."""

    neutral = TEXT
    format: TextFormat | None = None


@final
class Reasoning(Body):
    """There is none."""

    neutral = REASONING


@final
class ResponseBody(SamplingBody):
    """``/v1/responses``. Not OpenAI's: what sampling has beyond temperature and top_p, and timeout."""

    neutral = RESPONSE
    input: Text | Annotated[list[Items], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    store: bool | None = Field(None, description="Only false: answers are not kept, also where nothing is said.")
    previous_response_id: str | None = Field(None, description="Only null: answers are not kept.")
    conversation: Any = Field(None, description="Only null: answers are not kept.")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(
        None, max_length=16, description="Log-probabilities of the answer; there is no reasoning to be included."
    )
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="With those that are included.")

    @model_validator(mode="after")
    def _served(self) -> ResponseBody:
        if self.previous_response_id is not None:
            raise ValueError(f"previous_response_id: {KEPT_NOTHING}; send the whole conversation as input")
        if self.conversation is not None:
            raise ValueError(f"conversation: {KEPT_NOTHING}; send the whole conversation as input")
        if self.store:
            raise ValueError(f"store: {KEPT_NOTHING}; leave it out, or send false")
        if self.asks_tools is not None and self.logprobs is not None:
            raise ValueError(f"include: {LOGPROBS} not together with tools")
        if self.ignore_eos and self.grammar is not None:
            raise ValueError("ignore_eos: not with a form that the answer has, for that says where it ends")
        if self.top_logprobs is not None and self.logprobs is None:
            raise ValueError(f"top_logprobs: only with include: {LOGPROBS}")
        return self

    @property
    def format(self) -> TextFormat:
        """How the answer is to be written."""
        if self.text is None or self.text.format is None:
            return TextFormat(type="text", schema=None)
        return self.text.format

    @property
    def grammar(self) -> Grammar | None:
        return self.format.grammar

    @property
    def logprobs(self) -> int | None:
        """How many likeliest tokens are told with each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None

    @property
    def asks_tools(self) -> ToolAsk | None:
        """What it says of tools; None: there are none."""
        wanted = self.tool_choice
        named = {"type": "function", "function": {"name": wanted.name}} if isinstance(wanted, NamedTool) else wanted
        try:
            asked = ToolsBody.model_validate(
                {
                    "tools": [tool.function() for tool in self.tools or ()],
                    "tool_choice": named,
                    "parallel_tool_calls": self.parallel_tool_calls,
                }
            ).asks_tools
        except ValidationError as error:  # of several options together: each tool was looked at by itself
            raise ValueError(error.errors()[0]["ctx"]["error"]) from None
        if asked is None:
            return None
        return dataclasses.replace(asked, places=tuple(place.replace(".function", "") for place in asked.places))

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As a chat template takes them: calls are those of the assistant's message before them."""
        told: list[dict[str, Any]] = []
        if self.instructions is not None:
            told.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*told, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, Item):
                told.append({"role": item.role, "content": _joined(item.content)})
            elif isinstance(item, OutputItem):
                told.append({"role": "tool", "content": _joined(item.output), "tool_call_id": item.call_id})
            else:
                if not told or told[-1]["role"] != "assistant":
                    told.append({"role": "assistant", "content": ""})
                told[-1].setdefault("tool_calls", []).append(item.told())
        return told
