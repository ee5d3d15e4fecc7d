"""Tools in requests, as OpenAI's API has them: what may be called, whether, and the calls that come back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from .bodies import Body
from .json_values import TOO_DEEP, json_fault
from .options import CALL, Option, Told

__all__ = ["CallBody", "CalledFunction", "FunctionBody", "Name", "ToolAsk", "ToolBody", "ToolsBody", "check_arguments"]

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]


@final
class FunctionBody(Body):
    """A function that may be called. parameters: a JSON schema of an object; strict: calls fit it in any case."""

    name: Name
    description: Told | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _of_an_object(self) -> FunctionBody:
        if (fault := json_fault(self.parameters)) is not None:
            raise PydanticCustomError("lacking", "{fault}", {"option": "parameters", "fault": fault})
        if (self.parameters or {}).get("type", "object") != "object":
            raise PydanticCustomError(
                "lacking", "type: expected 'object', for arguments have names", {"option": "parameters"}
            )
        return self


@final
class ToolBody(Body):
    """A tool."""

    kinds = ("function",)
    type: Literal["function"]
    function: FunctionBody

    def told(self) -> dict[str, Any]:
        """As a chat template takes it."""
        given = self.function
        more = {} if given.description is None else {"description": given.description}
        parameters = {"type": "object", "properties": {}} if given.parameters is None else given.parameters
        return {"type": "function", "function": {"name": given.name, **more, "parameters": parameters}}


@final
class NamedFunction(Body):
    """Which function."""

    name: Name


@final
class NamedTool(Body):
    """Which tool is to be called."""

    kinds = ("function",)
    type: Literal["function"]
    function: NamedFunction


def _read(arguments: str) -> dict[str, Any] | str:
    """Arguments of a call; as they stand where they are no object, for then an answer was cut in them."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def check_arguments(arguments: str) -> None:
    """Refuse arguments of a call that nobody can write.

    Raises:
        PydanticCustomError: with the reason.

    """
    fault: str | None
    try:
        fault = json_fault(json.loads(arguments or "{}"))
    except ValueError:
        fault = None  # cut: they are a text
    except RecursionError:  # what is read here is to be what is read later, with less or more on the stack
        fault = TOO_DEEP
    if fault is not None:
        raise PydanticCustomError("lacking", "{fault}", {"option": "arguments", "fault": fault})


@final
class CalledFunction(Body):
    """What was called. arguments: JSON of an object, as text; of a call that was cut, as much as there is of it."""

    neutral: ClassVar[Mapping[str, Option]] = CALL
    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: Annotated[str, Field(max_length=2**20)]

    @model_validator(mode="after")
    def _writable(self) -> CalledFunction:
        check_arguments(self.arguments)
        return self


@final
class CallBody(Body):
    """A call that the model made."""

    neutral: ClassVar[Mapping[str, Option]] = CALL
    kinds = ("function",)
    id: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["function"]
    function: CalledFunction

    def told(self) -> dict[str, Any]:
        """As a chat template takes it: with the arguments read, where they are whole."""
        return {
            "id": self.id,
            "type": self.type,
            "function": {"name": self.function.name, "arguments": _read(self.function.arguments)},
        }


@final
@dataclass(frozen=True)
class ToolAsk:
    """What a request says of tools. choice: none, auto, required, or named, with the one function in ``functions``."""

    tools: tuple[dict[str, Any], ...]
    functions: tuple[FunctionBody, ...]
    places: tuple[str, ...]
    choice: Literal["none", "auto", "required", "named"]
    parallel: bool

    @property
    def must(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice in ("required", "named")

    @property
    def names(self) -> frozenset[str]:
        """What may be called."""
        return frozenset(function.name for function in self.functions)


class ToolsBody(Body):
    """The options of chats that are of tools."""

    tools: Annotated[list[ToolBody], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _choice(self) -> ToolsBody:
        names = [tool.function.name for tool in self.tools or ()]
        if len({*names}) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise ValueError(f"tools: {twice!r} is there twice")
        wanted = self.tool_choice
        if isinstance(wanted, NamedTool) and wanted.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool {wanted.function.name!r}")
        if wanted == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        return self

    @property
    def asks_tools(self) -> ToolAsk | None:
        """What it says of tools; None: there are none."""
        if not self.tools:
            return None
        wanted, functions = self.tool_choice, [tool.function for tool in self.tools]
        named = wanted.function.name if isinstance(wanted, NamedTool) else None
        kept = [i for i, function in enumerate(functions) if named in (None, function.name)]
        return ToolAsk(
            tools=tuple(tool.told() for tool in self.tools),
            functions=tuple(functions[i] for i in kept),
            places=tuple(f"tools[{i}].function.parameters" for i in kept),
            choice="named" if isinstance(wanted, NamedTool) else wanted or "auto",
            parallel=named is None and self.parallel_tool_calls is not False,
        )
