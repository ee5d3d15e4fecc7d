"""Files of strangers: the same rows wherever they are read, and what is poisonous or enormous fails alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from kilotune.bounded import Bounds
from kilotune.errors import ConfigError
from kilotune.serve.learning import file_reader
from kilotune.serve.learning.file_reader import FileReader, _pieces
from kilotune.serve.learning.training_file import MOST_LINE
from tests.support.http_support import tokenizer
from tests.support.training_support import chat_lines

PAIRS = [("the cat", "a dog sat"), ("a dog", "the mat"), ("on", "the hat <|end|> x")]


def rows_of(file: Any) -> list[Any]:
    return [
        (one.line, [{name: list(values) for name, values in row.items()} for row in one.rows], one.raw)
        for one in file.examples
    ]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[FileReader]:
    """Reads all files in its process."""
    made = FileReader(tokenizer(), 10**7, Bounds(seconds=5.0, memory=2**28), here=0)
    yield made
    made.close()


@pytest.fixture
def here() -> Iterator[FileReader]:
    made = FileReader(tokenizer(), 10**7, here=2**30)
    yield made
    made.close()


@pytest.mark.heavy
def test_rows_are_the_same_wherever_they_are_read(here: FileReader, elsewhere: FileReader) -> None:
    pair = {
        "input": {"messages": [{"role": "user", "content": "the cat"}]},
        "preferred_output": [{"role": "assistant", "content": "a mat"}],
        "non_preferred_output": [{"role": "assistant", "content": "the hat"}],
    }
    prompt = {"messages": [{"role": "user", "content": "the cat"}], "answer": {"a": [1]}}
    for form, data in (
        ("supervised", chat_lines(PAIRS) + b"\n\n" + chat_lines(PAIRS)),
        ("dpo", json.dumps(pair).encode()),
        ("reinforcement", json.dumps(prompt).encode()),
    ):
        found = elsewhere.read(data, form, "it")
        assert rows_of(found) == rows_of(here.read(data, form, "it"))
        assert found.ends == here.read(data, form, "it").ends
    wrong = chat_lines(PAIRS) + b"not json\n" + chat_lines(PAIRS) + b'{"prompt": 1}\n'
    told = []
    for reader in (here, elsewhere):
        with pytest.raises(ConfigError) as error:
            reader.read(wrong, "supervised", "it")
        told.append(str(error.value))
    assert told[0] == told[1]
    assert "line 4: no JSON" in told[0]
    assert "line 8: expected messages" in told[0]


def turns(count: int) -> bytes:
    """One line that the template writes twice for each of its answers."""
    chat = [{"role": role, "content": "a cat"} for _ in range(count) for role in ("user", "assistant")]
    return json.dumps({"messages": chat}).encode()


@pytest.mark.heavy
def test_a_poisonous_file_fails_alone_and_in_time(elsewhere: FileReader) -> None:
    elsewhere.read(chat_lines(PAIRS), "supervised", "good")  # the process is there
    beats: list[float] = []
    end = threading.Event()

    def beat() -> None:
        while not end.wait(0.01):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"bad cannot be trained on: lines 1 to \d+ cannot be read: (it takes|its process)"
    ):
        elsewhere.read(b"\n".join([turns(500)] * 60), "supervised", "bad", "ann")
    took = time.monotonic() - began
    end.set()
    thread.join()
    assert took < 20
    assert max(later - earlier for earlier, later in pairwise(beats)) < 1.0, "others go on meanwhile"
    assert elsewhere.read(chat_lines(PAIRS), "supervised", "good", "bob").tokens > 0


@pytest.mark.heavy
def test_memory_is_bounded(elsewhere: FileReader) -> None:
    text = "the cat sat on a mat " * 90_000
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    with pytest.raises(ConfigError, match=r"line 1 cannot be read: (it takes more than 256 MiB|.*found no memory)"):
        elsewhere.read(json.dumps({"messages": chat}).encode(), "supervised", "bad")
    assert elsewhere.read(chat_lines(PAIRS), "supervised", "good").tokens > 0


def test_pieces_are_whole_lines_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reader, "PIECE", 10)
    data = b"abc\n" * 5 + b"\n\n" + b"x" * 40 + b"\nlast"
    found = list(_pieces(data))
    assert b"".join(piece.data for piece in found) == data
    for piece in found:
        assert piece.first == data[: data.index(piece.data)].count(b"\n") + 1 or piece.data == b"abc\n" * 3
        assert piece.data.endswith(b"\n") or piece is found[-1]
    assert [piece.first for piece in found] == sorted(piece.first for piece in found)
    assert list(_pieces(b"")) == []


def test_lines_keep_their_numbers_across_pieces(here: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reader, "PIECE", 100)
    found = here.read(chat_lines(PAIRS * 4) + b"\n" + chat_lines(PAIRS), "supervised", "it")
    assert [one.line for one in found.examples] == [*range(1, 13), 14, 15, 16]
    with pytest.raises(ConfigError, match=r"line 13: no JSON"):
        here.read(chat_lines(PAIRS * 4) + b"x\n", "supervised", "it")
    with pytest.raises(ConfigError, match=r"line 13: no UTF-8 at byte 2"):
        here.read(chat_lines(PAIRS * 4) + b"x\xff\n", "supervised", "it")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "it has no examples"),
        (b"\n" * 10_000, "it has no examples"),
        (b"\xef\xbb\xbf", "it has no examples"),
        (b"x" * (2**20 + MOST_LINE + 1), "line 1: more than 2000000 characters"),
        (b"x" * (MOST_LINE + 1), "line 1: more than 2000000 characters"),
        (b"[" * 100_000, "line 1: "),
        (b"{}\n" * 100_000, "and perhaps more"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: no JSON"),
    ],
)
def test_what_is_no_training_file_is_told_soon(data: bytes, told: str, here: FileReader) -> None:
    with pytest.raises(ConfigError) as error:
        here.read(data, "supervised", "it")
    assert told in str(error.value)
    assert str(error.value).startswith("it cannot be trained on:")


def test_a_file_that_takes_too_long_or_is_left_ends_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_reader, "PIECE", 100)
    reader = FileReader(tokenizer(), 64, seconds=0.0)
    with pytest.raises(ConfigError, match="it takes more than 0 s to read, and was read up to line 1"):
        reader.read(chat_lines(PAIRS), "supervised", "it")
    count = []

    def stay() -> None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    reader = FileReader(tokenizer(), 64)
    with pytest.raises(KeyboardInterrupt):
        reader.read(chat_lines(PAIRS * 9), "supervised", "it", stay=stay)
    assert len(reader.read(chat_lines(PAIRS), "supervised", "it").examples) == 3, "nobody has its turn still"
