"""What tells a namespace's cached prompts from those of before somebody was forgotten."""

from __future__ import annotations

import threading
from typing import final

__all__ = ["CacheWords"]


@final
class CacheWords:
    """A word for each namespace, which is a part of what its cached prompts are known by. From any thread."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def forget(self, namespace: str) -> None:
        """From now on no request goes on from what was computed of earlier ones; their room is used again."""
        with self._lock:
            self._counts[namespace] = self._counts.get(namespace, 0) + 1

    def of(self, namespace: str) -> bytes:
        """The word that there is now."""
        return str(self._counts.get(namespace, 0)).encode()
