"""The demo's people out of a wheel like Django's: who is taken, which messages; catalogs are read as gettext does."""

from __future__ import annotations

import gettext
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kilotune.bases import wheels
from kilotune.errors import CheckpointError
from kilotune.experiments.people import django_teams
from kilotune.experiments.people.django_teams import teams, teams_of
from tests.support.people_support import catalog, django

LONG = "x" * 61
HEADER = "Language-Team: T (http)\nContent-Type: text/plain; charset=UTF-8\n"
HEADER = "Language-Team: T (http)\nContent-Type: text/plain; charset=UTF-8\n"
SENTENCES = {f"message number {n}": f"text number {n}" for n in range(3)}


def latin(letter: str) -> dict[str, str]:
    return {message: f"{letter} {text}" for message, text in SENTENCES.items()}


TEAMS = {
    "aa": (3, latin("a")),
    "bb": (9, {**latin("b"), "only in bb, not elsewhere": "b"}),
    "bb_XX": (12, latin("c")),  # the larger team of that language
    "cc": (20, dict.fromkeys(SENTENCES, "функция")),  # no Latin letters
    "dd": (2, latin("d")),
    "ee": (3, {**latin("e"), "one more message": "e"}),  # as many translators as aa, and more messages
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogs_are_read_as_gettext_reads_them(order: str) -> None:
    messages = {
        "": HEADER,
        "a word here": "ein Wort",
        "ctx\x04in context here": "x",
        "\u00fc": "\u00df",
    }
    data = catalog(messages, order)
    read = gettext.GNUTranslations(io.BytesIO(data))
    found = django_teams._entries(data)
    assert found == messages
    assert {key: read.gettext(key) for key in messages if key and "\x04" not in key} == {
        key: text for key, text in found.items() if key and "\x04" not in key
    }


def test_the_largest_teams_in_latin_script_one_a_language(tmp_path: Path) -> None:
    django(tmp_path / "w.whl", TEAMS)
    with zipfile.ZipFile(tmp_path / "w.whl") as packed:
        found = teams_of(packed, people=3)
        assert [voice.name for voice in found] == ["bb_XX", "ee", "aa"]
        assert found[0].people == tuple(f"BB_XX {n}" for n in range(12))  # and nobody of a later comment
        assert found[0].title == "Team bb_XX"
        for voice in found:
            assert set(voice.texts) == set(SENTENCES)  # what all three have put
        with pytest.raises(CheckpointError, match="expected 5 teams in Latin script, got 4"):
            teams_of(packed, people=5)


def test_only_plain_short_messages_of_one_line(tmp_path: Path) -> None:
    messages = {
        "three words here": "drei W\u00f6rter hier",
        "two words": "zwei W\u00f6rter",
        f"three words {LONG}": "zu lang",
        "three words again": LONG,
        "three words\nin lines": "in Zeilen",
        "three words more": "in\nZeilen",
        "one %d word\0many %d words": "ein\0viele",
        "ctx\x04three words here": "im Kontext",
        "three words empty": " ",
    }
    django(tmp_path / "w.whl", {"aa": (1, messages)})
    with zipfile.ZipFile(tmp_path / "w.whl") as packed:
        (voice,) = teams_of(packed, people=1)
    assert voice.texts == {"three words here": "drei W\u00f6rter hier"}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The package is a small one; what was downloaded is noted."""
    told: list[str] = []
    eight = {name: (n, latin(name)) for n, name in enumerate(("aa", "bb", "cc", "dd", "ee", "ff", "gg", "hh"), 1)}
    wheel = django(tmp_path / "w.whl", eight)

    def download(wanted: Any, what: str, into: Path) -> Path:
        told.append(wanted.requirement)
        into.mkdir()
        return Path(shutil.copy(tmp_path / "w.whl", into / "w.whl"))

    monkeypatch.setattr(wheels, "_download", download)
    monkeypatch.setattr(django_teams, "DJANGO", wheel)
    monkeypatch.setenv("KILOTUNE_CACHE", str(tmp_path / "cache"))
    return told


def test_they_are_fetched_once_and_kept_with_the_licence(tmp_path: Path, small: list[str]) -> None:
    first = teams()
    assert teams() == first
    assert small == ["django==5.2.19"]
    assert [voice.name for voice in first.people] == ["hh", "gg", "ff", "ee", "dd", "cc", "bb", "aa"]
    (folder,) = (path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir())
    assert (folder / "LICENSE").read_text() == "the licence's text"
    assert not list(folder.parent.glob("**/*.whl"))


def test_a_damaged_file_says_what_to_remove(tmp_path: Path, small: list[str]) -> None:
    teams()
    (file,) = (tmp_path / "cache").glob("data/*/voices.json")
    file.write_text("[" + " " * (file.stat().st_size - 1))  # of the same size, so that it looks whole
    with pytest.raises(CheckpointError, match="remove .*it is made anew"):
        teams()
