"""Answers that fit grammars: what transformers' loop gives with the same mask, in any company, and bounded."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune.errors import ConfigError, MissingExtraError, ResourceError
from kilotune.serve.engine import continuous_batching, grammars
from kilotune.serve.engine.interface import Finish, Generation, Grammar, GrammarError, Sampling
from kilotune.serve.engine.sampling import Picker, choose
from tests.support.guided_support import GRAMMARS, SCHEMA, guided_base, masked_greedy, running_pids, tokenizer_of
from tests.support.serve_support import Served, alone, answer, answers, greedy

JSON = Grammar(kind="json", text=json.dumps(SCHEMA), place="j")


def made(folder: Path, kind: str = "pairs", **options: Any) -> Served:
    return Served(folder, count=2, base=guided_base(kind), tokenizer=tokenizer_of(kind), **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with made(tmp_path_factory.mktemp("served")) as running:
        yield running


def ids_of(text: str, kind: str = "pairs") -> tuple[int, ...]:
    return tuple(tokenizer_of(kind)(text, add_special_tokens=False)["input_ids"])


CAT = ids_of("the cat")


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text, place="r")


# -- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "pieces"])
def test_greedy_answers_are_those_of_transformers_with_the_mask(tmp_path: Path, kind: str) -> None:
    """In one batch with adapters, and with answers that fit nothing, whose tokens stay what they are alone."""
    asked: list[tuple[Any, ...]] = []
    wanted = []
    with made(tmp_path, kind) as running:
        keys = [*running.keys, None]
        models = [*running.models, running.base]
        for i, grammar in enumerate([*GRAMMARS.values(), None, None]):
            prompt, which = ids_of("the cat sat on" + " a dog" * i, kind), i % 3
            asked.append((prompt, greedy(60, grammar=grammar), keys[which], "t"))
            if grammar is None:
                wanted.append(alone(models[which], prompt, 60))
            else:
                wanted.append(masked_greedy(models[which], kind, grammar, prompt, 60))
        got = answers(running.engine, asked)
    assert [one.ids for one in got] == wanted
    assert sum(one.finish.reason == "stop" for one in got[:5]) >= 3


def test_texts_fit_whatever_is_drawn(served: Served) -> None:
    """With all that changes which tokens are likely, and at any seed."""
    more: list[dict[str, Any]] = [
        {},
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.3},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"logit_bias": tuple((i, 100.0 * (-1) ** i) for i in range(200))},
    ]
    asked = [
        (CAT, Sampling(max_tokens=400, temperature=1.5, seed=i, logprobs=2, grammar=JSON, **some), None, "t")
        for i, some in enumerate(more * 2)
    ]
    got = answers(served.engine, asked)
    for one in got:
        assert one.finish.reason == "stop", one.text
        told = json.loads(one.text)
        assert {*told} == {"name", "age"}
        assert told["name"] in ("ann", "bob")
        assert 0 <= told["age"] <= 150
    assert len({one.text for one in got}) > 3
    assert answers(served.engine, asked[:1])[0].ids == got[0].ids, "a seed's draws are its own"
    free = answers(served.engine, [(CAT, Sampling(max_tokens=1, temperature=0, logprobs=3), None, "t")])[0]
    held = answers(served.engine, [(CAT, greedy(1, logprobs=3, grammar=JSON), None, "t")])[0]
    assert [i for i, _ in held.tokens[0].top] == [i for i, _ in free.tokens[0].top], "they are the model's own"
    assert held.ids != free.ids


def test_the_mask_comes_behind_penalties_and_before_draws() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    allowed = torch.zeros(30, dtype=torch.bool)
    allowed[[3, 7, 11]] = True
    for seed in range(40):
        picker = Picker(Sampling(max_tokens=1, seed=seed, top_p=0.9, temperature=3.0, logit_bias=((7, 100.0),)), [1])
        picker.allowed = allowed
        assert choose(logits, [picker])[0].token == 7
    plain = Picker(Sampling(max_tokens=1, temperature=0.0))
    plain.allowed = allowed
    masked = torch.where(allowed, logits[0], -torch.inf)
    assert choose(logits, [plain])[0] == (int(masked.argmax()), None, (), True)
    assert choose(torch.full((1, 30), torch.nan), [plain])[0].finite is False


def test_an_answer_ends_where_the_grammar_ends_and_nowhere_else(served: Served) -> None:
    end = tokenizer_of("pairs").eos_token_id
    eager, never = ((end, 100.0),), ((end, -100.0),)
    must, may = regex("abc"), regex("(ab)*")
    got = answers(
        served.engine,
        [
            (CAT, greedy(20, grammar=must, logit_bias=eager), None, "t"),
            (CAT, greedy(20, grammar=must, logit_bias=never), None, "t"),
            (CAT, greedy(20, grammar=may, logit_bias=eager), None, "t"),
            (CAT, greedy(9, grammar=may, logit_bias=never), None, "t"),
            (CAT, greedy(20, grammar=may, logit_bias=never, stop=("bab",)), None, "t"),
        ],
    )
    assert [(one.text, one.finish.reason) for one in got[:3]] == [("abc", "stop"), ("abc", "stop"), ("", "stop")]
    assert [one.ids[-1] for one in got[:3]] == [end] * 3
    assert got[3].finish.reason == "length"
    assert re.fullmatch("(ab)*a?", got[3].text)
    assert got[4].text == "a"


def test_special_tokens_that_end_an_answer_are_ends_for_its_grammar(served: Served) -> None:
    start = tokenizer_of("pairs").convert_tokens_to_ids("<|im_start|>")
    eager, grammar = ((start, 100.0),), regex("abc(ab)*")
    asked = [greedy(20, grammar=grammar, logit_bias=eager, stop_token_ids=stops) for stops in ((start,), ())]
    own, plain = answers(served.engine, [(CAT, sampling, None, "t") for sampling in asked])
    assert (own.text, own.ids[-1], own.finish.reason) == ("abc", start, "stop")
    assert start not in plain.ids


def test_a_model_without_an_end_ends_where_nothing_can_follow(tmp_path: Path) -> None:
    import copy

    base = copy.deepcopy(guided_base())
    base.config.eos_token_id = base.generation_config.eos_token_id = None
    with Served(tmp_path, count=1, base=base, tokenizer=tokenizer_of("pairs")) as running:
        must, may = answers(
            running.engine, [(CAT, greedy(9, grammar=regex(text)), None, "t") for text in ("abc", "a*")]
        )
    assert (must.text, must.finish.reason) == ("abc", "stop")
    assert may.finish.reason == "length"


def test_no_grammar_makes_marks(served: Served) -> None:
    """Special tokens are no text, so nothing that is matched by text is one of them."""
    special = {*tokenizer_of("pairs").all_special_ids} | {500, 501}
    grammar = regex("(.|\n)*")
    bias = tuple((token, 100.0) for token in special - {tokenizer_of("pairs").eos_token_id})
    (got,) = answers(served.engine, [(CAT, greedy(30, grammar=grammar, logit_bias=bias), None, "t")])
    assert not special & {*got.ids[:-1]}
    (free,) = answers(served.engine, [(CAT, greedy(3, logit_bias=bias), None, "t")])
    assert special & {*free.ids}


def test_late_masks_change_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that sits out steps has the tokens, and the draws, that it has else."""
    asked: list[tuple[Any, ...]] = [
        (
            CAT,
            Sampling(max_tokens=60, temperature=1.0, seed=i, grammar=JSON if i % 2 else None),
            served.keys[i % 2],
            "t",
        )
        for i in range(4)
    ]
    wanted = [one.ids for one in answers(served.engine, asked)]
    parked = []
    own = grammars.Guide.sit_out
    monkeypatch.setattr(continuous_batching, "wait_for", lambda *_: None)
    monkeypatch.setattr(grammars.Guide, "sit_out", lambda self: (parked.append(1), own(self)))
    assert [one.ids for one in answers(served.engine, asked)] == wanted
    assert parked


# -- what is refused ---------------------------------------------------------------------------------


def deep(count: int) -> str:
    return '{"properties": {"a": ' * count + "{}" + "}}" * count


@pytest.mark.parametrize(
    ("kind", "text", "place", "told"),
    [
        ("regex", "(a", "p", "unclosed group"),
        ("regex", "(?=a)b", "p", "look-around"),
        ("json", '{"properties": {"a": {"items": [1]}}}', "p.properties.a.items", "no JSON schema"),
        ("json", '{"properties": {"a": {"type": "strng"}}}', "p.properties.a.type", '"strng" is not valid'),
        ("json", "{", "p", "no JSON"),
        ("json", '{"items": {"uniqueItems": true}}', "p.items.uniqueItems", "uniqueItems"),
        ("json", '{"$ref": "#"}', "p", "nothing fits it"),
        ("json", '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "p", ""),
        ("json", '{"properties": {"a": {"$ref": "https://example.org/x.json"}}}', "p.properties.a.$ref", "example.org"),
        ("json", '{"$ref": "file:///etc/passwd"}', "p.$ref", "file:///etc/passwd"),
        ("json", '{"$ref": "#/$defs/no"}', "p.$ref", "/$defs/no' does not exist"),
        ("json", deep(5000), "p", ""),
        ("json", json.dumps({"enum": ["x" * 100] * 4000}), "p", "bytes; at most"),
        ("json", "false", "p", ""),
        ("grammar", "start: nothing", "p", "nothing"),
        ("grammar", "%import python.os\nstart: os", "p", ""),
        ("choice", '["\\ud800"]', "p", ""),
    ],
)
def test_what_cannot_be_compiled_is_refused_soon_and_says_where(
    served: Served, kind: Any, text: str, place: str, told: str
) -> None:
    began = time.monotonic()
    with pytest.raises(GrammarError) as refused:
        asyncio.run(answer(served.engine, CAT, greedy(3, grammar=Grammar(kind=kind, text=text, place="p"))))
    assert time.monotonic() - began < 10
    assert refused.value.place == place, str(refused.value)
    assert told in str(refused.value)
    assert len(str(refused.value)) < 1000
    assert alone(served.base, CAT, 5) == answers(served.engine, [(CAT, greedy(5), None, "t")])[0].ids


def test_keywords_that_cannot_be_held_to_are_passed_over_where_that_is_asked(served: Served) -> None:
    grammar = Grammar(kind="json", text='{"type": "array", "items": {"enum": [1]}, "uniqueItems": true}', place="p")
    lenient = dataclasses.replace(grammar, lenient=True)
    (got,) = answers(served.engine, [(CAT, Sampling(max_tokens=200, seed=1, grammar=lenient), None, "t")])
    assert {*json.loads(got.text)} <= {1}


def test_what_an_engine_cannot_be_asked(served: Served) -> None:
    with pytest.raises(ConfigError, match="ignore_eos: not with a grammar"):
        asyncio.run(answer(served.engine, CAT, greedy(3, grammar=JSON, ignore_eos=True)))


def test_without_the_package_only_grammars_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "PACKAGES", ("llguidance", "no_such_package_at_all"))
    with made(tmp_path) as running:
        with pytest.raises(MissingExtraError, match="'no_such_package_at_all': pip install 'kilotune"):
            asyncio.run(answer(running.engine, CAT, greedy(3, grammar=JSON)))
        assert answers(running.engine, [(CAT, greedy(3), None, "t")])[0].ids == alone(running.base, CAT, 3)
        monkeypatch.setattr(grammars, "PACKAGES", ("llguidance", "jsonschema_rs"))
        own = grammars.PROGRAM
        monkeypatch.setattr(grammars, "PROGRAM", tmp_path / "broken.py")
        (tmp_path / "broken.py").write_text(own.read_text().replace("import LLTokenizer", "import NoSuchName"))
        with pytest.raises(MissingExtraError, match="what is installed cannot be used"):
            asyncio.run(answer(running.engine, CAT, greedy(3, grammar=JSON)))


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("raise MemoryError('no more of it')\n", "MemoryError: no more of it"),
        ("import os\nos.kill(os.getpid(), 9)\n", "it said nothing"),
        ("import time\ntime.sleep(60)\n", "TimeoutError"),
        ("import os\nos.write(2, b'x' * 9000)\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("print('x' * 10**7, file=__import__('sys').stderr)\n", "xxxx"),
    ],
    ids=["memory", "killed", "hangs", "says much", "says too much"],
)
def test_what_is_installed_and_does_not_start_is_to_be_tried_again_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, program: str, told: str
) -> None:
    own = grammars.PROGRAM
    monkeypatch.setattr(grammars, "STARTING", 0.5 if "sleep" in program else 30.0)
    monkeypatch.setattr(grammars, "PROGRAM", tmp_path / "broken.py")
    (tmp_path / "broken.py").write_text(program)
    with made(tmp_path) as running:
        with caplog.at_level("ERROR", "kilotune.serve"), pytest.raises(ResourceError, match="that the log has"):
            asyncio.run(answer(running.engine, CAT, greedy(3, grammar=JSON)))
        assert told in caplog.text
        assert len(caplog.text) < 10_000
        monkeypatch.setattr(grammars, "PROGRAM", own)
        monkeypatch.setattr(grammars, "STARTING", 30.0)
        (got,) = answers(running.engine, [(CAT, greedy(9, grammar=regex("abc")), None, "t")])
        assert got.text == "abc"


def test_where_there_can_be_no_process_it_is_to_be_tried_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(grammars._Process, "fork", none)
        with pytest.raises(ResourceError, match="no process for the grammar.*Too many open files"):
            asyncio.run(answer(served.engine, CAT, greedy(3, grammar=JSON)))
    assert answers(served.engine, [(CAT, greedy(9, grammar=regex("abc")), None, "t")])[0].text == "abc"


def test_a_deadline_counts_while_a_grammar_is_compiled(served: Served) -> None:
    late = time.monotonic() - 1.0
    made = asyncio.run(answer(served.engine, CAT, greedy(3, grammar=regex("deadline")), deadline=late))
    assert made.finish.reason == "deadline"


def test_a_third_tenant_finds_a_place_whatever_two_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are held as long as answers take; what is made for them is nothing here."""

    def nothing(self: Any, tenant: str, grammar: Grammar, stops: Any) -> grammars.Guide:
        mine, its = socket.socketpair()
        its.close()
        return grammars.Guide(mine, 9, [0], [])

    monkeypatch.setattr(grammars.Grammars, "_guide", nothing)
    places = grammars.Grammars(None, 9, frozenset({0}), 4)

    def ask(tenant: str) -> Any:
        return places.guide(
            Generation(id="a", tenant=tenant, adapter=None, prompt=(1,), sampling=greedy(9, grammar=JSON))
        )

    async def run() -> None:
        tasks = {who: [asyncio.create_task(ask(who)) for _ in range(16)] for who in ("ann", "bob")}
        await asyncio.wait_for(tasks["ann"][3], 10)
        await asyncio.wait_for(tasks["bob"][0], 10)
        third = await asyncio.wait_for(ask("cyd"), 10)
        assert [sum(task.done() for task in own) for own in tasks.values()] == [4, 2]
        await third.aclose()
        waiting = [task for own in tasks.values() for task in own if not task.done()]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for own in tasks.values():
            for task in own:
                if not task.cancelled():
                    await task.result().aclose()

    asyncio.run(run())
    assert not places._places._taken
    places.close()


# -- bounds ------------------------------------------------------------------------------------------

EXPLODING = {
    "nested loops": regex("((a+)+)+b"),
    "counted loops": regex("((a{1,40}){1,40}){1,40}x"),
    "far back": regex(".*a.{300}b"),
    "both": regex("(.*a.{60})&(.*b.{61})"),
    "pattern": Grammar(kind="json", text='{"type": "string", "pattern": "^(x+x+)+y$"}', place="p"),
    "very many": regex("a{1000}{1000}{1000}"),
    "endless": Grammar(kind="grammar", text='start: "a" start', place="p"),
    "huge enum": Grammar(kind="json", text=json.dumps({"enum": [f"word {i}" for i in range(12_000)]}), place="p"),
    "deep": Grammar(kind="json", text=deep(40), place="p"),
    "ambiguous": Grammar(kind="grammar", text="start: e\ne: e e e | e e | /a+/ | ", place="p"),
}


@pytest.mark.heavy
def test_nobody_waits_for_a_strangers_grammar(served: Served) -> None:
    """Somebody's tokens come as fast beside others' grammars, which end by themselves or with an error of their own."""

    async def gaps(stop: asyncio.Event) -> list[float]:
        request = Generation(
            id="a", tenant="ann", adapter=None, prompt=CAT, sampling=greedy(900, ignore_eos=True), deadline=None
        )
        times = []
        async for _ in served.engine.generate(request):
            times.append(time.monotonic())
            if stop.is_set():
                break
        return [b - a for a, b in itertools.pairwise(times)]

    async def one(grammar: Grammar) -> Any:
        try:
            bias = tuple((token, 20.0) for token in ids_of("a"))
            return (await answer(served.engine, CAT, greedy(40, grammar=grammar, logit_bias=bias), tenant="bob")).finish
        except GrammarError as error:
            return error

    async def run() -> tuple[list[float], list[Any]]:
        stop = asyncio.Event()
        ann = asyncio.create_task(gaps(stop))
        await asyncio.sleep(0.1)
        ends = await asyncio.gather(*(one(grammar) for grammar in [*EXPLODING.values()] * 2))
        stop.set()
        return await ann, ends

    found, ends = asyncio.run(run())
    assert len(found) > 50
    assert max(found) < 0.5, sorted(found)[-5:]
    for end in ends:
        if isinstance(end, Finish):
            assert end.reason in ("stop", "length", "grammar"), end


def test_a_mask_that_takes_too_long_fails_its_own_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program, with a mask that never comes."""
    text = grammars.PROGRAM.read_text()
    slow = text.replace("        mask = matcher.compute_bitmask()\n", "        mask = stall(matcher)\n")
    assert slow != text
    slow = slow.replace(
        "def follow(",
        "def stall(matcher):\n    mask = matcher.compute_bitmask()\n    while mask[ord('z') // 8 * 0] >= 0 and "
        "matcher.validate_tokens([LETTER]):\n        pass\n    return mask\n\n\ndef follow(",
    ).replace("MASKING = 0.5", f"MASKING = 0.5\nLETTER = {ids_of('z')[0]}")
    (tmp_path / "slow.py").write_text(slow)
    monkeypatch.setattr(grammars, "PROGRAM", tmp_path / "slow.py")
    with made(tmp_path) as running:
        good, bad, free = answers(
            running.engine,
            [
                (CAT, greedy(9, grammar=regex("abc")), None, "t"),
                (CAT, greedy(9, grammar=regex("abz")), None, "t"),
                (CAT, greedy(60), None, "t"),
            ],
        )
    assert (good.text, good.finish.reason) == ("abc", "stop")
    assert (bad.text, bad.finish.reason) == ("ab", "grammar")
    assert "takes too long or too much memory at this point" in str(bad.finish.error)
    assert free.ids == alone(guided_base(), CAT, 60)


def test_processes_that_are_killed_cost_their_own_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "grammar_process.py"  # of this test alone
    program.write_text(grammars.PROGRAM.read_text())
    monkeypatch.setattr(grammars, "PROGRAM", program)

    async def killed_after_a_token(engine: Any) -> Any:
        request = Generation(
            id="k", tenant="t", adapter=None, prompt=CAT, sampling=greedy(700, grammar=regex("(ab){400}"))
        )
        tokens = 0
        async for item in engine.generate(request):
            if isinstance(item, Finish):
                return item
            tokens += 1
            if tokens == 1:
                for number in running_pids(program):
                    os.kill(number, signal.SIGKILL)
        return None

    async def run(engine: Any) -> Any:
        return await asyncio.gather(killed_after_a_token(engine), answer(engine, CAT, greedy(40)))

    with made(tmp_path) as running:
        killed, free = asyncio.run(run(running.engine))
        assert killed.reason == "grammar"
        assert free.ids == alone(running.base, CAT, 40)
        (got,) = answers(running.engine, [(CAT, greedy(9, grammar=regex("abc")), None, "t")])
        assert got.text == "abc"


def test_all_processes_end_with_the_engine_and_with_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count() -> int:
        return len(running_pids(program))

    def settle(wanted: int) -> None:
        until = time.monotonic() + 10
        while count() != wanted and time.monotonic() < until:
            time.sleep(0.02)
        assert count() == wanted

    program = tmp_path / "grammar_process.py"  # of this test alone
    program.write_text(grammars.PROGRAM.read_text())
    monkeypatch.setattr(grammars, "PROGRAM", program)
    with made(tmp_path) as running:

        async def leave() -> None:
            task = asyncio.create_task(answer(running.engine, CAT, greedy(700, grammar=regex("(ab){400}"))))
            while count() < 4:  # the answer has its own
                await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        answers(running.engine, [(CAT, greedy(9, grammar=regex("abc")), None, "t")] * 5)
        settle(2)  # the first one, and a compiled grammar
        asyncio.run(leave())
        settle(3)
    settle(0)
