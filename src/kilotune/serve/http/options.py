"""Options of OpenAI's and vLLM's APIs that are not served, and the values at which they ask for nothing.

At such a value, and at null, an option is taken and changes nothing. At any other it is refused, by name. The table is
the only list of them: requests are checked by it, the API's document has it, and docs/serve.md is compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, final

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from ..engine.interface import JSON_SPACE

__all__ = [
    "ASKING",
    "CALL",
    "ITEM",
    "LORA",
    "MESSAGE",
    "PART",
    "REASONING",
    "RESPONSE",
    "STRUCTURED",
    "TEXT",
    "Metadata",
    "Option",
    "Told",
    "check_kind",
    "drop_neutral",
]

Told = Annotated[str, Field(max_length=2**18)]  # a text with no bound may hold half a character, too
SHOWN = 60  # characters of a type in an error
Word = Annotated[str, Field(max_length=512)]
Nothing = Annotated[list[Any], Field(max_length=0)]
Empty = Annotated[dict[str, Any], Field(max_length=0)]
Metadata = Annotated[dict[Word, Word], Field(max_length=16)]


@final
class Option:
    """One option.

    Args:
        name: as requests have it.
        kind: the type that has those values only at which it asks for nothing.
        told: these values, for readers; by default those of a ``Literal``.

    """

    def __init__(self, name: str, kind: Any, told: str | None = None) -> None:
        self.name = name
        self._type: TypeAdapter[Any] = TypeAdapter(kind)
        self.schema = self._type.json_schema()
        values = self.schema.get("enum", [self.schema["const"]] if "const" in self.schema else [])
        self._values = [json.dumps(value) for value in values]
        self.told = ", ".join(f"`{value}`" for value in self._values) if told is None else told

    def neutral(self, value: Any) -> bool:
        """Whether the option asks for nothing at this value."""
        try:
            self._type.validate_python(value, strict=True)
        except ValidationError:
            return False
        return not self._values or json.dumps(value) in self._values  # for Python, 0 is False


def _zero(name: str, value: float) -> Option:
    return Option(name, Annotated[float, Field(ge=value, le=value)], f"`{value:g}`")


def _never(name: str) -> Option:
    """It asks for nothing at null alone, which is taken of all."""
    return Option(name, None, "")


SPACE = Literal[JSON_SPACE["whitespace_pattern"]], f"`{json.dumps(JSON_SPACE['whitespace_pattern'])}`"

ASKING = {
    option.name: option
    for option in (
        Option("store", Literal[False]),
        Option("metadata", Metadata, "up to 16 texts by name"),
        Option("safety_identifier", Word, "any text"),
        Option("prompt_cache_key", Word, "any text"),
        Option("prompt_cache_retention", Literal["in_memory", "in-memory", "24h"]),
        Option("service_tier", Literal["auto", "default"]),
        Option("modalities", Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)], '`["text"]`'),
        Option("verbosity", Literal["medium"]),
        Option("reasoning_effort", Literal["none"]),
        Option("tools", Nothing, "`[]`"),
        Option("tool_choice", Literal["none", "auto"]),
        Option("parallel_tool_calls", bool, "`true`, `false` (there are no tools)"),
        Option("functions", Nothing, "`[]`"),
        Option("function_call", Literal["none", "auto"]),
        Option("suffix", Literal[""]),
        Option("echo", Literal[False]),
        Option("use_beam_search", Literal[False]),
        _zero("length_penalty", 1),
        _zero("min_tokens", 0),
        _zero("priority", 0),
        Option("bad_words", Nothing, "`[]`"),
        Option("skip_special_tokens", Literal[True]),
        Option("spaces_between_special_tokens", Literal[True]),
        Option("include_stop_str_in_output", Literal[False]),
        Option("return_tokens_as_token_ids", Literal[False]),
        Option("return_token_ids", Literal[False]),
        Option("return_token_offsets", Literal[False]),
        Option("return_prompt_text", Literal[False]),
        Option("return_mm_kwargs", Literal[False]),
        Option("include_reasoning", bool, "`true`, `false` (there is no reasoning)"),
        _zero("stream_interval", 1),
        Option("request_id", Word, "any text"),
        Option("session_id", Word, "any text"),
        Option("chat_template_kwargs", Empty, "`{}`"),
        Option("documents", Nothing, "`[]`"),
        Option("add_special_tokens", Literal[False]),
        Option("guided_decoding_backend", Literal["auto", "guidance"]),
        Option("guided_whitespace_pattern", *SPACE),
        *map(
            _never,
            (
                "audio",
                "prediction",
                "web_search_options",
                "allowed_token_ids",
                "truncate_prompt_tokens",
            ),
        ),
    )
}
"""Of requests for text, by name. Where a route serves an option of this name, the route's own holds."""

STRUCTURED = {
    option.name: option
    for option in (
        Option("disable_fallback", Literal[False]),
        Option("disable_any_whitespace", Literal[False]),
        Option("disable_additional_properties", Literal[False]),
        Option("whitespace_pattern", *SPACE),
        _never("structural_tag"),
    )
}
"""Of ``structured_outputs``."""

MESSAGE = {
    option.name: option
    for option in (
        Option("refusal", Literal[""]),
        Option("annotations", Nothing, "`[]`"),
        Option("parsed", dict[str, Any], "any object"),  # what OpenAI's client made of the content
        Option("reasoning_content", Literal[""]),
        Option("reasoning", Literal[""]),
        *map(_never, ("audio", "function_call")),
    )
}
"""Of messages: what comes back with an answer."""

PARSED = Option("parsed_arguments", dict[str, Any], "any object")

CALL = {
    option.name: option
    for option in (PARSED, Option("index", Annotated[int, Field(ge=0)], "its number"))  # which streams have
}
"""Of calls of tools: what OpenAI's client made of the arguments, and left of a stream."""


RESPONSE = {
    option.name: option
    for option in (
        Option("background", Literal[False]),
        Option("truncation", Literal["disabled"]),
        Option(
            "stream_options",
            Annotated[dict[Literal["include_obfuscation"], Literal[False]], Field(max_length=1)],
            '`{"include_obfuscation": false}`',
        ),
        *(
            ASKING[name]
            for name in (
                "safety_identifier",
                "prompt_cache_key",
                "prompt_cache_retention",
                "service_tier",
                "priority",
                "skip_special_tokens",
                "include_stop_str_in_output",
                "return_mm_kwargs",
                "include_reasoning",
                "request_id",
                "session_id",
                "chat_template_kwargs",
            )
        ),
        *map(_never, ("max_tool_calls", "prompt", "context_management", "moderation", "structured_outputs")),
    )
}
"""Of ``/v1/responses``."""

TEXT = {"verbosity": ASKING["verbosity"]}
"""Of its ``text``."""

REASONING = {option.name: option for option in (Option("effort", Literal["none"]), _never("summary"))}
"""Of its ``reasoning``."""

LORA = {
    option.name: option
    for option in (Option("is_3d_lora_weight", Literal[False]), Option("lora_int_id", int, "any number"))
}
"""Of loads and unloads of adapters."""

ITEM = {
    option.name: option
    for option in (
        Option("id", Word, "any text"),
        Option("status", Literal["completed", "incomplete", "in_progress"]),
        Option("phase", Literal["commentary", "final_answer"]),
        PARSED,
    )
}
"""Of items of its input: what comes back with an answer."""

PART = {
    option.name: option
    for option in (
        Option("annotations", Nothing, "`[]`"),
        Option("logprobs", list[Any], "those of an answer"),
        Option("parsed", dict[str, Any], "any object"),
    )
}
"""Of their parts."""


def drop_neutral(given: dict[str, Any], options: Mapping[str, Option], own: Collection[str]) -> dict[str, Any]:
    """A body without the options that ask for nothing. own: what the body serves itself.

    Raises:
        PydanticCustomError: ``not_served``, with the option.

    """
    for name in given:
        if name in options and name not in own and not options[name].neutral(given[name]):
            raise PydanticCustomError(
                "not_served", "not served; taken is {taken}", {"option": name, "taken": _plain(options[name].told)}
            )
    return {name: value for name, value in given.items() if name in own or name not in options}


def check_kind(given: Any, taken: Collection[str]) -> None:
    """Another type is one that is not served, and not a mistake in writing.

    Raises:
        PydanticCustomError: ``not_served``, with the type.

    """
    if isinstance(given, str) and given not in taken:
        *most, last = [f'"{name}"' for name in taken]
        told = f"{', '.join(most)} or {last}" if most else last
        said = {"option": "type", "kind": json.dumps(given[:SHOWN]), "taken": told}
        raise PydanticCustomError("not_served", "{kind} is not served; taken is {taken}", said)


def _plain(told: str) -> str:
    return f"{told.replace('`', '')} or null" if told else "null alone"
