"""Who a user is to a service that learns: a word, and a model of their own by that word. Needs no torch."""

from __future__ import annotations

import re

from ...errors import AdapterError, ConfigError
from ...fleet.store.names import check_name, check_new_name

__all__ = ["LIVE", "PERSONAL", "check_user", "model_of", "without_user"]

PERSONAL = "personal"
OWN = re.compile(rf"{PERSONAL}:[^/'\"]*")
LIVE = "live"  # the alias of the version of a personal model that answers


def model_of(user: str) -> str:
    """What a user's own model is called in the store."""
    return f"{PERSONAL}:{user}"


def without_user(text: str) -> str:
    """A text for logs and metrics, which forgetting does not reach: every user's own model is "personal" in it."""
    return OWN.sub(PERSONAL, text) if f"{PERSONAL}:" in text else text


def check_user(user: object) -> str:
    """Return ``user`` if it can name a person, and a model of theirs.

    Raises:
        ConfigError: it cannot.

    """
    if not isinstance(user, str) or not user or user != user.strip():
        raise ConfigError(f"user: expected a word without blanks around it, got {user!r:.100}")
    try:
        if check_new_name(check_name(model_of(user))) != model_of(user):
            raise ConfigError(f"user {user!a:.200}: is not in Unicode's form NFC")
    except AdapterError as error:
        raise ConfigError(f"user {user!a:.200}: cannot be a part of a model's name: {error}") from None
    return user
