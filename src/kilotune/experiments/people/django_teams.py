"""Text of people who differ: the messages of Django, as its teams of translators put them.

Each team has put the same English messages into its language, in its own words. Which teams, and which messages,
is decided by rules that look at no row's text but its length and its script.
"""

from __future__ import annotations

import json
import re
import struct
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...bases import Wheel, cache_folder, made, opened
from ...errors import CheckpointError
from .voices import Voice, Voices

__all__ = ["DJANGO", "teams", "teams_of"]

DJANGO = Wheel(
    requirement="django==5.2.19",
    sha256="5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    licence="BSD-3-Clause",
    licence_member="django-5.2.19.dist-info/licenses/LICENSE",
)
FOLDER = "django-5.2.19-voices-1"  # another number where the file's form or the rules change
FILE = "voices.json"
NEEDED = 12_000_000
CATALOG = re.compile(r"django/(?:conf|contrib/\w+)/locale/(\w+)/LC_MESSAGES/(?:django|djangojs)\.(mo|po)")
TRANSLATOR = re.compile(r"# ([^,<]+?)(?: <[^>]*>)?, ?\d{4}")
LONGEST, WORDS = 60, 3
LATIN = 0.95
MAGIC = b"\xde\x12\x04\x95"
NOT_PLAIN = ("\x00", "\x04")  # between a message and its plural, and between a context and its message

RULE = (
    "the {people} teams whose files name the most translators, one for each language, of those who write in Latin "
    f"script; messages of one line, at least {WORDS} words and at most {LONGEST} characters, which all {{people}} have "
    "put in at most as many, without plural forms and contexts"
)
IN_WORDS = {8: "eight", 10: "ten"}


def teams(people: int = 8) -> Voices:
    """Teams of Django's translators, out of the cache; the package is downloaded by pip where it is not there.

    Raises:
        ConfigError, CheckpointError, ResourceError: it cannot be had, as :func:`~kilotune.bases.opened` says.
        CheckpointError: there are not so many teams in Latin script.

    """
    folder = cache_folder() / "data" / (FOLDER if people == 8 else f"{FOLDER}-of-{people}")

    def make(out: Path) -> dict[str, Any]:
        with opened(DJANGO, f"the text of the demo ({DJANGO.requirement})", out, NEEDED) as packed:
            found = teams_of(packed, people)
        text = json.dumps([asdict(voice) for voice in found], ensure_ascii=False, indent=1)
        (out / FILE).write_text(text + "\n", encoding="utf-8")
        return {"title": "messages of Django, as its translators put them", **DJANGO.known()}

    made(folder, make)
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        found = [Voice(one["name"], one["title"], tuple(one["people"]), one["texts"]) for one in told]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / FILE} is damaged ({error}); remove {folder}, and it is made anew") from error
    return Voices(
        source=f"the translations in {DJANGO.requirement.replace('==', ' ')}, a package of the Python package index",
        licence=DJANGO.licence,
        kind="team of translators",
        rule=RULE.format(people=IN_WORDS.get(people, people)),
        task="the English message, and how this team has put it",
        after=" =",
        lead=" ",  # a tokenizer has words with the blank before them
        common=True,
        people=tuple(found),
    )


# -- who -------------------------------------------------------------------------------------------------


def teams_of(packed: zipfile.ZipFile, people: int = 8) -> list[Voice]:
    """The teams of a Django wheel that the rule takes, the largest first, with the messages that all of them have.

    Raises:
        CheckpointError: it has fewer such teams.

    """
    texts: dict[str, dict[str, str]] = {}
    titles: dict[str, str] = {}
    named: dict[str, dict[str, None]] = {}
    for member in sorted(packed.namelist(), key=lambda name: (not name.startswith("django/conf/"), name)):
        if (found := CATALOG.fullmatch(member)) is None:
            continue
        team, kind = found.groups()
        if kind == "po":
            named.setdefault(team, {}).update(dict.fromkeys(_translators(packed.read(member).decode("utf-8"))))
            continue
        info, messages = _messages(packed.read(member))
        titles.setdefault(team, info.get("language-team", team).partition(" (http")[0])
        for message, text in messages.items():
            texts.setdefault(team, {}).setdefault(message, text)
    chosen = _chosen({team: (len(named.get(team, ())), own) for team, own in texts.items()}, people)
    common = [message for message in texts[chosen[0]] if all(message in texts[team] for team in chosen)]
    return [
        Voice(team, titles[team], tuple(named[team]), {message: texts[team][message] for message in common})
        for team in chosen
    ]


def _messages(catalog: bytes) -> tuple[dict[str, str], dict[str, str]]:
    """(what the header of a .mo file says, the plain messages in it)."""
    entries = _entries(catalog)
    header = (line.partition(":") for line in entries.pop("", "").splitlines())
    plain = {
        message: text.strip()
        for message, text in entries.items()
        if not any(mark in message for mark in NOT_PLAIN) and _short(message, WORDS) and _short(text.strip(), 1)
    }
    return {key.lower(): value.strip() for key, _, value in header}, plain


def _entries(catalog: bytes) -> dict[str, str]:
    """Everything in a file of GNU gettext's binary form: two tables of (length, place), of messages and of texts."""
    order = "<" if catalog[:4] == MAGIC else ">"
    count, messages, texts = struct.unpack_from(f"{order}3I", catalog, 8)

    def at(table: int, number: int) -> str:
        length, place = struct.unpack_from(f"{order}2I", catalog, table + 8 * number)
        return catalog[place : place + length].decode("utf-8")

    return {at(messages, number): at(texts, number) for number in range(count)}


def _short(text: str, words: int) -> bool:
    one_line = text == text.strip() and len(text.splitlines()) == 1
    return one_line and len(text) <= LONGEST and len(text.split()) >= words


def _translators(catalog: str) -> Iterable[str]:
    """Who is named in the comment that a .po file begins with."""
    for line in catalog.splitlines():
        if not line.startswith("#"):
            return
        if found := TRANSLATOR.match(line):
            yield found[1]


def _chosen(teams: Mapping[str, tuple[int, Mapping[str, str]]], people: int) -> list[str]:
    """The largest teams in Latin script, one for each language; of equal ones that with more messages, then by name."""
    ranked = sorted(teams, key=lambda team: (-teams[team][0], -len(teams[team][1]), team))
    chosen: dict[str, str] = {}
    for team in ranked:
        if _latin(teams[team][1].values()) >= LATIN:
            chosen.setdefault(team.partition("_")[0], team)
    if len(chosen) < people:
        raise CheckpointError(f"{DJANGO.requirement}: expected {people} teams in Latin script, got {len(chosen)}")
    return list(chosen.values())[:people]


def _latin(texts: Iterable[str]) -> float:
    """The part of the letters that is Latin."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum("LATIN" in unicodedata.name(letter, "") for letter in letters) / max(1, len(letters))
