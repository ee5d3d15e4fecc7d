"""The service speaks OpenAI's API: its own client against it, and the answers against transformers' own generate."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from kilotune.train.finished.text_generation import Writer
from tests.support.http_support import BASE, Running, batching, expected, prompt_ids, reference, serving, tokenizer

PROMPT = "the cat sat on"
NAMES = [(BASE, None), ("poems", 1), ("letters", 2), ("poems/live", 1), ("poems/1", 1)]
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a big red dog"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return running.openai()


def complete(client: Any, model: str = "poems", count: int = 10, **more: Any) -> Any:
    return client.completions.create(
        model=model, prompt=more.pop("prompt", PROMPT), max_tokens=count, **{"temperature": 0, **more}
    )


# -- texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "seed"), NAMES)
def test_a_completion_is_the_adapters_own(client: Any, model: str, seed: int | None) -> None:
    made = complete(client, model)
    assert made.choices[0].text == expected(seed, PROMPT, 10)
    assert made.model == model
    assert made.usage.prompt_tokens == len(prompt_ids(PROMPT))


def test_the_references_differ() -> None:
    assert len({expected(seed, PROMPT, 10) for seed in (None, 1, 2, 3)}) == 4


@pytest.mark.parametrize("model", [BASE, "poems"])
def test_a_stream_says_the_same(client: Any, model: str) -> None:
    whole = complete(client, model)
    events = list(complete(client, model, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for event in events for choice in event.choices) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(events) > 4


def test_a_chat_is_what_the_template_makes_of_it(client: Any) -> None:
    whole = client.chat.completions.create(model="poems", messages=MESSAGES, max_completion_tokens=8, temperature=0)
    text = tokenizer().apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert whole.choices[0].message.content == expected(1, text, 8)
    assert whole.choices[0].message.role == "assistant"
    ids = Writer(reference(None), tokenizer()).rendered(MESSAGES)
    assert whole.usage.prompt_tokens == len(ids)
    events = list(
        client.chat.completions.create(model="poems", messages=MESSAGES, max_tokens=8, temperature=0, stream=True)
    )
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_prompt_has_the_tokens_that_training_gives_it(running: Running) -> None:
    writer = Writer(reference(None), tokenizer())
    for text in (PROMPT, "a", "  the  dog ", "the</s>cat", "ünï"):
        assert list(asyncio.run(running.service.prompts.plain(text, "prompt", "ann"))) == writer.plain(text)


def test_token_numbers_are_a_prompt_too_and_there_may_be_several(client: Any) -> None:
    ids = prompt_ids(PROMPT)
    made = complete(client, prompt=[ids, prompt_ids("a big dog"), ids])
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert made.choices[0].text == made.choices[2].text == expected(1, PROMPT, 10)
    assert made.choices[1].text == expected(1, "a big dog", 10)
    assert made.usage.prompt_tokens == 2 * len(ids) + len(prompt_ids("a big dog"))
    assert complete(client, prompt=ids).choices[0].text == made.choices[0].text
    assert complete(client, prompt=[PROMPT, "a big dog"]).choices[1].text == made.choices[1].text


def test_an_echo_has_the_prompt_in_front(client: Any) -> None:
    assert complete(client, echo=True).choices[0].text == PROMPT + expected(1, PROMPT, 10)
    events = list(complete(client, echo=True, stream=True))
    assert "".join(event.choices[0].text for event in events) == PROMPT + expected(1, PROMPT, 10)


def test_a_stop_ends_the_text_and_is_not_in_it(client: Any) -> None:
    whole = expected(1, PROMPT, 10)
    stop = whole[4:7]
    for options in ({"stop": stop}, {"stop": ["never this", stop]}):
        made = complete(client, **options).choices[0]
        assert made.text == whole[: whole.index(stop)]
        assert made.finish_reason == "stop"
    assert "".join(event.choices[0].text for event in complete(client, stop=stop, stream=True)) == made.text


def test_a_seed_decides_what_is_drawn(client: Any) -> None:
    def drawn(**more: Any) -> list[str]:
        return [c.text for c in complete(client, temperature=1.5, count=12, **more).choices]

    four = drawn(seed=5, n=4)
    assert four == drawn(seed=5, n=4)
    assert len(set(four)) == 4
    assert drawn(seed=5) == four[:1]
    assert drawn(seed=6) != drawn(seed=5)
    assert drawn(seed=-6) != drawn(seed=6)
    assert len({*drawn(), *drawn(), *drawn()}) > 1


def test_several_answers_stream_side_by_side(client: Any) -> None:
    whole = complete(client, temperature=1.2, seed=3, n=3)
    parts = ["", "", ""]
    order = []
    for event in complete(client, temperature=1.2, seed=3, n=3, stream=True):
        parts[event.choices[0].index] += event.choices[0].text
        order.append(event.choices[0].index)
    assert parts == [choice.text for choice in whole.choices]
    assert order != sorted(order)
    assert whole.usage.prompt_tokens == len(prompt_ids(PROMPT)), "one prompt, however many answers"
    assert whole.usage.completion_tokens > 10


def test_a_plain_engine_serves_the_same_and_sees_what_the_request_says(tmp_path: Path) -> None:
    with serving(tmp_path) as plain:
        _sees_what_the_request_says(plain)
        assert complete(plain.openai(), "letters").choices[0].text == expected(2, PROMPT, 10)


def _sees_what_the_request_says(running: Running) -> None:
    more = {
        "top_k": 5,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "timeout": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
    }
    own: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"5": 2, "70": -1.5}}
    complete(running.openai(), temperature=0.7, top_p=0.4, seed=9, stop="x", count=3, extra_body=more, **own)
    asked = running.engine.asked[-1]
    assert (asked.tenant, asked.adapter.name, asked.adapter.namespace) == ("ann", "poems", "ann")
    wanted = asked.sampling
    assert (wanted.temperature, wanted.top_p, wanted.seed, wanted.stop) == (0.7, 0.4, 9, ("x",))
    assert (wanted.presence_penalty, wanted.frequency_penalty, wanted.repetition_penalty) == (0.5, -1.0, 1.5)
    assert (wanted.min_p, wanted.logit_bias) == (0.1, ((5, 2.0), (70, -1.5)))
    assert (wanted.top_k, wanted.ignore_eos, wanted.stop_token_ids, wanted.max_tokens) == (5, True, (7,), 3)


def test_penalties_are_those_of_transformers_generate(client: Any) -> None:
    """Side by side with requests that have none, in one batch."""
    ids = torch.tensor([prompt_ids(PROMPT)])
    more: dict[str, Any] = {"repetition_penalty": 1.7, "sequence_bias": [[[20], 2.0], [[21], -3.0]]}
    made = reference(1).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, **more
    )
    wanted = tokenizer().decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    own: dict[str, Any] = {"extra_body": {"repetition_penalty": 1.7}, "logit_bias": {"20": 2, "21": -3}}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, client, **(own if odd else {})) for odd in (True, False) * 4]
        texts = [one.result().choices[0].text for one in asked]
    assert wanted != expected(1, PROMPT, 10)
    assert texts == [wanted, expected(1, PROMPT, 10)] * 4


def test_frequency_and_presence_are_taken_off_as_openai_says(client: Any) -> None:
    ids, made = prompt_ids(PROMPT), []
    for _ in range(8):
        row = log_probabilities(1, ids + made)[-1].tolist()
        row = [value - 1.5 * made.count(i) - 1.9 * (i in made) for i, value in enumerate(row)]
        made.append(row.index(max(row)))
    got = complete(client, count=8, frequency_penalty=1.5, presence_penalty=1.9, extra_body={"ignore_eos": True})
    assert got.choices[0].text == tokenizer().decode(made, clean_up_tokenization_spaces=False)


# -- log-probabilities -------------------------------------------------------------------------------


def log_probabilities(seed: int | None, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(seed)(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_log_probabilities_of_a_completion_are_the_models(client: Any) -> None:
    made = complete(client, logprobs=3, count=5).choices[0]
    ids = prompt_ids(PROMPT)
    for place, (token, value, top) in enumerate(
        zip(made.logprobs.tokens, made.logprobs.token_logprobs, made.logprobs.top_logprobs)
    ):
        row = log_probabilities(1, ids)[-1]
        number = int(row.argmax())
        assert token == tokenizer().decode([number])
        assert math.isclose(value, float(row[number]), abs_tol=1e-4)
        assert len(top) <= 3
        assert math.isclose(max(top.values()), value, abs_tol=1e-6)
        assert made.logprobs.text_offset[place] == len(tokenizer().decode(ids[len(prompt_ids(PROMPT)) :]))
        ids.append(number)
    events = list(complete(client, logprobs=3, count=5, stream=True))
    values = [v for event in events if event.choices[0].logprobs for v in event.choices[0].logprobs.token_logprobs]
    assert values == made.logprobs.token_logprobs


def test_log_probabilities_of_a_chat_name_their_bytes(client: Any) -> None:
    made = client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = made.choices[0].logprobs.content
    assert len(content) == made.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in content)
    assert all(entry.top_logprobs[0].token == entry.token for entry in content)
    none = client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True)
    values = [entry.logprob for entry in none.choices[0].logprobs.content]
    assert values == pytest.approx([entry.logprob for entry in content], abs=1e-5)
    assert all(entry.top_logprobs == [] for entry in none.choices[0].logprobs.content)


# -- models ------------------------------------------------------------------------------------------


def test_models_are_the_base_and_ones_own(running: Running) -> None:
    assert [m.id for m in running.openai("ann").models.list()] == [BASE, "letters", "poems"]
    assert [m.id for m in running.openai("bob").models.list()] == [BASE, "secret-plans"]
    assert [m.id for m in running.openai("carl").models.list()] == [BASE]
    one = running.openai("ann").models.retrieve("poems/live")
    assert (one.id, one.root, one.kilotune["version"], one.kilotune["aliases"]) == ("poems/live", BASE, 1, {"live": 1})


def test_the_base_says_whether_it_has_a_chat_template(running: Running) -> None:
    with running.client(running.keys["ann"]) as client:
        base, *others = client.get("/v1/models").json()["data"]
        assert (base["id"], base["chat_template"]) == (BASE, True)
        assert all(model["chat_template"] for model in others), "an adapter is asked as its base is"
        assert client.get(f"/v1/models/{BASE}").json()["chat_template"] is True


def test_models_say_what_they_are_made_of_and_how_long_their_texts_are(running: Running) -> None:
    with running.client(running.keys["ann"]) as client:
        found = client.get("/v1/models").json()["data"]
        assert [(one["id"], one["parent"]) for one in found] == [(BASE, None), ("letters", BASE), ("poems", BASE)]
        assert {one["max_model_len"] for one in found} == {running.engine.max_length}
        assert client.get("/v1/models/poems/live").json()["parent"] == BASE


def test_a_base_may_be_called_as_on_the_hub(tmp_path: Path) -> None:
    """By its name as it is, in paths also quoted; adapters' names have no slash, so it is none of theirs."""
    with serving(tmp_path, base="org/tiny") as made:
        client = made.openai()
        assert complete(client, "org/tiny").choices[0].text == expected(None, PROMPT, 10)
        assert client.models.retrieve("org/tiny").id == "org/tiny"
        with made.client(made.keys["ann"]) as plain:
            for path in ("org/tiny", "org%2Ftiny", "org%2ftiny"):
                assert plain.get(f"/v1/models/{path}").json()["root"] == "org/tiny"
            assert plain.get("/v1/models/poems%2Flive").json()["kilotune"]["version"] == 1
        assert complete(client, "poems/live").choices[0].text == expected(1, PROMPT, 10)
        with pytest.raises(openai.NotFoundError):
            complete(client, "org/other")


def test_models_come_in_pages(running: Running) -> None:
    with running.client(running.keys["ann"]) as client:
        seen, after, pages = [], None, 0
        while True:
            query = {"limit": 1, **({} if after is None else {"after": after})}
            page = client.get("/v1/models", params=query).json()
            seen += [model["id"] for model in page["data"]]
            pages += 1
            if not page["has_more"]:
                break
            after = page["last_id"]
    assert seen == [BASE, "letters", "poems"]
    assert pages == 3


# -- one mixed stream --------------------------------------------------------------------------------


def test_tenants_at_once_get_their_own_answers(running: Running) -> None:
    """Forty answers of two tenants and the base, all in flight together."""

    async def ask(client: Any, model: str) -> str:
        made = await client.completions.create(model=model, prompt=PROMPT, max_tokens=10, temperature=0, stream=True)
        return "".join([event.choices[0].text async for event in made])

    async def all_of_them() -> list[str]:
        clients = {
            space: openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=running.keys[space], max_retries=0)
            for space in ("ann", "bob")
        }
        try:
            return await asyncio.gather(*(ask(clients[space], model) for space, model, _ in wanted))
        finally:
            for client in clients.values():
                await client.close()

    kinds = [("ann", "poems", 1), ("bob", "secret-plans", 3), ("ann", "letters", 2), ("bob", BASE, None)]
    wanted = kinds * 10
    assert asyncio.run(all_of_them()) == [expected(seed, PROMPT, 10) for _, _, seed in wanted]


def test_the_raw_stream_is_server_sent_events(running: Running) -> None:
    body = {"model": "poems", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    with running.client(running.keys["ann"]) as client, client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["id"].startswith("cmpl-") for line in lines[:-1])
