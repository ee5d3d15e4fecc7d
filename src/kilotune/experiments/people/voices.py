"""People who wrote, and which of their rows are trained on and which are held out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from ...errors import ConfigError
from .settings import Sizes

__all__ = ["Pair", "Rows", "Voice", "Voices", "split"]


@final
@dataclass(frozen=True)
class Voice:
    """One of the people.

    name: short, as its adapter is called. title: what is shown of it. people: who wrote it, where that is known. texts:
    what they wrote, by the prompt that it answers.
    """

    name: str
    title: str
    people: tuple[str, ...]
    texts: Mapping[str, str]


@final
@dataclass(frozen=True)
class Voices:
    """People, and what their text is.

    source, licence: where it is from. kind: what one of them is. rule: who is in it, and which rows. task: what a row
    is. after, lead: what stands between a prompt and its answer, as the prompt's part and as the answer's. common: all
    have answered the same prompts.
    """

    source: str
    licence: str
    kind: str
    rule: str
    task: str
    after: str
    lead: str
    common: bool
    people: tuple[Voice, ...]


@final
@dataclass(frozen=True)
class Pair:
    """A row: what is asked, and what this person wrote."""

    asked: str
    said: str


@final
@dataclass(frozen=True)
class Rows:
    """A person's rows, and those held out."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]


def split(voices: Voices, sizes: Sizes, seed: int) -> dict[str, Rows]:
    """Everybody's rows by name. Where all have answered the same prompts, what is held out is held out of all.

    Raises:
        ConfigError: there are not so many rows.

    """
    wanted, held = sizes.train + sizes.validation + sizes.test, sizes.test + sizes.validation
    found = {}
    for voice, prompts in zip(voices.people, _prompts(voices)):
        if len(prompts) < wanted:
            raise ConfigError(
                f"{voice.name}: expected at least {wanted} rows ({sizes.train} to train on, {sizes.validation} for "
                f"validation, {sizes.test} to test), got {len(prompts)}"
            )
        random.Random(f"people {seed}").shuffle(prompts)
        rows = tuple(Pair(prompt, voice.texts[prompt]) for prompt in prompts)
        found[voice.name] = Rows(rows[held:wanted], rows[sizes.test : held], rows[: sizes.test])
    return found


def _prompts(voices: Voices) -> Sequence[list[str]]:
    """Each one's prompts, in an order that is no file's."""
    own = [set(voice.texts) for voice in voices.people]
    if voices.common:
        own = [set.intersection(*own)] * len(own)
    return [sorted(prompts) for prompts in own]
