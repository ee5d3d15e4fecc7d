"""How the next token is chosen: the settings of a :class:`~kilotune.train.finished.text_generation.Writer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ..settings.fields import Section, number, or_none, setting

__all__ = ["Sampling"]


def _stops(name: str, value: Any) -> list[str]:
    if isinstance(value, tuple) and all(isinstance(item, str) and item for item in value):
        return []
    return [f"{name}: expected a list of texts that are not empty, got {value!r}"]


@final
@dataclass(frozen=True, kw_only=True)
class Sampling(Section):
    """How the next token is chosen, and when the text ends."""

    max_tokens: int = setting(256, number(1, whole=True), "At most so many new tokens.")
    temperature: float = setting(
        0.0,
        number(0),
        "0 takes the likeliest token each time, so the text is always the same; above 0 tokens are drawn, at 1 with "
        "the model's own probabilities.",
    )
    top_p: float | None = setting(
        None,
        or_none(number(0, 1, above=True)),
        "Draw from the likeliest tokens only that have this probability together. Default: the model's own setting.",
    )
    top_k: int | None = setting(
        None,
        or_none(number(0, whole=True)),
        "Draw from so many of the likeliest tokens only; 0: from all. Default: the model's own setting.",
    )
    seed: int | None = setting(
        None, or_none(number(0, whole=True)), "Decides what is drawn. Default: another text each time."
    )
    stop: Sequence[str] = setting((), _stops, "End before this text; may be given again.")

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        if values["temperature"]:
            return []
        given = [name for name in ("top_p", "top_k", "seed") if values[name] is not None]
        return [
            f"{name}: nothing is drawn at temperature 0; give a temperature above 0, or leave it out" for name in given
        ]
