"""Regular expressions of configurations: matched as ``re`` does, in bounded time, and without holding others up."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kilotune import patterns
from kilotune.name_rules import at_end, begins, ends, ends_so, first_at_end, fits, group, named
from kilotune.patterns import PatternError, at_most, fault, found, looked_at, matching
from tests.support.paths import ROOT

NAMES = [
    "",
    "lm_head",
    "model.embed_tokens",
    *[
        f"model.layers.{i}.{part}"
        for i in (0, 1, 10)
        for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
    ],
    "vision.layers.0.self_attn.q_proj",
    "Model.Layers.1.Q_PROJ",
    "aaaaab",
    "größe.0.x",
]
PATTERNS = [
    r".*\.(q|v)_proj",
    r"model\.layers\.\d+\..*_proj",
    r"^(?!.*vision).*q_proj$",
    r"(?=.*layers)(?=.*\.1\.).*",
    r".*(?<!self_attn)\.\w+_proj",
    r".*(?<=\.)q_proj",
    r"(?P<stem>\w+)\..*",
    r"(a)\1*b",
    r"(?:(a)|m).*(?(1)b|d)",
    r"(?i)model\.layers\.1\.q_proj",
    r"(?i:MODEL)\.layers\..*",
    r"(?s:.*)head",
    r"(?x) model \. .* # a comment",
    r"a++b",
    r"(?>a+)b",
    r"a{2,5}b",
    r"a{,3}",
    r".*?\.(?:[0-9]|10)\..*?",
    r"\w+\Z",
    r"gr\u00f6\xdfe.*",
    r"größe\.\d\.x",
    r"(?:model|vision)(?:\.\w+)*",
    r"((\w+)\.)*q_proj",
    r"",
    r"|lm_head",
    r"[^.]*",
    r"(?!)",
]
EVIL = [
    r"(([a-z._0-9])+)+q_pro",
    r"(.+)+,",
    r"(.*)*,",
    r"(\w+\.?)+!",
    r"(.|\w)*(\w|.)*!",
    r"(?=(.+)+!)x",
    r"^(?!(.+)+!)q$",
    r"(.*){1,60}!",
    r".*.*.*.*.*.*.*.*.*.*.*.*!",
    "(?:.|.)" * 30 + "!",
    r"(?:(?:(?:.?.?)?)?.)+!",
    r"(x+x+)+y|(.+.+)+,",
    r"(.+)+\1,",
]
LONG = [f"model.language_model.layers.{i}.self_attn.q_proj.base_layer" for i in range(40)]


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is matched in this process."""
    monkeypatch.setattr(patterns, "FEW", -1)


def by_re(how: str, pattern: str, name: str) -> tuple[str | None] | None:
    made = getattr(re, how)(pattern, name)
    return None if made is None else (made.group(made.re.groups),)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("how", ["fullmatch", "match"])
def test_what_matches_is_what_matches_in_re(pattern: str, how: str) -> None:
    with matching(names=lambda: NAMES):
        assert [found(how, pattern, name) for name in NAMES] == [by_re(how, pattern, name) for name in NAMES]


@pytest.mark.usefixtures("everywhere")
def test_what_matches_in_a_process_of_its_own_is_what_matches_in_re() -> None:
    for i, pattern in enumerate(PATTERNS):
        how = ("fullmatch", "match")[i % 2]
        with matching(names=lambda: NAMES):
            assert [found(how, pattern, name) for name in NAMES] == [by_re(how, pattern, name) for name in NAMES]
    assert found("match", "(a)|b", "b") == (None,), "a group that takes no part"
    assert found("fullmatch", ".", "\ud800") == ("\ud800",)


def made_up(chance: random.Random, depth: int = 3) -> str:
    """A pattern of everything that patterns are made of."""
    if depth == 0 or chance.random() < 0.3:
        return chance.choice(["a", "b", r"\.", ".", r"\w", "[ab]", "[^a]", r"\b", "^", "$", "layers", r"\d"])
    inner = made_up(chance, depth - 1)
    return chance.choice(
        [
            f"{inner}{made_up(chance, depth - 1)}",
            f"(?:{inner}|{made_up(chance, depth - 1)})",
            f"({inner})",
            f"(?:{inner})*",
            f"(?:{inner})+?",
            f"(?:{inner})?",
            f"(?:{inner}){{1,3}}",
            f"(?={inner})",
            f"(?!{inner})",
            f"(?>{inner})",
            f"({inner})?(?(1)a|b)" if "(1)" not in inner and "(" not in inner.replace("(?", "") else inner,
        ]
    )


def test_made_up_patterns_match_as_in_re_and_take_no_more_ways_than_is_thought() -> None:
    chance, texts, here = random.Random(3), ["", "a", "ab.layers.1", "aab.b.layers.10.ab"], 0
    for _ in range(3000):
        pattern = made_up(chance)
        try:
            re.compile(pattern)
        except re.error:
            assert fault(pattern) is not None
            continue
        for text in texts:
            if at_most(looked_at(pattern), len(text)) <= patterns.FEW:
                here += 1
                assert found("fullmatch", pattern, text) == by_re("fullmatch", pattern, text), pattern
    assert here > 5000


def test_plain_patterns_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a process")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    listed = "|".join(re.escape(name) for name in LONG * 3)
    for pattern in (r".*\.(q|v)_proj", r"^(?!.*vision).*\.layers\.\d+\.self_attn\.q_proj", r".*layers.*attn.*", listed):
        assert fault(pattern) is None
        for name in NAMES:
            assert fits("target_modules", pattern, name) == (re.fullmatch(pattern, name) is not None)


# -- an end ------------------------------------------------------------------------------------------


def stopped(call: Callable[[], Any], seconds: float) -> str:
    began = time.monotonic()
    with pytest.raises(PatternError) as told:
        call()
    assert time.monotonic() - began < 3 * seconds + 1
    return str(told.value)


def all_of(pattern: str, seconds: float) -> None:
    with matching(seconds, lambda: LONG):
        for name in LONG:
            found("fullmatch", pattern, name)


@pytest.mark.parametrize("pattern", EVIL)
def test_patterns_without_end_are_ended(pattern: str) -> None:
    told = stopped(lambda: all_of(pattern, 0.3), 0.3)
    assert "takes too long: what a configuration has may take 0.3 s to match, all together" in told
    assert repr(pattern[:200]) in told


def test_others_go_on_meanwhile_and_any_thread_may_match() -> None:
    """``re`` would hold the interpreter's lock."""
    longest, told = 0.0, list[str]()
    thread = threading.Thread(target=lambda: told.append(stopped(lambda: all_of(EVIL[0], 1.0), 1.0)))
    thread.start()
    last = time.monotonic()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert told
    assert longest < 0.5


def test_one_match_here_is_short() -> None:
    """What is matched in this process is bounded by the ways that there may be."""
    name = "a" * 60
    for pattern in (
        ".*.*.*x",
        "(?:a|a)" * 17,
        "(?:a|a)" * 11 + "a*x",
        ".*?.*?.*?x",
        "(?:a?){16}b",
        "[^.]*[^.]*[^.]*x",
        "(?=.*.*.*x)a",
    ):
        assert at_most(looked_at(pattern), len(name)) <= patterns.FEW
        began = time.perf_counter()
        assert not fits("f", pattern, name)
        assert time.perf_counter() - began < 0.25, pattern


def test_many_patterns_have_one_time() -> None:
    """10,000 of them, each short."""

    def many() -> None:
        with matching(0.3, lambda: NAMES):
            for i in range(10_000):
                for name in LONG:
                    found("match", rf"(.*\.)?(layers.*{i}.*x)$", name)

    assert "takes too long" in stopped(many, 0.3)


def test_the_outer_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with matching(0.2), pytest.raises(PatternError, match=r"may take 0.2 s"), matching(60.0):
        found("fullmatch", EVIL[0], LONG[0])
    monkeypatch.setattr(patterns, "LIMIT", 0.2)
    with pytest.raises(PatternError, match=r"may take 0.2 s"):
        found("fullmatch", EVIL[0], LONG[0])


def test_each_pattern_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, own = list[int](), subprocess.Popen

    def counted(*given: Any, **more: Any) -> Any:
        runs.append(1)
        return own(*given, **more)

    monkeypatch.setattr(subprocess, "Popen", counted)
    with matching(names=lambda: NAMES):
        for _ in range(2):
            with matching(names=lambda: NAMES[:3]):
                taken = [name for name in NAMES if fits("f", r"(?:\w+\.)*q_proj", name)]
    assert taken == [name for name in NAMES if re.fullmatch(r"(?:\w+\.)*q_proj", name)]
    assert len(runs) <= 1 + len(NAMES) - 3


@pytest.mark.parametrize(
    "pattern", ["(" * 6, "(?P<a>x)(?P<a>y)", "a**", "(?<=a+)b", "\\", "[a", "(?z)", "x{2,1}", "(" * 30_000]
)
def test_what_is_no_pattern_is_told(pattern: str, request: pytest.FixtureRequest) -> None:
    assert fault(pattern)
    request.getfixturevalue("everywhere")
    with pytest.raises(PatternError, match="cannot be matched"):
        found("fullmatch", pattern, "x")


def test_a_pattern_that_takes_memory_without_end_is_ended() -> None:
    with matching(1.0), pytest.raises(PatternError, match="takes too"):
        fault("(?i)" + "[\u0100-\uffff]" * 900_000)


def test_where_no_process_can_be_started_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python/here")
    with pytest.raises(PatternError, match="it needs a process of its own, which cannot be started"):
        found("fullmatch", r"(?:\w+\.)*q_proj", "a.q_proj")
    assert found("fullmatch", r".*q_proj", "a.q_proj") is not None


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_no_process_goes_on_when_its_parent_was_killed() -> None:
    code = f"from kilotune.patterns import *\nwith matching(1.5): found('fullmatch', {EVIL[0]!r}, {LONG[0]!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "src")})
    child = first(lambda: next(iter(children(parent.pid)), None))
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert first(lambda: child if not alive(child) else None, 10) == child


def children(pid: int) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if int(status[1]) == pid and b"pattern_process" in command:
                yield int(folder.name)


def alive(pid: int) -> bool:
    try:
        return b"pattern_process" in (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False


def first(get: Callable[[], int | None], seconds: float = 20.0) -> int:
    until = time.monotonic() + seconds
    while (value := get()) is None:
        assert time.monotonic() < until, "it does not come to that"
        time.sleep(0.01)
    return value


# -- rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 5000])
def test_lists_take_names_by_their_ends(size: int) -> None:
    """Long lists are looked up, which is the same."""
    chance = random.Random(size)
    parts = [f"{chance.choice('abc')}{chance.choice(['', 'x', 'yz'])}" for _ in range(20)]
    listed = tuple(".".join(chance.choices(parts, k=chance.randint(1, 3))) for _ in range(size))
    with matching():
        for _ in range(200):
            name = ".".join(chance.choices(parts, k=chance.randint(1, 5)))
            assert named(listed, name) == any(name == one or name.endswith(f".{one}") for one in listed)
            assert ends_so(listed, name) == any(name.endswith(one) for one in listed)
    assert list(ends("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert not named((), "a")
    assert not ends_so((), "a")


@pytest.mark.parametrize("plain", [True, False])
def test_patterns_of_ranks_fit_as_in_peft(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``re.match(rf"(.*\\.)?({pattern})$", name)``; what is a name in truth needs no expression for that."""
    if not plain:
        monkeypatch.setattr(patterns, "plain", lambda pattern: None)
    chance, fitting = random.Random(7), 0
    parts = ["a", "b", "ab", "a_1", "q-x", "0", "10"]
    for _ in range(4000):
        name = ".".join(chance.choices(parts, k=chance.randint(1, 4)))
        pattern = chance.choice([".", r"\.", ".", "..", ""]).join(chance.choices(parts, k=chance.randint(1, 3)))
        pattern = chance.choice(["", "", "^", ".", r"\."]) + chance.choice([pattern, re.escape(name), name[1:] or "a"])
        wanted = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert at_end("rank_pattern", pattern, name) == wanted, (pattern, name)
        fitting += wanted
    assert 500 < fitting < 3500
    values = {"^b": 1, r".*\.q": 2, "q": 3, "x": 4}
    assert [first_at_end("rank_pattern", values, name, 0) for name in ("b", "a.b", "q", "a.q", "q.x")] == [
        1,
        0,
        3,
        2,
        4,
    ]


@pytest.mark.parametrize(
    "pattern", ["model.layers.{}.self_attn.q_proj", r".*layers\.{}\..*"], ids=["names", "patterns"]
)
def test_a_rank_for_each_layer_of_a_large_model_takes_little_of_an_uploads_time(pattern: str) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(300)]
    values = {pattern.format(i): i for i in range(300)}
    with matching(patterns.UPLOAD):
        assert all(fault(each) is None for each in values)
        assert [first_at_end("rank_pattern", values, name, -1) for name in names] == [*range(300)]


def test_groups() -> None:
    assert group("layers_pattern", r"(?:^|.*?\.)layers\.(\d+)\.", "model.layers.12.q") == "12"
    assert group("layers_pattern", r"(?:^|.*?\.)(layer)s\.(\d+)\.", "model.layers.12.q") == "12", "the last one"
    assert group("layers_pattern", r"(?:^|.*?\.)h|layers\.(\d+)\.", "model.h.12.q") is None
    assert begins("rank_pattern", r"(.*\.)?(q(x)?)$", "model.q"), "though its last group takes no part"
