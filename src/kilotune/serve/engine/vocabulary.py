"""The bytes that the tokens of a vocabulary stand for, by the vocabulary itself.

Two kinds are known. Vocabularies made of bytes (GPT-2's) write each byte as a sign; SentencePiece's write a blank as
``▁``, and bytes that are no characters as ``<0xF0>``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, final

from ...errors import ConfigError

__all__ = ["TokenBytes", "named_bytes", "token_bytes"]

NAMED = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that stand for themselves
SIGNS = {chr(byte): byte for byte in PRINTED} | {
    chr(0x100 + place): byte for place, byte in enumerate(sorted({*range(0x100)} - {*PRINTED}))
}
"""Sign -> byte, in the vocabularies that are made of bytes, as GPT-2's is."""


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
