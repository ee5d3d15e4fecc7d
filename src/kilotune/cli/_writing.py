"""What generate and chat share: a model with an adapter that is ready to write."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..adapter_files.names import CONFIG_NAME
from ..errors import ConfigError
from ..model.peft_model import PeftModel
from ..train.finished.sampling_options import Sampling
from ..train.finished.text_generation import Writer, check_writes, tokenizer_of
from ..train.results.outcome import form_of
from ..train.results.scoring import check_base
from ..train.running import base_model as models
from ..train.tasks import TASKS
from ._adapter import base_of, load_fitting_base, open_adapter, open_below, put_below
from ._output import quiet_transformers
from ._weights import Weights

__all__ = ["Opened", "alone", "is_whole_model", "open_writer", "show"]

MESSAGES = "messages"


@final
@dataclass(frozen=True)
class Opened:
    """A model that is ready to write, and where it is from. form: what the rows were that it learned from, if known.
    on: the shared adapter that it stands on.
    """

    writer: Writer
    adapter: str
    base: str
    form: str | None
    on: str | None = None

    @property
    def chats(self) -> bool | None:
        """Whether it learned chats in the tokenizer's template; None: not known."""
        return None if self.form is None else self.form == MESSAGES and bool(self.writer.tokenizer.chat_template)


def open_writer(
    adapter: str,
    adapter_revision: str | None,
    base: str | None,
    revision: str | None,
    weights: Weights,
    sampling: Sampling,
    on: str | None = None,
) -> Opened:
    """The base with the adapter in it, or a whole model.

    Args:
        adapter: an adapter's folder or hub id, or a folder with a whole model, as the method ``full`` leaves it.
        adapter_revision: of a hub id.
        base: the base's folder or hub id; None: the hub id that the adapter names.
        revision: of a hub id.
        weights: how the base is held.
        sampling: how tokens are chosen.
        on: the shared adapter that the adapter stands on; a folder or hub id.

    Raises:
        KilotuneError: the files are not there, damaged, of another base, or the model writes no text.

    """
    quiet_transformers()
    if is_whole_model(adapter):
        if base is not None:
            raise ConfigError(f"--base: {adapter!r} is a whole model, and no adapter, so it has no base")
        if on is not None:
            raise ConfigError(f"--on: {adapter!r} is a whole model, and no adapter, so it stands on none")
        model = _whole(adapter, weights)
        writer = Writer(weights.placed(model), tokenizer_of(Path(adapter), adapter), sampling)
        return Opened(writer, adapter, adapter, form_of(Path(adapter)))
    file = open_adapter(adapter, adapter_revision)
    below = open_below(file, on)
    source, revision = base_of(file, base, revision)
    called = "--base" if base is not None else "the base that the adapter names (--base gives another)"
    models.load_config(weights.settings(source, revision), called)  # says best what to do where there is no such base
    model = load_fitting_base(file, source, revision, weights.stored, weights.options(source))
    check_writes(model)
    check_base(model, weights.settings(source, revision), file.folder)
    tokenizer = tokenizer_of(file.folder, source, revision)
    adapted = PeftModel.from_pretrained(weights.placed(model), file)
    put_below(adapted, below)
    return Opened(Writer(adapted, tokenizer, sampling), adapter, source, form_of(file.folder), on)


def is_whole_model(folder: str) -> bool:
    """Whether a folder holds a transformers model and no adapter."""
    path = Path(folder)
    return (path / "config.json").is_file() and not (path / CONFIG_NAME).is_file()


def _whole(folder: str, weights: Weights) -> Any:
    settings = weights.settings(folder)
    task = TASKS["seq2seq" if models.load_config(settings, "ADAPTER").is_encoder_decoder else "causal-lm"]()
    return models.load_base(settings, task, None, models.device_of(weights.device, "--device"), "ADAPTER").model


def alone(opened: Opened, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """A context in which the adapter is off, if that is wanted.

    Raises:
        ConfigError: there is no adapter.

    """
    if not wanted:
        return contextlib.nullcontext()
    if not isinstance(model := opened.writer.model, PeftModel):
        raise ConfigError(f"--base-alone: {opened.adapter!r} is a whole model, and no adapter")
    return model.disable_adapter()


def show(text: str) -> None:
    """A piece of a text, at once."""
    print(text, end="", flush=True)
