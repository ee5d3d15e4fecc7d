"""What adapters bring beside their numbers, and whether it is served: chat templates and tokenizers.

::

    chat template      the base's: nothing to do; another one: served where the operator allows it, else refused
    tokenizer's files  the base's: nothing to do; others: refused, with what differs
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from ...adapter_files.own_files import own_template
from ...errors import ConfigError
from ...train.data.own_tokenizer import BaseTokenizer
from .chat_templates import ChatTemplates, OwnTemplate

__all__ = ["OwnFiles"]

SETTING = "--own-chat-templates"
SHOWN = 60  # characters of a template's line in an error


@final
class OwnFiles:
    """Held against one base's tokenizer. allowed: whether templates that are not the base's are served."""

    def __init__(self, tokenizer: Any, templates: ChatTemplates, allowed: bool) -> None:
        self._templates, self._allowed = templates, allowed
        self._base = BaseTokenizer(tokenizer)

    def close(self) -> None:
        """Let go of the process."""
        self._base.close()

    def judged(self, name: str, files: Mapping[str, bytes]) -> OwnTemplate | None:
        """The template that an adapter's chats are rendered in; None: the base's.

        Raises:
            ConfigError: its tokenizer is not the base's, or a file cannot be read.

        """
        try:
            self._base.check(files)
            text = own_template(files)
        except ConfigError as error:
            raise ConfigError(f"adapter {name!r}: {error}") from error
        base = self._templates.text
        if text is None or (base is not None and _trimmed(text) == _trimmed(base)):
            return None
        called = f"the chat template of adapter {name!r}"
        if self._allowed:
            return OwnTemplate(text, called)
        told = "the base has none" if base is None else _difference(text, base)
        return OwnTemplate(
            "",  # nothing is rendered in it, and many of them are remembered
            called,
            f"{called} is not the base's: {told}. A service that was started with {SETTING} uses it; or take it out of "
            "the adapter's files where the base's is meant",
        )

    def check(self, name: str, files: Mapping[str, bytes]) -> None:
        """See that an adapter can be put with these files.

        Raises:
            ConfigError: it cannot, with what would let it.

        """
        own = self.judged(name, files)
        if own is not None:
            if own.refused is not None:
                raise ConfigError(own.refused)
            self._templates.check(own)


def _trimmed(text: str) -> str:
    return text.removesuffix("\n")  # jinja2 takes a last line's end away itself


def _difference(text: str, base: str) -> str:
    """Where two templates part."""
    mine, theirs = text.splitlines(), base.splitlines()
    for place, (own, other) in enumerate(zip([*mine, ""], [*theirs, ""]), 1):
        if own != other:
            at = max(0, next((i for i, (a, b) in enumerate(zip(own, other)) if a != b), min(len(own), len(other))) - 20)
            return f"line {place} has {own[at : at + SHOWN]!r} where the base's has {other[at : at + SHOWN]!r}"
    return f"it has {len(mine)} lines, and the base's has {len(theirs)}"
