"""AutoPeftModel and its sisters: the base that an adapter's file names, and the adapter in it."""

from __future__ import annotations

import importlib
import os
from abc import ABC
from typing import Any, ClassVar, final

from ..errors import CheckpointError, ConfigError, MissingExtraError
from .config import PeftConfig
from .peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

# Options of an adapter's place; all others are the base's.
PLACE = ("subfolder", "cache_dir", "token", "local_files_only")


class _Auto(ABC):  # noqa: B024, what its children say is a name
    """How the base is loaded: by which class of transformers."""

    loader: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise ConfigError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base that an adapter's file names, with the adapter in it.

        Where a tokenizer lies beside the adapter and has more tokens than the base, the base's embeddings get rows for
        them first.

        Args:
            pretrained_model_name_or_path: the adapter's folder or hub id.
            adapter_name: what to call it.
            is_trainable: False: it is frozen.
            config: in place of that in the folder.
            revision: the adapter's.
            kwargs: subfolder, cache_dir, token, local_files_only of the adapter; all others go to the base's
                ``from_pretrained`` (``dtype``, ``device_map`` and so on).

        Raises:
            CheckpointError: the file names no base. ConfigError: it is of another task.

        """
        place = {key: kwargs.pop(key) for key in PLACE if key in kwargs}
        name = pretrained_model_name_or_path
        known = PeftConfig.from_pretrained(name, revision=revision, **place) if config is None else config
        if known.base_model_name_or_path is None:
            raise CheckpointError(
                f"{name}: its configuration names no base model; load the base, then PeftModel.from_pretrained"
            )
        base = cls._class_of(known).from_pretrained(
            known.base_model_name_or_path, revision=known.revision or "main", **kwargs
        )
        _make_room(base, name, place)
        return PeftModel.from_pretrained(base, name, adapter_name, is_trainable, config, revision=revision, **place)

    @classmethod
    def _class_of(cls, config: PeftConfig) -> Any:
        transformers = _transformers()
        if cls.loader is not None:
            wanted = next(task for task, model in LOADERS.items() if model == cls.loader)
            if config.task_type not in (None, wanted):
                raise ConfigError(f"{cls.__name__}: expected an adapter for {wanted}, got one for {config.task_type}")
            return getattr(transformers, cls.loader)
        if config.task_type is not None:
            return getattr(transformers, LOADERS[str(config.task_type)])
        if not config.auto_mapping:
            raise CheckpointError(
                "the adapter's configuration has neither task_type nor auto_mapping, so its base's class is not known"
            )
        said = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
        library, named = said.get("parent_library"), said.get("base_model_class")
        if str(library).partition(".")[0] != "transformers":  # what a file names is run
            raise CheckpointError(
                f"auto_mapping: the base is of {library!r}; only transformers' classes are loaded by name"
            )
        try:
            found = getattr(importlib.import_module(str(library)), str(named))
        except (ImportError, AttributeError) as error:
            raise CheckpointError(f"auto_mapping: there is no {library}.{named}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise CheckpointError(f"auto_mapping: {library}.{named} is no model of transformers")
        return found


LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("transformers", "transformers", "AutoPeftModel") from error


def _make_room(base: Any, name: str | os.PathLike[str], place: dict[str, Any]) -> None:
    """Give a base rows for the tokens of the tokenizer beside an adapter, where it has fewer."""
    folder = os.path.join(name, place.get("subfolder") or "")
    if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(len(tokenizer))


@final
class AutoPeftModel(_Auto):
    """Of any task that the adapter's file names."""


@final
class AutoPeftModelForCausalLM(_Auto):
    """A language model."""

    loader: ClassVar[str | None] = "AutoModelForCausalLM"


@final
class AutoPeftModelForSeq2SeqLM(_Auto):
    """An encoder and a decoder."""

    loader: ClassVar[str | None] = "AutoModelForSeq2SeqLM"


@final
class AutoPeftModelForSequenceClassification(_Auto):
    """A classifier of texts."""

    loader: ClassVar[str | None] = "AutoModelForSequenceClassification"


@final
class AutoPeftModelForTokenClassification(_Auto):
    """A classifier of tokens."""

    loader: ClassVar[str | None] = "AutoModelForTokenClassification"


@final
class AutoPeftModelForQuestionAnswering(_Auto):
    """Finds answers in a text."""

    loader: ClassVar[str | None] = "AutoModelForQuestionAnswering"


@final
class AutoPeftModelForFeatureExtraction(_Auto):
    """Gives vectors."""

    loader: ClassVar[str | None] = "AutoModel"
