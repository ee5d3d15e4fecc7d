"""Log-probabilities of prompts, in OpenAI's shape (echo) and vLLM's (prompt_logprobs), against transformers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from kilotune.serve.http import generation_routes
from kilotune.serve.http.prompts import LONG, Prompts
from tests.support.generation_support import loaded
from tests.support.http_support import (
    BASE,
    Running,
    base_folder,
    batching,
    expected,
    prompt_ids,
    reference,
    serving,
    tokenizer,
)
from tests.support.serve_support import byte_tokenizer

PROMPT = "the cat sat on the mat and the dog ran to the house"
MESSAGES: Any = [{"role": "user", "content": "a big red dog"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder, batch_tokens=16)) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return running.openai()


@functools.cache
def rows_of(seed: int | None, text: str) -> torch.Tensor:
    with torch.no_grad():
        return reference(seed)(input_ids=torch.tensor([prompt_ids(text)])).logits[0, :-1].double().log_softmax(-1)


def complete(client: Any, model: str = "poems", prompt: Any = PROMPT, count: int = 4, **more: Any) -> Any:
    return client.completions.create(model=model, prompt=prompt, max_tokens=count, temperature=0, **more)


def check_echo(logprobs: Any, seed: int | None, text: str, top: int) -> None:
    """The part of the log-probabilities that is of the prompt."""
    ids, rows = prompt_ids(text), rows_of(seed, text)
    assert logprobs.tokens[: len(ids)] == [tokenizer().decode([i]) for i in ids]
    assert (logprobs.token_logprobs[0], logprobs.top_logprobs[0]) == (None, None)
    values = [float(row[i]) for row, i in zip(rows, ids[1:], strict=True)]
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(values, abs=1e-4)
    for token, likely, row, own in zip(logprobs.tokens[1:], logprobs.top_logprobs[1:], rows, values):
        best = {tokenizer().decode([int(i)]): float(row[i]) for i in reversed(row.topk(top).indices)} if top else {}
        assert likely == pytest.approx({token: own, **best}, abs=1e-4)
    for place, offset in enumerate(logprobs.text_offset[: len(ids)]):
        assert offset == len(tokenizer().decode(ids[:place], clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("top", [0, 1, 5])
@pytest.mark.parametrize(("model", "seed"), [(BASE, None), ("poems", 1), ("letters", 2)])
def test_an_echo_with_log_probabilities_has_the_prompts(client: Any, model: str, seed: int | None, top: int) -> None:
    made = complete(client, model, logprobs=top, echo=True).choices[0]
    alone = complete(client, model, logprobs=top).choices[0]
    assert made.text == PROMPT + expected(seed, PROMPT, 4)
    check_echo(made.logprobs, seed, PROMPT, top)
    count = len(prompt_ids(PROMPT))
    assert made.logprobs.tokens[count:] == alone.logprobs.tokens
    assert made.logprobs.token_logprobs[count:] == pytest.approx(alone.logprobs.token_logprobs, abs=1e-4)
    assert made.logprobs.text_offset[count:] == [len(PROMPT) + at for at in alone.logprobs.text_offset]


def test_the_prompt_may_be_all_of_it(client: Any) -> None:
    made = complete(client, count=0, logprobs=2, echo=True)
    assert (made.choices[0].text, made.choices[0].finish_reason) == (PROMPT, "length")
    assert len(made.choices[0].logprobs.tokens) == made.usage.prompt_tokens == made.usage.total_tokens
    check_echo(made.choices[0].logprobs, 1, PROMPT, 2)
    bare = complete(client, count=0, echo=True)
    assert (bare.choices[0].text, bare.choices[0].logprobs, bare.usage.completion_tokens) == (PROMPT, None, 0)


@pytest.mark.parametrize("count", [0, 4])
def test_a_stream_has_the_same(client: Any, count: int) -> None:
    whole = complete(client, count=count, logprobs=2, echo=True, n=2).choices
    parts: list[Any] = [[], []]
    for event in complete(client, count=count, logprobs=2, echo=True, n=2, stream=True):
        parts[event.choices[0].index].append(event.choices[0])
    for one, own in zip(whole, parts, strict=True):
        assert "".join(part.text for part in own) == one.text
        assert own[0].text == PROMPT, "the prompt comes first"
        told = [part.logprobs for part in own if part.logprobs is not None]
        for name in ("tokens", "text_offset"):
            assert [x for part in told for x in getattr(part, name)] == getattr(one.logprobs, name)
        tops = [top for part in told for top in part.top_logprobs]
        for got, top in zip(tops, one.logprobs.top_logprobs, strict=True):
            assert got == (None if top is None else pytest.approx(top, abs=1e-4))
        assert own[-1].finish_reason == one.finish_reason


def test_prompts_of_several_people_at_once_have_their_own(running: Running) -> None:
    texts = [PROMPT, "a big red dog", "the mat", "dog"]
    kinds: list[tuple[str, str, int | None]] = [
        ("ann", "poems", 1), ("bob", "secret-plans", 3), ("ann", BASE, None), ("ann", "letters", 2)
    ]  # fmt: skip
    wanted = [(kinds[i % 4], texts[(i // 4) % 4], i % 3) for i in range(24)]

    def ask(one: Any) -> Any:
        (space, model, _), text, top = one
        more = {"echo": True} if top else {}
        return complete(running.openai(space), model, text, logprobs=top, **more).choices[0]

    with ThreadPoolExecutor(12) as pool:
        for ((_, _, seed), text, top), made in zip(wanted, pool.map(ask, wanted), strict=True):
            if top:
                check_echo(made.logprobs, seed, text, top)
            assert made.text.endswith(expected(seed, text, 4))


def test_prompt_logprobs_are_as_vllm_has_them(client: Any) -> None:
    made = complete(client, prompt=[PROMPT, "a dog"], n=2, extra_body={"prompt_logprobs": 2}).choices
    assert [one.text for one in made[::2]] == [expected(1, PROMPT, 4), expected(1, "a dog", 4)]
    for one, text in zip(made, [PROMPT, PROMPT, "a dog", "a dog"], strict=True):
        check_likely(one.prompt_logprobs, 1, text)
        assert one.logprobs is None


def check_likely(found: Any, seed: int | None, text: str) -> None:
    first, *rest = found
    assert first is None
    for likely, row, own in zip(rest, rows_of(seed, text), prompt_ids(text)[1:], strict=True):
        assert next(iter(likely)) == str(own)
        assert {*likely} == {str(own), *(str(int(i)) for i in row.topk(2).indices)}
        for number, told in likely.items():
            assert told["logprob"] == pytest.approx(float(row[int(number)]), abs=1e-4)
            assert told["rank"] == 1 + int((row > row[int(number)]).sum())
            assert told["decoded_token"] == tokenizer().decode([int(number)])


def test_a_chat_has_them_beside_its_choices(client: Any) -> None:
    made = client.chat.completions.create(
        model="letters", messages=MESSAGES, max_tokens=3, temperature=0, n=2, extra_body={"prompt_logprobs": 2}
    )
    text = tokenizer().apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    check_likely(made.prompt_logprobs, 2, text)
    assert [one.message.content for one in made.choices] == [expected(2, text, 3)] * 2
    none = client.chat.completions.create(model="letters", messages=MESSAGES, max_tokens=3, temperature=0)
    assert not hasattr(none, "prompt_logprobs")


def test_echo_and_prompt_logprobs_together_have_each_their_own_number(client: Any) -> None:
    made = complete(client, logprobs=1, echo=True, extra_body={"prompt_logprobs": 3}).choices[0]
    check_echo(made.logprobs, 1, PROMPT, 1)
    assert max(len(one) for one in made.prompt_logprobs[1:]) == 4


def test_numbers_come_back_as_the_text_that_they_are(client: Any) -> None:
    made = complete(client, prompt=prompt_ids(PROMPT), logprobs=1, echo=True, count=1).choices[0]
    assert made.text == PROMPT + expected(1, PROMPT, 1)
    check_echo(made.logprobs, 1, PROMPT, 1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"max_tokens": 0}, "max_tokens: 0 only with echo"),
        ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs: not with stream"),
        ({"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs"),
        ({"extra_body": {"prompt_logprobs": -1}}, "prompt_logprobs"),
        ({"extra_body": {"prompt_logprobs": True}}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_had_is_named(client: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=told) as refused:
        client.completions.create(model="poems", prompt=PROMPT, **more)
    assert refused.value.param == told.partition(":")[0]


def test_tokens_begin_where_they_begin_in_the_text(running: Running) -> None:
    """Also behind what begins every text, where characters have several tokens, and in a long text."""
    import asyncio

    prompts = Prompts(byte_tokenizer(), 256)
    text = "aé€😀b"
    ids = asyncio.run(prompts.plain(text, "prompt", "t"))
    found = asyncio.run(prompts.offsets(ids, True, "t"))
    assert found == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]
    long = asyncio.run(prompts.plain("é" * LONG, "prompt", "t"))
    assert asyncio.run(prompts.offsets(long, True, "t")) == [i // 2 for i in range(2 * LONG)]
    begun = loaded_with_opening()
    ids = asyncio.run(begun.plain("the cat", "prompt", "t"))
    assert asyncio.run(begun.offsets(ids, True, "t")) == [0, *asyncio.run(prompts_of(ids[1:]))]


def loaded_with_opening() -> Prompts:
    """The tiny base's tokenizer, with a token that begins every text."""
    import copy

    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tokenizer())
    begin = made.convert_ids_to_tokens([5])[0]
    made.bos_token = begin
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, 5)]
    )
    return Prompts(made, 96)


async def prompts_of(ids: Any) -> list[int]:
    return await Prompts(tokenizer(), 96).offsets(ids, False, "t")


def test_the_reference_is_another_one_for_each_adapter() -> None:
    assert loaded("llama", base_folder()) is not None
    rows = [rows_of(seed, PROMPT) for seed in (None, 1, 2, 3)]
    assert all(float((a - b).abs().max()) > 0.1 for i, a in enumerate(rows) for b in rows[:i])


@pytest.mark.parametrize(
    ("more", "param"),
    [({"logprobs": 4, "echo": True}, "logprobs"), ({"extra_body": {"prompt_logprobs": 4}}, "prompt_logprobs")],
)
def test_one_request_has_so_many_and_no_more(
    client: Any, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], param: str
) -> None:
    count = 5 * len(prompt_ids(PROMPT))
    monkeypatch.setattr(generation_routes, "SCORED", 2 * count)
    assert len(complete(client, n=2, **more).choices) == 2
    with pytest.raises(openai.BadRequestError, match=f"{3 * count} numbers for these prompts") as refused:
        complete(client, prompt=[PROMPT] * 3, **more)
    assert refused.value.param == param
