"""One JSON object a line on stderr: each request, and what happens to the service. No prompt and no answer is in it."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import sys
from datetime import UTC, datetime
from typing import Any, final

from ..learning.users import without_user

__all__ = ["JsonLines", "log", "pseudonym", "set_up"]

NAME = "kilotune.serve"
logger = logging.getLogger(NAME)
_key = secrets.token_bytes(32)


@final
class JsonLines(logging.Formatter):
    """A record as one line of JSON; ``extra={"fields": {...}}`` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log(event: str, *, level: int = logging.INFO, failed: BaseException | None = None, **fields: Any) -> None:
    """Write one line. failed: an error whose traceback goes with it."""
    fields = {name: without_user(value) if isinstance(value, str) else value for name, value in fields.items()}
    trace = None if failed is None else (type(failed), failed, failed.__traceback__)
    logger.log(level, event, exc_info=trace, extra={"fields": fields})


def pseudonym(user: str | None) -> str | None:
    """What a log calls a user: the same for as long as the process lives, and of no use to who has the log alone."""
    if user is None:
        return None
    found = hashlib.blake2b(user.encode(errors="surrogatepass"), key=_key, digest_size=8)
    return f"u-{found.hexdigest()}"


def set_up() -> None:
    """Let the service and its HTTP server write to stderr in this form, and nowhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in ((NAME, logging.INFO), ("uvicorn.error", logging.WARNING)):
        one = logging.getLogger(name)
        one.handlers, one.propagate = [handler], False
        one.setLevel(level)
