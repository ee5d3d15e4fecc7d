"""Chat templates that come from strangers, or have much to write: rendered in bounded time, memory and size.

A template is a program. Its sandbox keeps it from files and from Python, but not from loops without end, which would
let no other thread run. So it runs in another process, a child for each chat (kilotune/bounded.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from ...bounded import Bounded, BoundedError, Bounds
from ...errors import ConfigError
from .rendering import Render
from .turn_marks import Message, split_tools

__all__ = ["SECONDS", "BoundedTemplates"]

FUNCTION = Path(__file__).with_name("template_process.py")
SECONDS = 1.0  # for all that is rendered of one chat
MEMORY = 2**28  # bytes
MOST = 2**24  # bytes of a rendered chat as JSON; what a request brings is far less


@final
class BoundedTemplates:
    """Renders any template with one tokenizer's special tokens. Of any thread.

    Args:
        special: the tokenizer's ``special_tokens_map``.
        processes: chats that are rendered at once.

    """

    def __init__(self, special: Mapping[str, Any], processes: int = 1) -> None:
        self._special = {name: token if isinstance(token, list) else str(token) for name, token in special.items()}
        self._process = Bounded(FUNCTION, "render", Bounds(SECONDS, MEMORY, MOST), processes)
        self._thread = threading.local()

    def close(self) -> None:
        """Let go of the processes."""
        self._process.close()

    def start(self) -> None:
        """Have a process that is ready, so that the first chat need not wait for it."""
        self._process.start()

    @contextmanager
    def within(self, seconds: float = SECONDS, most: int | None = None) -> Iterator[None]:
        """What this thread renders in the context takes so long at most, and has so many characters, all together.

        Raises:
            ConfigError: behind the context, where something in it took more, whatever became of its error there.

        """
        now = self._thread.now = _Chat(seconds, most)
        try:
            yield
            if now.error is not None:
                raise now.error
        finally:
            self._thread.now = None

    def renderer(self, template: str, name: str) -> Render:
        """What renders a template, which errors call by this name."""

        def render(messages: Sequence[Message], prompt: bool, going_on: bool) -> str:
            chat, tools = split_tools(messages)
            if not chat:
                raise ConfigError(f"{name} takes no empty chat")
            asked = {
                "template": template,
                "messages": [{key: value for key, value in one.items() if value is not None} for one in chat],
                "tools": tools,
                "prompt": prompt,
                "going_on": going_on,
                "special": self._special,
            }
            told = self._rendered(asked, name)
            if "refused" in told:
                raise ConfigError(f"{name} refuses these messages: {told['refused']}")
            return told["text"]

        return render

    def _rendered(self, asked: Mapping[str, Any], name: str) -> dict[str, str]:
        now: _Chat = getattr(self._thread, "now", None) or _Chat(SECONDS)
        if now.error is not None:  # what reached a bound once is not tried again
            raise now.error
        try:
            if now.left <= 0:
                raise BoundedError("time", f"it takes more than {now.seconds:g} s")
            found: dict[str, str] = self._process.call(asked, now.left, now.spend)
        except BoundedError as error:
            why = f"it takes more than {now.seconds:g} s" if error.why == "time" else error
            now.error = ConfigError(f"{name} cannot be rendered: {why}")
            raise now.error from None
        now.written += len(found.get("text", ""))
        if now.most is not None and now.written > now.most:
            now.error = ConfigError(f"{name} writes more than {now.most} characters for a few short chats")
            raise now.error
        return found


@final
class _Chat:
    """The time that one chat has left, what was written for it and how much that may be, and its error."""

    def __init__(self, seconds: float, most: int | None = None) -> None:
        self.seconds = self.left = seconds
        self.most, self.written = most, 0
        self.error: ConfigError | None = None

    def spend(self, seconds: float) -> None:
        self.left -= seconds
