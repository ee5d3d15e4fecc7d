"""What generate and chat share: a model with an adapter that is ready to write."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..errors import ConfigError
from ..model.peft_model import PeftModel
from ..train.data.processors import template_note
from ..train.finished.sampling_options import Sampling
from ..train.finished.text_generation import Answer, Chat, Writer, check_writes, tokenizer_of
from ..train.results.outcome import form_of
from ..train.results.scoring import check_base
from ..train.running import base_model as models
from ..train.tasks import TASKS
from ._adapter import apart, base_of, load_fitting_base, open_adapter, open_below, put_below
from ._output import quiet_transformers, warn
from ._paths import is_whole_model
from ._weights import Weights

__all__ = ["Opened", "alone", "open_writer", "show", "silence"]

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

    def chat(self, system: str | None, plain: bool | None) -> Chat:
        """A conversation with it.

        Args:
            system: the system message.
            plain: whether each message is given as it stands; None: as it was trained, where that is known and there is
                no system message, else in the template where there is one.

        Raises:
            ConfigError: a system message, and no template for it.

        """
        if plain is None and system is None and self.form is not None:
            plain = self.form != MESSAGES or not self.writer.tokenizer.chat_template
        return Chat(self.writer, system, plain)


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
    if (note := template_note(tokenizer, file.folder, source, revision)) is not None:
        warn(note)
    with apart():
        adapted = PeftModel.from_pretrained(weights.placed(model), file)
    put_below(adapted, below)
    return Opened(Writer(adapted, tokenizer, sampling), adapter, source, form_of(file.folder), on)


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


def silence(answer: Answer, chat: Chat) -> str | None:
    """Why nothing is to be read in an answer; None where something is, or where somebody stopped it."""
    if answer.text.strip() or answer.reason == "interrupted":
        return None
    if answer.reason == "stop":
        return "the answer is empty: it begins with one of the stops (--stop)"
    if answer.reason == "length":
        return f"the answer is empty: its {answer.tokens} tokens are blanks, or no text"
    how = "as it stands" if chat.plain else "in the chat template"
    other = "--template gives it in the chat template" if chat.plain else "--plain gives it as it stands"
    more = f"; {other}" if chat.writer.tokenizer.chat_template else ""
    at_once = "at once" if answer.tokens == 1 else f"after {answer.tokens - 1} tokens that are blanks, or no text"
    return f"the answer is empty: the model ended it {at_once}. It was given the prompt {how}{more}"


def show(text: str) -> None:
    """A piece of a text, at once."""
    print(text, end="", flush=True)
