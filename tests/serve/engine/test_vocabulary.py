"""The bytes of tokens, against what tokenizers decode."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

from kilotune.errors import ConfigError
from kilotune.serve.engine.vocabulary import SIGNS, named_bytes, token_bytes, widest_token
from tests.support.chat_tokenizers import byte_pairs, pieces
from tests.support.guided_support import tokenizer_of
from tests.support.http_support import tokenizer as words
from tests.support.serve_support import byte_tokenizer
from tests.support.train_data import corpus

TEXT = "a dög, naïve 水 🦊!"


def test_all_bytes_have_their_sign() -> None:
    assert {*SIGNS} == {*pre_tokenizers.ByteLevel.alphabet()}
    assert sorted(SIGNS.values()) == [*range(256)]
    assert [named_bytes(name) for name in ("<0x00>", "Ġa", "水", None)] == [[0], [32, 97], None, None]


KINDS: dict[str, Any] = {
    "pairs": byte_pairs,
    "bytes": byte_tokenizer,
    "unigram": lambda: pieces("unigram"),
    "llama": lambda: tokenizer_of("pieces"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_bytes_that_they_decode_to(kind: str) -> None:
    tokenizer = KINDS[kind]()
    found = token_bytes(tokenizer, len(tokenizer) + 3)
    assert len(found.tokens) == len(tokenizer) + 3
    before = tokenizer("a cat", add_special_tokens=False)["input_ids"]
    begun = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    for number in range(len(tokenizer)):
        after = tokenizer.decode([*before, number], clean_up_tokenization_spaces=False)[len(begun) :]
        if number in found.special:
            assert found.tokens[number] == b""
        else:
            assert found.tokens[number].decode(errors="replace") == after, tokenizer.convert_ids_to_tokens(number)


@pytest.mark.parametrize("kind", ["pairs", "llama"])
def test_parts_of_characters_join_to_the_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    found = token_bytes(tokenizer, len(tokenizer))
    for text in (TEXT, *corpus()[:5]):
        ids = tokenizer("a" + text, add_special_tokens=False)["input_ids"]
        joined = b"".join(found.tokens[number] for number in ids).decode()
        assert joined.removeprefix(" ") == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_tokenizer_that_does_not_say_its_bytes_is_refused() -> None:
    from tests.support.train_support import tokenizer

    made = tokenizer()
    made.backend_tokenizer.decoder = None
    with pytest.raises(ConfigError, match="does not say which bytes its tokens stand for \\(no decoder\\)"):
        token_bytes(made, 96)


def test_no_token_stands_for_more_than_the_widest() -> None:
    """NFC makes one character of four at most."""
    pairs = byte_pairs()
    longest = max(map(len, pairs.get_vocab()))
    assert widest_token(pairs) == 4 * longest
    for text in (TEXT, "<|im_start|>" * 9, "\u03b1\u0313\u0300\u0345" * 40, "a" * 500, " " * 500):
        assert len(text) <= 4 * longest * len(pairs(text)["input_ids"])
    pairs.backend_tokenizer.normalizer = normalizers.Sequence([])
    assert widest_token(pairs) == longest
    for change in (normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("ab", "a")):
        pairs.backend_tokenizer.normalizer = change
        assert widest_token(pairs) is None, "it may take characters away"


def test_what_may_leave_characters_out_has_no_widest_token() -> None:
    swallows = byte_pairs()
    swallows.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert widest_token(swallows) is None
    splits = byte_pairs()
    splits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    )
    assert widest_token(splits) is None
    for kind in ("unigram", "words"):
        made = pieces("unigram") if kind == "unigram" else words()
        assert widest_token(made) is None, "a word that is not known may be one token, however long it is"
