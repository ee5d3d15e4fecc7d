"""The bytes that the tokens of a vocabulary stand for, by the vocabulary itself.

Two kinds are known. Vocabularies made of bytes (GPT-2's) write each byte as a sign; SentencePiece's write a blank as
``▁``, and bytes that are no characters as ``<0xF0>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

from ...errors import ConfigError

__all__ = ["TokenBytes", "named_bytes", "token_bytes", "widest_token"]

NAMED = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that stand for themselves
SIGNS = {chr(byte): byte for byte in PRINTED} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted({*range(0x100)} - {*PRINTED}))
}
"""Sign -> byte, in the vocabularies that are made of bytes, as GPT-2's is."""
JOINS = 4  # characters that NFC makes one of, at most
KEEPS = ("Sequence", "ByteLevel", "Digits", "Metaspace", "NFC", "Prepend", "Punctuation", "Replace", "Split")
"""Parts of a tokenizer that take nothing of a text away, but for what :func:`_shortens` looks at."""


@final
class TokenBytes(NamedTuple):
    """tokens: the bytes of each token; none of what is no text. special: the tokens that are marks, and no text."""

    tokens: list[bytes]
    special: dict[int, str]


def named_bytes(name: str | None) -> list[int] | None:
    """The bytes of a token that is no text by itself, by what vocabularies call it: ``<0xF0>``, or a sign a byte."""
    if name is None:
        return None
    if (one := NAMED.fullmatch(name)) is not None:
        return [int(one[1], 16)]
    found = [SIGNS.get(sign) for sign in name]
    return None if None in found else [byte for byte in found if byte is not None]


def token_bytes(tokenizer: Any, size: int) -> TokenBytes:
    """The bytes of the tokens 0 ... size - 1 of a tokenizer of transformers.

    Raises:
        ConfigError: it does not say which bytes its tokens stand for.

    """
    kinds = _decoders(tokenizer)
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise ConfigError(
            f"this model's tokenizer does not say which bytes its tokens stand for ({', '.join(sorted(kinds)) or 'no'} "
            "decoder); one made of bytes (ByteLevel) or SentencePiece's (Metaspace, ByteFallback) does"
        )
    signs, named = "ByteLevel" in kinds, "ByteFallback" in kinds
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    special = {number: token.content for number, token in added.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    found = [b""] * size
    for name, number in backend.get_vocab(with_added_tokens=True).items():
        if number < size and number not in special:
            found[number] = _signed(name) if signs else _piece(name, named and number not in added)
    return TokenBytes(found, {number: name for number, name in special.items() if number < size})


def widest_token(tokenizer: Any) -> int | None:
    """The most characters of a text that one token stands for, so that a text of more needs two.

    None: nobody can say so. A word that is not known may be one token however long it is, and blanks may be left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    given = [part for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    parts = [*_parts([json.loads(part.__getstate__()) for part in given])]
    names = backend.get_vocab(with_added_tokens=True)
    signs = any(part["type"] == "ByteLevel" for part in parts) and names.keys() >= SIGNS.keys()
    named = backend.model.byte_fallback and names.keys() >= {f"<0x{byte:02X}>" for byte in range(256)}
    strips = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if not (signs or named) or strips or any(map(_shortens, parts)):
        return None
    return max(map(len, names)) * (JOINS if any(part["type"] == "NFC" for part in parts) else 1)


def _parts(given: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Parts of a tokenizer, and those that they are made of."""
    for one in given:
        yield one
        yield from _parts([*one.get("normalizers", ()), *one.get("pretokenizers", ())])


def _shortens(part: dict[str, Any]) -> bool:
    """Whether a part may take characters out of a text, but for what NFC joins."""
    replaced = len(part.get("pattern", {}).get("String", "")) if part["type"] == "Replace" else 0
    pattern = part["type"] == "Replace" and "String" not in part["pattern"]
    removes = part.get("behavior") == "Removed" or pattern or replaced > len(part.get("content", ""))
    return removes or part["type"] not in KEEPS


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of a fast tokenizer's decoders."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    return {*_kinds([json.loads(backend.decoder.__getstate__())])}


def _kinds(decoders: Sequence[dict[str, Any]]) -> list[str]:
    return [kind for one in decoders for kind in (one["type"], *_kinds(one.get("decoders", ())))]


def _signed(name: str) -> bytes:
    found = [SIGNS.get(sign) for sign in name]
    return name.encode() if None in found else bytes(byte for byte in found if byte is not None)


def _piece(name: str, named: bool) -> bytes:
    if named and (one := NAMED.fullmatch(name)) is not None:
        return bytes([int(one[1], 16)])
    return name.replace("\u2581", " ").encode()
