"""The tokenizer's files that an adapter brings, held against its base's.

A tokenizer of another kind gives other numbers to the same text, and tokens that the base does not have need rows of an
embedding. So an adapter's tokenizer is the base's, or it is told in what it is not. Equal is what gives equal tokens:
how the files are written, padding and truncation do not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, final

from ...adapter_files.own_files import json_object
from ...bounded import Bounded, BoundedError, Bounds
from ...errors import ConfigError

__all__ = ["BaseTokenizer"]

FUNCTION = Path(__file__).with_name("tokenizer_process.py")
BOUNDS = Bounds(seconds=10.0, memory=2**31, most=2**26)  # for files of many megabytes
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")  # a pad is never seen here
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens")
LISTS = ("additional_special_tokens", "extra_special_tokens")
KEPT = 256  # tokenizer.json that are known to be the base's


@final
class BaseTokenizer:
    """A base's tokenizer, of transformers, to which others are held. Of any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._process = Bounded(FUNCTION, "parts", BOUNDS)
        self._same: set[str] = set()
        self._lock = Lock()

    def close(self) -> None:
        """Let go of the process."""
        self._process.close()

    def check(self, files: Mapping[str, bytes]) -> None:
        """See that files of a tokenizer are the base's.

        Raises:
            ConfigError: they are not, or cannot be read; with the first few differences.

        """
        found = [*self._differences(files)]
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            told = f"{'; '.join(found[:3])}{more}"
            raise ConfigError(f"it brings a tokenizer that is not the base's, and only the base's is served: {told}")

    def _differences(self, files: Mapping[str, bytes]) -> Iterator[str]:
        if "tokenizer.json" in files:
            yield from self._of_file(files["tokenizer.json"])
        if "added_tokens.json" in files:
            for token, number in json_object("added_tokens.json", files["added_tokens.json"]).items():
                yield from self._of_token("added_tokens.json", token, number)
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if name in files:
                yield from self._of_settings(name, json_object(name, files[name]))

    def _of_file(self, data: bytes) -> Iterator[str]:
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in self._same:
            return
        if self._base is None:
            yield "tokenizer.json: the base has none"
            return
        theirs = self._parts(data.decode(errors="replace"))
        mine = self._base["added"]
        other = [(token, number) for token, number in theirs["added"].items() if mine.get(token) != number]
        found = [f"added_tokens: {token!r} ({number}) is {self._said(token)}" for token, number in other]
        lost = sorted({*mine} - {*theirs["added"]})
        found += [f"added_tokens: the base's {token!r} is not there" for token in lost]
        mine = self._base["sums"]
        keys = [key for key in sorted({*mine, *theirs["sums"]}) if mine.get(key) != theirs["sums"].get(key)]
        found += [f"{key} is another" for key in keys]
        yield from (f"tokenizer.json: {line}" for line in found)
        if not found:
            with self._lock:
                if len(self._same) >= KEPT:
                    self._same.clear()
                self._same.add(sha256)

    def _said(self, token: str) -> str:
        number = self._vocabulary.get(token)
        return "none of the base's" if number is None else f"{number} in the base"

    def _parts(self, text: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._process.call({"text": text})
        except BoundedError as error:
            raise ConfigError(f"tokenizer.json cannot be read: {error}") from None
        if "fault" in found:
            raise ConfigError(f"tokenizer.json cannot be read: {found['fault']}")
        return found

    @cached_property
    def _base(self) -> dict[str, Any] | None:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else self._parts(backend.to_str())

    @cached_property
    def _vocabulary(self) -> Mapping[str, int]:
        found: dict[str, int] = self._tokenizer.get_vocab()
        return found

    def _of_token(self, where: str, token: object, number: object) -> Iterator[str]:
        if not isinstance(token, str) or self._vocabulary.get(token) != number:
            yield f"{where}: {token!r} ({number}) is {self._said(str(token))}"

    def _of_settings(self, where: str, values: Mapping[str, Any]) -> Iterator[str]:
        for name in NAMED:
            mine = getattr(self._tokenizer, name, None)
            if (theirs := _text(values.get(name))) is not None and theirs != (None if mine is None else str(mine)):
                yield f"{where}: {name} is {theirs!r}, and {mine!r} in the base"
        special = {*map(str, self._tokenizer.all_special_tokens)}
        for name in LISTS:
            listed = values.get(name) or ()
            for token in map(_text, listed.values() if isinstance(listed, Mapping) else listed):
                if token is not None and token not in special:
                    yield f"{where}: {name}: {token!r} is none of the base's special tokens"
        decoder = values.get("added_tokens_decoder")
        for number, token in decoder.items() if isinstance(decoder, Mapping) else ():
            yield from self._of_token(where, _text(token), int(number) if str(number).isdecimal() else number)
        if where == "tokenizer_config.json":
            own = self._tokenizer.init_kwargs
            for name in FLAGS:
                mine, theirs = own.get(name), values.get(name)
                if theirs is not None and bool(theirs) != bool(getattr(self._tokenizer, name, mine)):
                    yield f"{where}: {name} is {theirs!r}, and {mine!r} in the base"


def _text(token: object) -> str | None:
    """A token as these files write it: as a text, or an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return None if token is None else str(token)
