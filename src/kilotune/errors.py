"""The error tree, and the helpers that make a message say what was expected and what to do next.

Every error is a :class:`KilotuneError` and a ``ValueError``, so both ``except KilotuneError`` and code
written against PEFT (which raises ``ValueError``) catch it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "KilotuneError",
    "MergeError",
    "MissingExtraError",
    "ResourceError",
    "StoreError",
    "StoreFullError",
    "StoreLimitError",
    "TargetError",
    "UnsupportedError",
    "did_you_mean",
    "faults_of",
    "first_line",
    "gather",
    "is_out_of_memory",
    "nearest",
]

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class KilotuneError(ValueError):
    """Base of all errors that kilotune raises on purpose."""


class ConfigError(KilotuneError):
    """A configuration key or value is wrong."""


class TargetError(KilotuneError):
    """The targets match nothing, or something that cannot be adapted."""


class UnsupportedError(KilotuneError):
    """A method, layer kind and storage do not fit together, or a feature is not there."""


class AdapterError(KilotuneError):
    """An adapter name is invalid, taken, or unknown."""


class MergeError(KilotuneError):
    """Merging or unmerging is not possible in the model's present state."""


class CheckpointError(KilotuneError):
    """A file is damaged, unsafe, or does not fit the model."""


class DivergedError(KilotuneError):
    """A training's loss stopped being a finite number."""


class ResourceError(KilotuneError):
    """Memory or disk space ran out; the message says which settings need less of it."""


class StoreError(KilotuneError):
    """An adapter store cannot be opened, read or written: not there, busy, damaged, read-only or closed.

    told: the same as the end of "the store ...", for whoever is not to know where the store is.
    """

    def __init__(self, message: str, told: str = "does not answer") -> None:
        super().__init__(message)
        self.told = told


class StoreFullError(StoreError):
    """The disk of an adapter store has no room: nothing was written, and what is there can be read."""


class StoreLimitError(StoreError):
    """What was asked is nothing that this store does, now or later: it is only read, or has no tags."""


class MissingExtraError(KilotuneError, ImportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'kilotune[{extra}]'")


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names among ``options`` that look most like ``name``, best first; may be empty.

    Nothing is near to what is no name by its length, or among very many: to look would take long.
    """
    unique = sorted(set(options))
    if len(name) > 500 or len(unique) > 5000:
        return []
    lowered = {option.lower(): option for option in unique}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.5)
    return [lowered[c] for c in close]


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest name, or the empty string when nothing is near."""
    close = nearest(name, options, 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_one_of(what: str, value: object, names: Iterable[str]) -> None:
    """Refuse a value that is none of ``names``, with the nearest one.

    Raises:
        ConfigError: it is not; ``what`` is how it is called.

    """
    listed = list(names)
    if value not in listed:
        raise ConfigError(f"{what}: expected one of {listed}, got {value!r}.{did_you_mean(str(value), listed)}")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the error's type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or the system had no memory, which PyTorch says on CPUs by a RuntimeError's words alone."""
    if isinstance(error, KilotuneError):
        return False
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # by name: no torch here
    return named or (isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY))


def without_network(error: BaseException, repo: str) -> str:
    """The first line of what the hub or its client says, and what to do where there is no network."""
    text = first_line(error)
    end = "" if text.endswith((".", "!", "?")) else "."
    return (
        f"{text}{end} Without a network, fetch it on another machine (hf download {repo} --local-dir FOLDER) and give "
        "the folder, or point HF_HOME at a cache that has it; HF_HUB_OFFLINE=1 asks no network"
    )


def type_name(value: object) -> str:
    """The full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def has_control(text: str) -> bool:
    """Whether there are surrogates, or characters that steer a terminal: C0, DEL, C1."""
    return any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in text)


def gather(headline: str, faults: Sequence[str], limit: int = 20) -> str:
    """One message for several faults: the headline, then one indented line per fault (at most ``limit``)."""
    shown = [f"  - {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        shown.append(f"  - ... and {len(faults) - limit} more")
    return "\n".join([headline, *shown])


def faults_of(error: BaseException) -> list[str]:
    """The faults in a message that :func:`gather` made, without its headline; of any other, the whole message."""
    lines = str(error).split("\n  - ")
    return lines[1:] or lines
