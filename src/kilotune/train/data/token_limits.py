"""What a tokenizer and a model agree on: how many tokens, which one pads, how many there are to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, gather

if TYPE_CHECKING:
    from ..settings.sections import DataSettings
    from .prepared import Limits

__all__ = ["check_vocabulary", "longest", "pad_token", "refuse_unused", "share"]

USUAL = 1024  # tokens per row where nothing is asked for
NO_LIMIT = 10**9  # tokenizers say a huge number where they know of no limit


def longest(data: DataSettings, processor: Any, limits: Limits) -> int:
    """Tokens per row: ``data.max_length``, or what model and tokenizer take, 1024 at most.

    Raises:
        ConfigError: more is asked for than the model has positions.

    """
    asked = data.max_length
    if asked is not None and limits.max_length is not None and asked > limits.max_length:
        raise ConfigError(f"data.max_length is {asked}, and the model has {limits.max_length} positions: ask for fewer")
    if asked is not None:
        return asked
    known = [limits.max_length, getattr(processor, "model_max_length", None)]
    return min([USUAL, *(size for size in known if size is not None and 0 < size < NO_LIMIT)])


def pad_token(processor: Any, limits: Limits) -> int:
    """The number that fills short rows up: the model's, the tokenizer's, or its end-of-text token.

    In the last case the tokenizer is told, so that the model and the files say the same. Labels are masked by length,
    so a text's own end is learned all the same.

    Raises:
        ConfigError: there is none, or the model has no embedding for it (one that was added to the tokenizer alone).

    """
    number = processor.pad_token_id if limits.pad_token_id is None else limits.pad_token_id
    if number is None and processor.eos_token_id is not None:
        processor.pad_token = processor.eos_token
        number = processor.eos_token_id
    if number is not None and (limits.vocabulary is None or number < limits.vocabulary):
        return int(number)
    if number is not None:
        raise ConfigError(
            f"the padding token is number {number}, and the model's embedding has {limits.vocabulary} rows: set "
            "pad_token in the model's tokenizer_config.json to a token that the model has"
        )
    raise ConfigError(
        "neither the model nor its tokenizer has a padding token or an end-of-text token to pad with: set "
        "pad_token in the model's tokenizer_config.json, to a token that no text has"
    )


def check_vocabulary(top: int, processor: Any, limits: Limits) -> None:
    """Refuse tokens that the model has no embedding for; ``top`` is the highest number in the data.

    Raises:
        ConfigError: with such a token.

    """
    if limits.vocabulary is not None and top >= limits.vocabulary:
        raise ConfigError(
            f"the tokenizer makes token {top} ({processor.convert_ids_to_tokens(top)!r}), and the model's embedding "
            f"has {limits.vocabulary} rows: they do not belong together"
        )


def refuse_unused(data: DataSettings, task: str, effective: Sequence[str]) -> None:
    """Refuse settings that this task would ignore; ``effective`` are those that it does not.

    Raises:
        ConfigError: for all of them at once.

    """
    defaults: Mapping[str, Any] = {"packing": False, "loss_on": "answer", "max_length": None, "plain": False}
    given = [name for name, default in defaults.items() if getattr(data, name) != default and name not in effective]
    if given:
        faults = [f"data.{name}: has no effect on task {task!r}; leave it out" for name in given]
        raise ConfigError(gather("these settings do nothing here:", faults))


def share(count: int, whole: int, what: str) -> str:
    """``3 of 40 rows (7.5 %)``."""
    return f"{count:,} of {whole:,} {what} ({100 * count / max(1, whole):.3g} %)"
