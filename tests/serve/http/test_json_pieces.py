"""Large answers are written in pieces, and others have their turns between them; their bytes are those of one call."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from kilotune.serve.http import json_pieces
from kilotune.serve.http.json_pieces import EVENT, PIECE, VALUES, WHOLE, JsonResponse, Later, Writing, pieces_of
from tests.support.http_support import Running, batching, serving

TEXT = "the cat sat on the mat and the dog ran to the house"
CHAT = {"model": "poems", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 8, "temperature": 0}
PLAIN = {"model": "poems", "prompt": TEXT, "max_tokens": 8, "temperature": 0}
RESPONSE = {"model": "poems", "input": TEXT, "max_output_tokens": 8, "temperature": 0, "top_logprobs": 5}
LOGPROBS = {"include": ["message.output_text.logprobs"]}


def drawn(random_: random.Random, deep: int) -> Any:
    """A document of anything."""
    kind = random_.choice("dlLtfib0n" if deep else "tfib0n")
    count = random_.choice([0, 1, 3, 40])
    if kind == "d":
        return {random_.choice('aé"') + str(i): drawn(random_, deep - 1) for i in range(count)}
    if kind in "lL":
        return [drawn(random_, deep - 1) for _ in range(count)]
    texts = ["", "é😀", '"\\\n\u2028', "x" * 40, "x" * 40_000]
    numbers: dict[str, Any] = {"f": random_.uniform(-1e9, 1e9), "i": random_.getrandbits(70), "b": True, "0": 0.0}
    return random_.choice(texts) if kind == "t" else numbers.get(kind)


def lazily(document: Any) -> Any:
    """The same document, with lists that are made when they are written."""
    if isinstance(document, dict):
        return {name: lazily(inner) for name, inner in document.items()}
    if not isinstance(document, list):
        return document
    return Later(document, lazily, VALUES if any(isinstance(one, (dict, list)) for one in document) else 3)


def count(value: Any) -> int:
    """All values in one."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return 1 + sum(map(count, inner))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the test."""
    return calls_of_json(monkeypatch)


def calls_of_json(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each call of json writes from now on, in whatever thread."""
    own, seen = json.JSONEncoder.encode, list[int]()

    def spied(self: json.JSONEncoder, value: Any) -> str:
        seen.append(count(value))
        return own(self, value)

    monkeypatch.setattr(json.JSONEncoder, "encode", spied)
    return seen


@pytest.mark.parametrize("encoder", [WHOLE, EVENT], ids=["whole", "event"])
def test_the_bytes_are_those_of_one_call(encoder: json.JSONEncoder) -> None:
    for seed in range(60):
        document = drawn(random.Random(seed), 3)
        wanted = encoder.encode(document).encode()
        assert b"".join(pieces_of(document, encoder)) == wanted
        assert b"".join(pieces_of(lazily(document), encoder)) == wanted


def test_numbers_that_json_does_not_have_are_refused_as_before() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        list(pieces_of({"a": [1.0] * 2000 + [float("nan")]}, WHOLE))


@pytest.mark.parametrize("shape", ["a list", "lists", "an object", "made when written"])
def test_no_call_writes_much_and_no_piece_is_large(shape: str, calls: list[int]) -> None:
    rows = [{"a": i, "b": [1, 2, 3], "c": "text"} for i in range(5000)]
    document = {
        "a list": [*range(30_000)],
        "lists": [[[i] * 100] * 10 for i in range(30)],
        "an object": {str(i): row for i, row in enumerate(rows)},
        "made when written": Later(rows, lambda row: row, 7),
    }[shape]
    pieces = list(pieces_of({"data": document}, WHOLE))
    assert max(calls) <= VALUES + 1
    assert max(map(len, pieces)) < 2 * PIECE
    assert min(map(len, pieces[:-1])) >= PIECE, "and not very many small ones"


def test_items_are_made_as_they_are_written() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item

    pieces = pieces_of(Later(range(200_000), make), WHOLE)
    next(pieces)
    assert 1000 < len(made) < 10_000


def test_others_have_a_turn_for_each_piece_of_all_that_write() -> None:
    """Also where several write at once: then the pieces of all of them come one by one."""

    async def run(writers: int) -> tuple[int, int]:
        writing, turns, most = Writing(), 0, 0
        pieces = 0

        def counted() -> Iterator[bytes]:
            nonlocal pieces
            for piece in pieces_of([*range(30_000)], WHOLE):
                pieces += 1
                yield piece

        tasks = [asyncio.create_task(writing.all(counted())) for _ in range(writers)]
        before = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turns += 1
            most, before = max(most, pieces - before), pieces
        assert {b"".join(task.result()) for task in tasks} == {WHOLE.encode([*range(30_000)]).encode()}
        return most, turns

    most, turns = asyncio.run(run(1))
    assert most == 1
    assert turns >= 10
    most, turns = asyncio.run(run(5))
    assert most <= 5, "each begins with one, and after that they take turns"
    assert turns >= 40


def test_what_is_small_waits_for_nobody() -> None:
    async def run() -> None:
        writing = Writing()
        async with writing._turn:
            response = await asyncio.wait_for(writing.response({"a": 1}), 5)
        assert isinstance(response, JsonResponse)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await response({}, None, send)  # type: ignore[arg-type]
        assert (b"content-length", b"7") in sent[0]["headers"]
        assert (b"content-type", b"application/json") in sent[0]["headers"]
        assert sent[1:] == [{"type": "http.response.body", "body": b'{"a":1}'}]

    asyncio.run(run())


# -- the routes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder)) as made:
        yield made


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**PLAIN, "logprobs": 5, "echo": True, "prompt_logprobs": 5, "n": 3}),
        ("/v1/completions", {**PLAIN, "logprobs": 5, "echo": True, "n": 3, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 5, "prompt_logprobs": 5, "n": 3}),
        ("/v1/responses", {**RESPONSE, **LOGPROBS}),
        ("/v1/responses", {**RESPONSE, **LOGPROBS, "stream": True}),
        ("/tokenize", {"model": "poems", "prompt": TEXT * 40, "return_token_strs": True}),
    ],
    ids=["completions", "an echo, streamed", "chat", "responses", "responses, streamed", "tokens"],
)
def test_no_answer_is_written_in_one_call(
    running: Running, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large answer here is what takes more than 60 values; one token with what is likely in its place has fewer."""
    with running.client(running.keys["ann"]) as client:
        plain = client.post(path, json=body)
        sent = len(plain.content)
        assert sent > 3000
        monkeypatch.setattr(json_pieces, "VALUES", 50)
        monkeypatch.setattr(json_pieces, "PIECE", 200)
        seen, turns, sleep = calls_of_json(monkeypatch), list[int](), asyncio.sleep

        async def slept(seconds: float, *given: Any) -> Any:
            turns.append(1)
            return await sleep(seconds, *given)

        monkeypatch.setattr(asyncio, "sleep", slept)
        pieces = client.post(path, json=body)
    assert max(seen) <= 65
    assert len(turns) >= sent / 800
    for text in (plain, pieces):
        check_compact(text)


def check_compact(answer: httpx2.Response) -> None:
    """JSON as one call writes it."""
    if "content-length" in answer.headers:
        assert WHOLE.encode(answer.json()).encode() == answer.content
        return
    for line in answer.text.split("\n"):
        if line.startswith("data: {"):
            assert EVENT.encode(json.loads(line[6:])) == line[6:]
