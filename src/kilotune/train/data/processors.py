"""Tokenizers and image processors, from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...bases import located
from ...errors import ConfigError, MissingExtraError, first_line

__all__ = ["load_image_processor", "load_tokenizer"]


def load_tokenizer(base: str, revision: str | None = None) -> Any:
    """The model's own tokenizer.

    Raises:
        ConfigError: there is none, or the hub cannot be reached.
        MissingExtraError: transformers is not installed.

    """
    return _load("AutoTokenizer", "tokenizer", base, revision)


def load_image_processor(base: str, revision: str | None = None) -> Any:
    """The model's own image processor.

    Raises:
        ConfigError: there is none, or the hub cannot be reached.
        MissingExtraError: transformers or Pillow is not installed.

    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pillow", "train", "Preparing images") from error
    return _load("AutoImageProcessor", "image processor", base, revision)


def _load(auto: str, what: str, base: str, revision: str | None) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "train", f"The {what} of {base!r}") from error
    local = Path(located(base)).expanduser()
    where: str = str(local) if local.is_dir() else base
    try:
        return getattr(transformers, auto).from_pretrained(where, revision=revision)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if local.is_dir():
            files = ", ".join(sorted(item.name for item in local.iterdir())[:12]) or "nothing"
            raise ConfigError(
                f"no {what} can be loaded from {local}: {first_line(error)} (the folder has: {files})"
            ) from error
        raise ConfigError(
            f"no {what} for {base!r}: it is no folder here, and the hub does not give it: {first_line(error)} Give "
            "a folder, or load the model once where there is a network and bring the cache (HF_HOME) here"
        ) from error
