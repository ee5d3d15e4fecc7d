"""Tokenizers and image processors, from a folder or the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ...adapter_files.own_files import TEMPLATE, own_template, read_own
from ...bases import located
from ...errors import ConfigError, MissingExtraError, first_line

__all__ = ["load_image_processor", "load_tokenizer", "template_note", "with_template"]


def load_tokenizer(base: str, revision: str | None = None) -> Any:
    """The model's own tokenizer.

    Raises:
        ConfigError: there is none, or the hub cannot be reached.
        MissingExtraError: transformers is not installed.

    """
    return _load("AutoTokenizer", "tokenizer", base, revision)


def with_template(tokenizer: Any, folder: Path) -> Any:
    """A base's tokenizer, with the chat template that an adapter's folder brings by itself, if it does.

    Raises:
        ConfigError: the template cannot be read.

    """
    if (folder / TEMPLATE).is_file():
        tokenizer.chat_template = own_template(read_own(folder))
    return tokenizer


def template_note(tokenizer: Any, folder: Path, base: str, revision: str | None = None) -> str | None:
    """What to say where a tokenizer renders chats in an adapter's own template; None where that is the base's."""
    own = getattr(tokenizer, "chat_template", None)
    if own is None or not any((folder / name).is_file() for name in (TEMPLATE, "tokenizer_config.json")):
        return None
    with contextlib.suppress(ConfigError):
        if load_tokenizer(base, revision).chat_template == own:
            return None
    return f"chats are in the adapter's own chat template, which is not that of {base}"


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
