"""How models write calls of tools: the forms that are known, and grammars of answers that have to be calls.

Hermes' form, which Qwen's models have too, is ``<tool_call>`` with JSON of name and arguments, then ``</tool_call>``.
Llama 3's is JSON of name and parameters, which is the whole answer. A chat template says which one its model has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from ..engine.interface import JSON_SPACE, Grammar
from .http_errors import ApiError
from .tool_bodies import FunctionBody, ToolAsk

__all__ = ["FORMATS", "HERMES", "LLAMA", "ToolFormat", "call_head", "check_takes_tools", "format_of", "grammar_of"]


@final
@dataclass(frozen=True)
class ToolFormat:
    """One form. marks: texts that may be special tokens, and that a reader has to see. arguments: their key."""

    name: str
    marks: tuple[str, ...]
    arguments: str
    begin: str
    end: str
    between: str


HERMES = ToolFormat("hermes", ("<tool_call>", "</tool_call>"), "arguments", "<tool_call>\n", "\n</tool_call>", "\n")
LLAMA = ToolFormat("llama3_json", ("<|python_tag|>",), "parameters", "", "", "; ")
FORMATS = {form.name: form for form in (HERMES, LLAMA)}
OTHERS = {
    "[TOOL_CALLS]": "Mistral's",
    "<function=": "the XML of Qwen3-Coder or Llama's functions",
    "<arg_key>": "GLM's",
    "<\uff5ctool\u2581calls\u2581begin\uff5c>": "DeepSeek's",
    "<|tool_calls_section_begin|>": "Kimi's",
    "<|channel|>": "gpt-oss'",
    "<|tool_call|>": "Granite's",
    "<start_function_call>": "FunctionGemma's",
    "<|tool_call>": "Gemma's",
    "functools[": "Phi's",
}
TEXT = "/(.|\\n)*/"


def check_takes_tools(template: str) -> None:
    """Tools are to be refused where the template would leave them out.

    Raises:
        ApiError: it would.

    """
    if "tools" not in template:
        raise ApiError(400, "tools: this model's chat template takes none", param="tools", code="not_served")


def format_of(template: str, wanted: str = "auto") -> ToolFormat:
    """The form in which a model with this chat template writes calls. wanted: as the operator says.

    Raises:
        ApiError: it takes no tools, or has another form.

    """
    check_takes_tools(template)
    if wanted != "auto":
        return FORMATS[wanted]
    other = next((name for mark, name in OTHERS.items() if mark in template), None)
    if other is None and "<tool_call>" in template and "arguments" in template:
        return HERMES
    if other is None and '"parameters": ' in template and '"name": ' in template:
        return LLAMA
    raise ApiError(
        400,
        f"tools: this model's chat template writes calls in {other or 'no form that is known'}"
        f"{' form' if other else ''}; served are {' and '.join(FORMATS)}, which the operator may set (--tool-format)",
        param="tools",
        code="not_served",
    )


def grammar_of(
    form: ToolFormat, ask: ToolAsk, answer: Grammar | None, is_special: Callable[[str], bool]
) -> Grammar | None:
    """What an answer has to fit, that may or has to be calls; None: it is held to nothing.

    answer: what it has to fit where it is no call. is_special: whether a mark is a special token.
    """
    if ask.choice == "none":
        return answer
    strict = any(function.strict for function in ask.functions)
    if not (ask.must or strict or answer is not None):
        return None
    rules, begun = _rules(form, ask, is_special)
    schemas = [(place, _schema_text(function)) for place, function in zip(ask.places, ask.functions, strict=True)]
    if ask.must:
        start = "start: calls"
    elif answer is not None and form is LLAMA:
        name = answer.place.partition(".")[0]
        told = f"{name}: not together with tools of this model, whose calls are JSON too, but for tool_choice: "
        raise ApiError(400, f"{told}none or required", param=name, code="not_served")
    elif answer is not None:
        start = f"start: calls | answer\nanswer: %json {_spaced(json.loads(answer.text), answer.lenient)}"
        schemas.append((answer.place, answer.text))
    else:
        start = _free(form, begun, ask.parallel)
    place = "tool_choice" if ask.must else "tools"
    return Grammar(kind="grammar", text="\n".join([start, *rules]), place=place, schemas=tuple(schemas))


def _free(form: ToolFormat, begun: str, parallel: bool) -> str:
    """Text with calls in it: what begins as a call is one."""
    if form is LLAMA:
        return "start: calls | FREE\nFREE: /[ \\t\\n]*([^{ \\t\\n](.|\\n)*)?/"
    rules = [f"TEXT: {TEXT}", *([] if begun else ['begun[lazy]: TEXT "<tool_call>"'])]
    call = f"TEXT {begun} rest" if begun else "begun rest"
    # Where one call is all there may be, nothing can follow it: a text could begin another.
    return "\n".join([f"start: ({call})* TEXT" if parallel else f"start: {call} | TEXT", *rules])


def _rules(form: ToolFormat, ask: ToolAsk, is_special: Callable[[str], bool]) -> tuple[list[str], str]:
    """(Lark's rules of calls, the mark that begins one where it is a special token)."""
    special = [mark for mark in form.marks if is_special(mark)]

    def literal(text: str) -> str:
        for mark in special:
            if mark in text:
                before, _, after = text.partition(mark)
                return " ".join(part for part in (literal(before), mark, literal(after)) if part)
        return json.dumps(text) if text else ""

    each = [
        f'f{i}: {literal(call_head(form, function.name))} %json {_spaced(_schema(function), not function.strict)} "}}"'
        for i, function in enumerate(ask.functions)
    ]
    end = literal(form.end)
    head = form.marks[0]
    inner = literal(form.begin.removeprefix(head))
    many = f"({literal(form.between)} call)*" if ask.parallel else ""
    rules = [
        f"calls: call {many}",
        f"call: {literal(form.begin)} body {end}",
        f"rest: {inner} body {end}",
        f"body: {' | '.join(f'f{i}' for i in range(len(ask.functions)))}",
        *each,
    ]
    return rules, head if head in special else ""


def call_head(form: ToolFormat, name: str) -> str:
    """What a grammar's call has before its arguments."""
    return f'{{"name": {json.dumps(name)}, "{form.arguments}": '


def _schema(function: FunctionBody) -> dict[str, Any]:
    """Of its arguments."""
    given = {"properties": {}} if function.parameters is None else function.parameters
    return {**given, "type": "object"}


def _schema_text(function: FunctionBody) -> str:
    return json.dumps(_schema(function))


def _spaced(schema: Any, lenient: bool) -> str:
    """A schema with llguidance's own options in it; those that a request brings are not for it to set."""
    if not isinstance(schema, dict):
        return json.dumps(schema)
    more: dict[str, Any] = {"lenient": True} if lenient else {}
    return json.dumps({**schema, "x-guidance": {**JSON_SPACE, **more}})
