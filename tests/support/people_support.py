"""For the tests of the demo: catalogs and a wheel like Django's, a result that was not computed, a run of seconds."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kilotune.bases import Wheel
from kilotune.experiments.people.measuring import BASE, Answers
from kilotune.experiments.people.results import PeopleResult, Person, Question
from kilotune.experiments.people.settings import QUICK, PeopleSettings, Sizes
from kilotune.experiments.people.training import SHARED, Trained
from kilotune.fleet import UserReport

NAMES = tuple("abcdefgh")


def catalog(messages: Mapping[str, str], order: str = "<") -> bytes:
    """A .mo file, by the description in GNU gettext's manual: two tables, sorted, then the strings."""
    entries = sorted((key.encode(), text.encode()) for key, text in messages.items())
    begin = 28 + 16 * len(entries)
    tables, strings = [b"", b""], b""
    for which in (0, 1):
        for entry in entries:
            tables[which] += struct.pack(f"{order}2I", len(entry[which]), begin + len(strings))
            strings += entry[which] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, begin)
    return head + tables[0] + tables[1] + strings


def django(path: Path, teams: Mapping[str, tuple[int, Mapping[str, str]]]) -> Wheel:
    """A wheel with catalogs of teams: name -> (translators, messages); each text is the same in all of its files."""
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("django-5.2.19.dist-info/licenses/LICENSE", "the licence's text")
        packed.writestr("django/conf/locale/README.mo", b"no catalog")
        for team, (translators, messages) in teams.items():
            folder = f"django/conf/locale/{team}/LC_MESSAGES"
            names = "".join(f"# {team.upper()} {n} <{n}@example.org>, 2011-2013\n" for n in range(translators))
            packed.writestr(f"{folder}/django.po", f'# Of Django.\n#\n{names}msgid ""\nmsgstr ""\n# Nobody, 2012\n')
            header = f"Project-Id-Version: django\nLanguage-Team: Team {team} (http://example.org)\n"
            packed.writestr(f"{folder}/django.mo", catalog({"": header, **messages}))
            packed.writestr(f"django/contrib/admin/locale/{team}/LC_MESSAGES/djangojs.mo", catalog({"": header}))
    return Wheel("django==5.2.19", hashlib.sha256(path.read_bytes()).hexdigest(), "BSD-3-Clause",
                 "django-5.2.19.dist-info/licenses/LICENSE")  # fmt: skip


def tiny(seed: int = 0) -> PeopleSettings:
    """A run of seconds, which learns little."""
    few = replace(QUICK.personal, epochs=2, rank=8)
    return replace(QUICK, sizes=Sizes(8, 2, 3), shared=replace(QUICK.shared, epochs=1), personal=few, questions=2,
                   longest=4, seed=seed)  # fmt: skip


def result(own: float = 2.0, other: float = 3.2, shared: float = 3.0, base: float = 5.0) -> PeopleResult:
    """Losses of everybody's text: under one's own adapter (a little more each), another's, the shared one, no one."""
    losses = {BASE: dict.fromkeys(NAMES, base), SHARED: dict.fromkeys(NAMES, shared)}
    losses |= {
        name: {text: own + 0.01 * NAMES.index(name) if text == name else other for text in NAMES} for name in NAMES
    }

    def trained(names: tuple[str, ...], curve: tuple[tuple[int, Mapping[str, float]], ...] = ()) -> Trained:
        told = tuple(UserReport(name, "done", 2, (4.0, 3.0), ((1, 3.5), (2, 3.1)), 2, None, 4.5, 3.1) for name in names)
        return Trained(told, 8.0, curve)

    return PeopleResult(
        settings=QUICK,
        text={"source": "a <source>", "licence": "MIT", "kind": "person", "rule": "all", "task": "a line"},
        base={"title": "a base", "licence": "MIT", "numbers": 1000, "bytes": 4000},
        numbers={SHARED: 100, "a": 10},
        shared_bytes=400,
        people=tuple(Person(name, f"Title {name}", (f"Author of {name}",), 40) for name in NAMES),
        shared=trained((SHARED,), ((1, {SHARED: 4.0}), (2, {SHARED: 3.0}))),
        personal=trained(NAMES),
        losses=losses,
        alone=1e-7,
        questions=(Question("what <is> it?", {name: f"{name} wrote" for name in NAMES}),),
        answers=Answers({name: [f"{name} says"] for name in losses}, 30, 2.0),
        seconds={"in all": 20.0},
        faults=(),
        trained_now=True,
        versions={"torch": "2"},
    )
