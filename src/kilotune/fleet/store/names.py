"""What can be a name, an alias, a tag, a namespace, metadata, a packing: checked at the door of every store.

The same in all of them. Needs no torch.
"""

from __future__ import annotations

import fnmatch
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from ...adapter_files.names import check_adapter_name, check_shown, composed
from ...errors import AdapterError, ConfigError, check_one_of, has_control

__all__ = [
    "PACKINGS",
    "SHARED",
    "check_alias",
    "check_limit",
    "check_metadata",
    "check_name",
    "check_namespace",
    "check_new_name",
    "check_new_word",
    "check_on",
    "check_packing",
    "check_tags",
    "check_which",
    "literal_prefix",
    "matches",
    "spellings",
]

PACKINGS = ("float32", "bfloat16", "int8")
"""How numbers are kept; packing.py says what each does."""

SHARED = "@shared"
"""The namespace of adapters that those of every namespace may stand on."""

MAX_METADATA = 65_536  # bytes of its JSON
MAX_TAGS = 64
MAX_WORD = 100  # bytes of an alias or a tag
NEWEST = "latest"
MAX_VERSION = 2**31 - 1


def _plain(text: object) -> object:
    """A text as exactly ``str``: a class derived from it could be one thing to us and another to a database."""
    return str.__str__(text) if isinstance(text, str) else text


def check_name(name: object) -> str:
    """The name of an adapter: it can name a folder too, so that every store can be exported."""
    return check_adapter_name(_plain(name))


def spellings(name: str) -> tuple[str, ...]:
    """How a name may stand in a store: as it is, in NFC, and in NFD, as names were kept that some systems split."""
    if name.isascii():
        return (name,)
    return tuple(dict.fromkeys((name, composed(name), unicodedata.normalize("NFD", name))))


def check_new_name(name: str) -> str:
    """A name that no adapter has yet, as it will be kept: in NFC, and what it shows."""
    return check_name(check_shown("adapter name", composed(name)))


def check_new_word(what: str, word: str) -> str:
    """A new alias or tag: what it shows, and in NFC."""
    if (right := composed(word)) != word:
        raise AdapterError(f"{what} {word!a}: is not in Unicode's form NFC; write it as {right!a}")
    return check_shown(what, word)


def check_namespace(namespace: object) -> str:
    """The name of a namespace: as that of an adapter."""
    try:
        return check_adapter_name(_plain(namespace))
    except AdapterError as error:
        raise AdapterError(str(error).replace("adapter name", "namespace", 1)) from None


def check_alias(alias: object) -> str:
    """An alias: a word that cannot be mistaken for a version's number."""
    word = _word("alias", alias)
    if word.isdecimal() or word == NEWEST:
        raise AdapterError(
            f"alias {word!r}: {'is a number, as versions are' if word != NEWEST else 'stands for the newest version'}; "
            "take another word, such as 'live'"
        )
    return word


def check_tags(tags: object) -> tuple[str, ...]:
    """Tags, sorted, each once."""
    if isinstance(tags, str) or not isinstance(tags, Sequence | set | frozenset):
        raise AdapterError(f"tags: expected a list of words, got {tags!r}")
    if len(tags) > MAX_TAGS:
        raise AdapterError(f"tags: at most {MAX_TAGS}, got {len(tags)}")
    return tuple(sorted({_word("tag", tag) for tag in tags}))


def _word(what: str, word: object) -> str:
    word = _plain(word)
    if not isinstance(word, str) or not word:
        raise AdapterError(f"{what}: expected a non-empty word, got {word!r}")
    size = len(word.encode(errors="replace"))
    if size > MAX_WORD or has_control(word):
        raise AdapterError(
            f"{what} {word!r}: at most {MAX_WORD} bytes in UTF-8 (got {size}), no control characters, no surrogates"
        )
    return word


def check_metadata(metadata: object) -> str:
    """The metadata as JSON text."""
    if metadata is None:
        return "{}"
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise AdapterError(f"metadata: expected a mapping with words as keys, got {metadata!r:.200}")
    try:
        text = json.dumps(dict(metadata), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise AdapterError(f"metadata: only what JSON can say: {error}") from None
    if size > MAX_METADATA:
        raise AdapterError(f"metadata: at most {MAX_METADATA} bytes of JSON, got {size}")
    return text


def check_which(version: object) -> int | str | None:
    """Which version: a number from 1, an alias, or None (also 'latest') for the newest."""
    version = _plain(version)
    if version is None or (isinstance(version, str) and version == NEWEST):
        return None
    if isinstance(version, bool) or not isinstance(version, int | str):
        raise AdapterError(f"version: expected a number, an alias or None (the newest), got {version!r}")
    if isinstance(version, str):
        return check_alias(version)
    version = int.__index__(version)
    if not 1 <= version <= MAX_VERSION:
        raise AdapterError(f"version: expected a number from 1, got {version}")
    return version


def check_on(on: object) -> tuple[str, int | str | None]:
    """What an adapter stands on: NAME (its newest version), NAME/3 or NAME/alias, as (name, which)."""
    text = _plain(on)
    if not isinstance(text, str):
        raise AdapterError(
            f"on: expected the name of a shared adapter, as in 'house-style' or 'house-style/3', got {on!r}"
        )
    name, slash, word = text.partition("/")
    if not slash:
        return check_name(name), None
    return check_name(name), check_which(int(word) if word.isdecimal() and word.isascii() and len(word) < 12 else word)


def check_limit(limit: object) -> int | None:
    """At most how many; None: all."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"limit: expected a whole number from 1, got {limit!r}")
    return min(limit, sys.maxsize)


def check_packing(packing: object) -> str:
    """The name of a packing."""
    check_one_of("packing", packing, PACKINGS)
    return str(packing)


def literal_prefix(pattern: object) -> str:
    """What every name that the pattern matches begins with; all do with the empty text."""
    if pattern is None:
        return ""
    if not isinstance(pattern, str):
        raise AdapterError(f"pattern: expected a name or a shell's pattern, got {pattern!r}")
    text = str(_plain(pattern))
    if has_control(text):
        raise AdapterError(f"pattern {text!r}: no control characters and no surrogates")
    return re.split(r"[*?\[]", text, maxsplit=1)[0]


def matches(pattern: str | None, names: Sequence[str]) -> Iterator[bool]:
    """Whether each name matches a shell's pattern, capitals and small letters being different."""
    if pattern is None:
        return iter([True] * len(names))
    match = re.compile(fnmatch.translate(pattern)).match
    return (match(name) is not None for name in names)
