"""How rows are split: by the seed, and held out of all where all have answered the same."""

from __future__ import annotations

from itertools import chain

import pytest

from kilotune.errors import ConfigError
from kilotune.experiments.people.library_authors import authors, others
from kilotune.experiments.people.settings import Sizes
from kilotune.experiments.people.voices import Pair, Rows, Voice, Voices, split

SIZES = Sizes(train=5, validation=2, test=3)


def voices(common: bool) -> Voices:
    people = [
        Voice(name, name, (), {f"prompt {n}": f"{name}{n}" for n in range(10 + extra)})
        for name, extra in (("a", 0), ("b", 2))
    ]
    return Voices("", "", "", "", "", "", "", common, tuple(people))


def asked(rows: tuple[Pair, ...]) -> list[str]:
    return [pair.asked for pair in rows]


def parts(rows: Rows) -> list[list[str]]:
    return [asked(rows.train), asked(rows.validation), asked(rows.test)]


def test_common_prompts_are_held_out_of_all() -> None:
    found = split(voices(True), SIZES, 0)
    assert parts(found["a"]) == parts(found["b"])
    assert [len(part) for part in parts(found["a"])] == [5, 2, 3]
    assert sorted(chain(*parts(found["a"]))) == sorted(f"prompt {n}" for n in range(10))
    assert all(pair.said == pair.asked.replace("prompt ", "b") for pair in found["b"].test)


def test_the_seed_decides_and_nothing_else() -> None:
    assert split(voices(True), SIZES, 3) == split(voices(True), SIZES, 3)
    assert parts(split(voices(True), SIZES, 3)["a"]) != parts(split(voices(True), SIZES, 4)["a"])


def test_without_common_prompts_each_has_its_own() -> None:
    found = split(voices(False), SIZES, 0)
    assert parts(found["a"]) != parts(found["b"])
    for rows in found.values():
        assert len(set(chain(*parts(rows)))) == 10


def test_too_few_rows_are_told_with_whose_they_are() -> None:
    with pytest.raises(ConfigError, match=r"a: expected at least 11 rows \(6 to train on, .* got 10"):
        split(voices(True), Sizes(6, 2, 3), 0)


def test_the_standard_library_has_eight_authors_and_others() -> None:
    found = authors()
    assert len(found.people) == 8
    for voice in found.people:
        assert len(voice.texts) > 300
        assert all(12 <= len(line) <= 60 for pair in voice.texts.items() for line in pair)
    assert not any(voice.name[0] == "_" for voice in found.people)
    text = others()
    assert sum(map(len, text)) > 100_000
    assert "class Textdoc" not in "".join(text)  # pydoc's, one of the eight
