"""Text from a model with an adapter in it: prompts as in training, sampling, streaming, chats."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError, UnsupportedError
from ...model.peft_model import PeftModel
from ..data.columns import sound
from ..data.processors import load_tokenizer, with_template
from ..data.rendering import ChatTemplate, Rendered, tokenize
from ..running.base_model import limits_of
from .sampling_options import Sampling

__all__ = ["Answer", "Chat", "Writer", "check_writes", "tokenizer_of"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")
INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character
PROBE = "kilotune-answer"
Message = dict[str, str]
Show = Callable[[str], None]


@final
@dataclass(frozen=True)
class Answer:
    """A text that a model wrote.

    Attributes:
        text: without the end-of-text token, and without what follows a stop.
        reason: why it ended: ``end`` (the model's own end of text or turn), ``stop`` (one of the stops), ``length``
            (``max_tokens``, or all that the model takes), ``interrupted``.
        tokens: how many the model made, the one that ended it included.
        prompt_tokens: how many it was given.
        seconds: from the prompt to the end.
        left_out: earlier messages of a chat that the model was not given, because it takes no more tokens.
    """

    text: str
    reason: str
    tokens: int
    prompt_tokens: int
    seconds: float
    left_out: int = 0


def tokenizer_of(folder: Path, base: str, revision: str | None = None) -> Any:
    """The tokenizer that an adapter was trained with: the one in its folder, else its base's, with the folder's chat
    template where there is one.

    Raises:
        ConfigError: there is none.

    """
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(str(folder))
    return with_template(load_tokenizer(base, revision), folder)


def check_writes(model: nn.Module) -> None:
    """Refuse a model that does not write text.

    Raises:
        UnsupportedError: with what to do instead.

    """
    can = getattr(model, "can_generate", None)
    if not callable(can) or not can():
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        raise UnsupportedError(f"a {type(inner).__name__} writes no text; kilotune evaluate scores it on a data file")


@final
class Writer:
    """A language model, in evaluation mode, that continues or answers prompts.

    Args:
        model: a transformers model that can generate; as a rule a :class:`kilotune.PeftModel` of one.
        tokenizer: its tokenizer.
        sampling: how tokens are chosen.

    Raises:
        UnsupportedError: the model does not write text.

    """

    def __init__(self, model: nn.Module, tokenizer: Any, sampling: Sampling | None = None) -> None:
        check_writes(model)
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self._config: Any = model.config
        self._ends = self._end_tokens()
        self._template: ChatTemplate | None = None
        self._asked = 0

    @property
    def window(self) -> int | None:
        """How many tokens the model takes: prompt and answer together, or each, where it has an encoder; None: any."""
        return limits_of(self._config).max_length

    def _end_tokens(self) -> list[int]:
        """What ends a text, by the model's settings, by the tokenizer, and by its chat template's end of a turn."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        found = [*named] if isinstance(named, (list, tuple)) else [named]
        found += [self.tokenizer.eos_token_id, _turn_end(self.tokenizer)]
        return [*dict.fromkeys(int(token) for token in found if token is not None)]

    # -- prompts -------------------------------------------------------------------------------------

    def plain(self, text: str) -> list[int]:
        """The token numbers of a text as it stands, as training has the beginning of a text or a prompt.

        Raises:
            ConfigError: it holds halves of characters.

        """
        _check_text(text)
        if self._config.is_encoder_decoder:
            return [int(token) for token in self.tokenizer(text)["input_ids"]]
        ids = tokenize(self.tokenizer, [Rendered(text, ())], "all").examples[0].ids
        return ids if self.tokenizer.eos_token_id is None else ids[:-1]

    def rendered(self, messages: Sequence[Message]) -> list[int]:
        """The token numbers of a chat in the tokenizer's template, up to where the answer begins.

        Raises:
            ConfigError: the tokenizer has no template, or it refuses these messages; they hold halves of characters, or
                what cannot be told from a mark of a turn.

        """
        for message in messages:
            _check_text(message["content"])
        if not self.tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template, so there are no roles; give plain text (--plain)")
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
        return tokenize(self.tokenizer, [self._template.prompt(messages)], "all").examples[0].ids

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise ConfigError("the prompt is empty, and this tokenizer begins no text with a token of its own")
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise CheckpointError(
                f"the tokenizer gives token {max(ids)}, and the model has {rows}: it is the tokenizer of another model"
            )
        if self.window is not None and self._room(len(ids)) < 1:
            raise ConfigError(f"the prompt has {len(ids)} tokens, and the model takes {self.window}; shorten it")

    # -- answers -------------------------------------------------------------------------------------

    def write(self, ids: Sequence[int], show: Show | None = None) -> Answer:
        """What the model writes after ``ids``.

        Args:
            ids: from :meth:`plain` or :meth:`rendered`.
            show: is called with each piece of the text as soon as it is certain; together they are the text.

        Raises:
            ConfigError: the prompt is empty, or longer than the model takes.
            CheckpointError: the tokenizer is another model's.

        """
        self._check(ids)
        stream = _Stream(self.tokenizer, self.sampling.stop, show)
        device = self.model.get_input_embeddings().weight.device
        given = torch.tensor([list(ids)], device=device)  # (1, tokens)
        start, reason = time.perf_counter(), None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._next_seed())
            try:
                self.model.generate(**self._options(given, stream))
            except KeyboardInterrupt:
                reason = "interrupted"
        text = stream.finish()
        reason = reason or ("stop" if stream.stopped else "end" if stream.ids[-1] in self._ends else "length")
        return Answer(text, reason, len(stream.ids), len(ids), time.perf_counter() - start)

    def _next_seed(self) -> int:
        """Of each answer another one, and the same again in another run with this seed."""
        if self.sampling.seed is None:
            return secrets.randbits(63)
        self._asked += 1
        return self.sampling.seed + self._asked - 1

    def _room(self, prompt: int) -> int:
        """How many tokens of an answer the model takes after so many of a prompt."""
        if self.window is None:
            return self.sampling.max_tokens
        if self._config.is_encoder_decoder:  # an encoder takes the prompt, and a decoder the answer and a first token
            return self.window - 1 if prompt <= self.window else 0
        return self.window - prompt

    def _options(self, given: Tensor, stream: _Stream) -> dict[str, Any]:
        options: dict[str, Any] = {
            "input_ids": given,
            "attention_mask": torch.ones_like(given),
            "max_new_tokens": min(self.sampling.max_tokens, self._room(given.shape[1])),
            "num_beams": 1,
            "do_sample": self.sampling.temperature > 0,
            "eos_token_id": self._ends or None,
            "pad_token_id": self._padding(),
            "streamer": stream,
            "stopping_criteria": [stream.criterion],
        }
        if self.sampling.temperature > 0:
            drawn = {name: getattr(self.sampling, name) for name in ("temperature", "top_p", "top_k")}
            options.update({name: value for name, value in drawn.items() if value is not None})
        return options

    def _padding(self) -> int | None:
        """One text needs no padding, but transformers warns where there is no number for it."""
        for source in (self.tokenizer, self.model.generation_config):
            if (token := getattr(source, "pad_token_id", None)) is not None:
                return int(token)
        return self._ends[0] if self._ends else None


def _check_text(text: str) -> None:
    try:
        sound(text)
    except ValueError as error:
        raise ConfigError(f"the prompt {error}") from None


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer; it need not be the end-of-text token."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template that refuses these two messages ends an answer in a way of its own
        return None
    ids = tokenizer(text.rpartition(PROBE)[2], add_special_tokens=False)["input_ids"]
    return int(ids[0]) if ids and ids[0] in tokenizer.all_special_ids else None


@final
class _Stream:
    """Turns tokens into text as they come, and notices the stops. Transformers' ``streamer``.

    Transformers' own TextStreamer decodes line by line, and with tokenizers that mark the space before a word the first
    space of each line is lost; here all tokens are decoded together, as the whole text is.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], show: Show | None) -> None:
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer, self._stops, self._show = tokenizer, stops, show
        self._begun = False
        self._shown = ""

    def put(self, tokens: Tensor) -> None:
        """Take the next token; the first call brings the prompt."""
        if not self._begun:
            self._begun = True
            return
        self.ids += [int(token) for token in tokens.reshape(-1)]
        text = self._text()
        self._tell(text if self.stopped else text[: len(text) - self._uncertain(text)])

    def end(self) -> None:
        """Transformers calls it after the last token; what was held back comes with :meth:`finish`."""

    def finish(self) -> str:
        """The whole text, the rest of which is shown now."""
        text = self._text()
        self._tell(text)
        return text

    def criterion(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        """Whether the text is at its end; transformers asks after each token."""
        return torch.full((ids.shape[0],), self.stopped, device=ids.device)

    def _text(self) -> str:
        text = str(self._tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        at = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.stopped = bool(at)
        return text[: min(at)] if at else text

    def _uncertain(self, text: str) -> int:
        """How many characters at the end may still change, or be the beginning of a stop."""
        broken = len(text) - len(text.rstrip(INCOMPLETE))
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(broken, max(begun, default=0))

    def _tell(self, text: str) -> None:
        if self._show is not None and len(text) > len(self._shown) and text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


@final
class Chat:
    """A conversation: what was said before is part of each prompt.

    Args:
        writer: who answers.
        system: the system message; needs a chat template.
        plain: whether each message is a prompt of its own, as it stands; None: where there is no chat template.

    Attributes:
        messages: what was said so far, the system message first.

    """

    def __init__(self, writer: Writer, system: str | None = None, plain: bool | None = None) -> None:
        self.writer = writer
        self.plain = not writer.tokenizer.chat_template if plain is None else plain
        if system is not None and not writer.tokenizer.chat_template:
            raise ConfigError("a system message needs the chat template, and this tokenizer has none")
        if system is not None and self.plain:
            raise ConfigError("a system message needs the chat template, and plain text was asked for")
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._system)

    def reset(self) -> None:
        """Forget all that was said, but for the system message."""
        self.messages = list(self._system)

    def ask(self, text: str, show: Show | None = None) -> Answer:
        """Say ``text``, and take the answer into the conversation (an interrupted one too, unless it is empty).

        Raises:
            ConfigError: the message alone is more than the model takes; the conversation is as it was.

        """
        asked: Message = {"role": "user", "content": text}
        if self.plain:
            ids, left_out = self.writer.plain(text), 0
        else:
            ids, left_out = self._fitting([*self.messages, asked])
        answer = self.writer.write(ids, show)
        if answer.text or answer.reason != "interrupted":
            self.messages += [asked, {"role": "assistant", "content": answer.text}]
        return Answer(answer.text, answer.reason, answer.tokens, answer.prompt_tokens, answer.seconds, left_out)

    def _fitting(self, messages: list[Message]) -> tuple[list[int], int]:
        """The prompt, without the oldest exchanges where the model does not take them and an answer; how many."""
        first, window = len(self._system), self.writer.window
        rest = messages[first:]
        ids = self.writer.rendered(messages)
        while window is not None and len(rest) > 1 and len(ids) + self.writer.sampling.max_tokens > window:
            rest = rest[2:]
            ids = self.writer.rendered([*self._system, *rest])
        return ids, len(messages) - first - len(rest)
