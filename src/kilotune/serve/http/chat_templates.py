"""The chat templates of a service: the base's, and those that adapters bring.

Small chats in the base's template are rendered in this process, as a training renders them. A chat of many messages,
of long texts or of large tools, and any chat in an adapter's template, is rendered in another process within bounds
(train/data/bounded_templates.py), in threads of their own: what takes long keeps nobody waiting but its own tenant.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, final

from ...errors import ConfigError
from ...train.data.bounded_templates import SECONDS, BoundedTemplates
from ...train.data.rendering import ChatTemplate, Ending, Rendered
from ...train.data.spelling import Speller
from ...train.data.turn_marks import split_tools
from ..engine.lanes import Lanes

__all__ = ["ChatTemplates", "OwnTemplate"]

FEW = 64  # messages and tools of a chat that is rendered here
PARTS = 2000  # of what it is made of: texts, numbers, keys, lists and objects
CHARACTERS = 65_536  # of its texts and keys
BASE_SECONDS = 10.0  # for a chat in the base's template
RENDERERS = 2  # chats that are rendered elsewhere at once, of different tenants
PROBED = 2**18  # characters of the chats in which an adapter's template has its marks looked for, here
KEPT = 256  # templates of adapters whose marks are known
SPELLERS = 4  # copies of the tokenizer, each for other marks


@final
@dataclass(frozen=True)
class OwnTemplate:
    """A template that an adapter brings. name: as errors call it. refused: why no chat is rendered in it."""

    text: str
    name: str
    refused: str | None = None


@final
class ChatTemplates:
    """With one tokenizer, of which nobody else changes anything."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._speller = functools.lru_cache(maxsize=SPELLERS)(lambda names: Speller(tokenizer, names))
        self.base = self._of_base()
        self._bounded = BoundedTemplates(tokenizer.special_tokens_map, RENDERERS)
        self._lanes = Lanes("kilotune-templates", RENDERERS, 1)
        self._known: OrderedDict[OwnTemplate | None, ChatTemplate] = OrderedDict()
        self._lock = Lock()

    def close(self) -> None:
        """Let go of the threads and processes."""
        self._lanes.close()
        self._bounded.close()

    def _of_base(self) -> ChatTemplate | str:
        """What renders chats, or why nothing does.

        It is ready for texts that hold marks of turns: to make what they need when one comes would keep others waiting.
        """
        if not self._tokenizer.chat_template:
            return "this model has no chat template; use /v1/completions"
        try:
            chats = ChatTemplate(self._tokenizer, speller=self._speller)
        except ConfigError as error:
            return str(error)
        chats.warm()
        return chats

    @property
    def text(self) -> str | None:
        """The base's template; None where it has none, or several."""
        return None if isinstance(self.base, str) else self.base.template

    def here(self, messages: Sequence[Any], own: OwnTemplate | None) -> ChatTemplate | None:
        """What renders a chat at once; None: it is for :meth:`render`.

        Raises:
            ConfigError: there is no template.

        """
        if own is not None:
            if own.refused is not None:
                raise ConfigError(own.refused)
            return None
        if isinstance(self.base, str):
            raise ConfigError(self.base)
        chat, tools = split_tools(messages)
        return self.base if len(chat) + len(tools or ()) <= FEW and _is_small(messages) else None

    def written(self, own: OwnTemplate | None) -> str:
        """A template itself; empty where there is none."""
        if own is not None:
            return own.text
        return "" if isinstance(self.base, str) else str(self._tokenizer.get_chat_template())

    async def render(
        self, messages: Sequence[dict[str, Any]], tenant: str, ending: Ending, own: OwnTemplate | None
    ) -> Rendered:
        """A chat, rendered in another process; one of each tenant at a time.

        Raises:
            ConfigError: the template refuses it, or takes too long, too much memory or too much text.

        """
        async with self._lanes.lane(tenant) as lane:
            return await lane.run(lambda: self._rendered(messages, ending, own))

    def ends(self, own: OwnTemplate | None) -> tuple[int, ...]:
        """The token that ends an answer in an adapter's template, which the base need not know, once it rendered."""
        with self._lock:
            chats = None if own is None else self._known.get(own)
        return () if chats is None or chats.turn_end is None else (chats.turn_end,)

    def check(self, own: OwnTemplate) -> None:
        """See that a template renders anything; raises as :meth:`render`."""
        chats = self._chats(own)
        with self._bounded.within():
            chats.prompt([{"role": "user", "content": "x"}])
        chats.warm()

    def _rendered(self, messages: Sequence[dict[str, Any]], ending: Ending, own: OwnTemplate | None) -> Rendered:
        chats = self._chats(own)
        with self._bounded.within(BASE_SECONDS if own is None else SECONDS):
            return chats.prompt(messages, ending)

    def _chats(self, own: OwnTemplate | None) -> ChatTemplate:
        """With the marks of the template, which are found by trying."""
        with self._lock:
            if own in self._known:
                self._known.move_to_end(own)
                return self._known[own]
        given = own or OwnTemplate(self._tokenizer.get_chat_template(), "the base's chat template")
        render = self._bounded.renderer(given.text, given.name)
        with self._bounded.within(most=None if own is None else PROBED):
            made = ChatTemplate(self._tokenizer, given.text, render, self._speller)
            if own is not None:
                _ = made.turn_end
        with self._lock:
            self._known[own] = made
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return made


def _is_small(messages: Sequence[Any]) -> bool:
    """Whether messages have few parts and characters; looks at no more of them than these."""
    left, parts, characters = list(messages), 0, 0
    while left:
        parts += 1
        one = left.pop()
        if isinstance(one, str):
            characters += len(one)
        elif isinstance(one, Mapping):
            characters += sum(len(key) for key in one)
            parts += len(one)
            left.extend(one.values())
        elif isinstance(one, (list, tuple)):
            left.extend(one)
        if parts + len(left) > PARTS or characters > CHARACTERS:
            return False
    return True
