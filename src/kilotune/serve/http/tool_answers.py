"""What becomes of a chat with tools: its prompt, what its answers have to fit, and how calls are read out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, final

from ...train.data.turn_marks import TOOLS
from ..engine.interface import Generation, Grammar
from .chat_templates import OwnTemplate
from .http_errors import ApiError
from .prompts import Prompts
from .schemas import SamplingBody
from .tool_bodies import ToolAsk
from .tool_formats import ToolFormat, format_of, grammar_of
from .tool_reader import ToolReader, reader_of

__all__ = ["Calling"]


@final
@dataclass(frozen=True)
class Calling:
    """One chat's tools. form: None where no call is looked for. shown: special tokens that calls are written with."""

    ask: ToolAsk
    form: ToolFormat | None
    grammar: Grammar | None
    shown: tuple[int, ...]

    @classmethod
    def of(
        cls, ask: ToolAsk | None, body: SamplingBody, prompts: Prompts, wanted: str, own: OwnTemplate | None = None
    ) -> Self | None:
        """Of a request; None: it has no tools. wanted: the form that the operator says. own: an adapter's template.

        Raises:
            ApiError: the model has no tools, or writes calls in a form that is not known; options that do not go
                together.

        """
        if ask is None:
            return None
        form = format_of(prompts.templates.written(own), "hermes" if ask.choice == "none" else wanted)
        if ask.choice == "none":
            return cls(ask, None, body.grammar, ())
        answer = body.grammar
        if answer is not None and not answer.place.startswith(("response_format", "text.format")):
            name = answer.place.partition(".")[0]
            raise ApiError(400, f"{name}: not together with tools, but for tool_choice: none", param=name)
        grammar = grammar_of(form, ask, answer, lambda mark: prompts.special(mark) is not None)
        if grammar is not None and body.ignore_eos:
            raise ApiError(400, "ignore_eos: not with calls that have a form, which says where they end", param="tools")
        marks = [prompts.special(mark) for mark in form.marks]
        return cls(ask, form, grammar, tuple(number for number in marks if number is not None))

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages, with the tools behind them."""
        return [*messages, {TOOLS: list(self.ask.tools)}]

    def guided(self, generations: Sequence[Generation]) -> list[Generation]:
        """What to ask the engine for."""
        return [
            dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, grammar=self.grammar, shown=self.shown))
            for one in generations
        ]

    def reader(self) -> ToolReader | None:
        """What reads one answer's calls."""
        if self.form is None:
            return None
        return reader_of(self.form, self.ask, sure=self.grammar is not None)
