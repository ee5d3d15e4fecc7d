"""Rows as tokens: each mask is held against one that is put together by hand, part by part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from kilotune.errors import ConfigError
from kilotune.train.data.rendering import ChatTemplate, Example, Rendered, render_pair, render_text, tokenize
from tests.support.train_data import byte_level, corpus, metaspace, word_piece

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same text, but the template says itself what the assistant's words are.
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# No special tokens at all: the model must learn the names itself, and the header is given when it is asked.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# What newer models do: the reasoning of earlier answers is left out once another question follows.
FORGETS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# And what some do at the end: the model is given a tag that the chat itself does not have.
OPENS = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
REFUSAL = "{{ raise_exception('the first message must be a user\\'s') }}"
STRICT = "{% if messages[0]['role'] != 'user' %}" + REFUSAL + "{% endif %}" + CHATML

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does parse do?"},
    {"role": "assistant", "content": "It reads arguments."},
    {"role": "user", "content": "And format?"},
    {"role": "assistant", "content": "\n  It writes help,\n  in two columns. "},
]


def tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def by_hand(tokenizer: Any, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Token numbers and mask of parts that begin and end at special tokens or blanks, so that no token spans two."""
    ids = [(token, learned) for text, learned in parts for token in tokens(tokenizer, text)]
    return [token for token, _ in ids], [learned for _, learned in ids]


def one(tokenizer: Any, rendered: Rendered, loss_on: str = "answer") -> Example:
    return tokenize(tokenizer, [rendered], loss_on).examples[0]


def chatml_parts(messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    parts = []
    for message in messages:
        said = message["role"] == "assistant"
        parts += [(f"<|im_start|>{message['role']}\n", False), (f"{message['content']}<|im_end|>", said), ("\n", False)]
    return parts


# -- chats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["unmarked", "marked"])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:4], CHAT[1:3]], ids=["system", "two", "open", "one"])
def test_each_answer_of_a_chat_is_learned_with_what_ends_it(template: str, messages: list[dict[str, str]]) -> None:
    tokenizer = byte_level(chat_template=template)
    (rendered,) = ChatTemplate(tokenizer).render(messages)
    example = one(tokenizer, rendered)
    ids, learn = by_hand(tokenizer, chatml_parts(messages))
    assert (example.ids, example.learn) == (ids, learn)
    assert example.ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert sum(learn) > 3


def test_the_whole_chat_is_learned_if_asked() -> None:
    tokenizer = byte_level(chat_template=CHATML)
    (rendered,) = ChatTemplate(tokenizer).render(CHAT)
    example = one(tokenizer, rendered, loss_on="all")
    assert example.ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert all(example.learn)


@pytest.mark.parametrize("template", [CHATML, OPENS, PLAIN, LLAMA], ids=["chatml", "opens", "plain", "llama"])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_what_stands_before_an_answer_is_what_the_model_is_given(template: str, make: Any) -> None:
    """The tokens up to the answer are those of the prompt that transformers makes to ask for it."""
    tokenizer = make(chat_template=template)
    messages = CHAT[1:3]
    (rendered,) = ChatTemplate(tokenizer).render(messages)
    example = one(tokenizer, rendered)
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    first = example.learn.index(True)
    assert text.endswith("<think>\n") == (template is OPENS)
    assert example.ids[:first] == tokens(tokenizer, text.removesuffix("<think>\n"))
    answer = tokenizer.decode(example.ids[first:]).strip()
    assert answer.startswith("It reads arguments.")
    assert tokenizer.decode([i for i, learned in zip(example.ids, example.learn) if not learned]).count("reads") == 0


def test_a_llama_chat_of_two_turns_by_hand() -> None:
    tokenizer = metaspace(chat_template=LLAMA)
    (rendered,) = ChatTemplate(tokenizer).render(CHAT[1:])
    example = one(tokenizer, rendered)
    assert example.ids == tokenizer.apply_chat_template(CHAT[1:])["input_ids"]
    learned = [tokenizer.decode(ids).strip() for ids in runs(example)]
    assert learned == ["It reads arguments. </s>", "It writes help,\n  in two columns. </s>"]


def runs(example: Example) -> list[list[int]]:
    """The stretches of tokens that are learned."""
    text = "".join("x" if flag else "." for flag in example.learn)
    return [example.ids[match.start() : match.end()] for match in re.finditer("x+", text)]


def test_where_earlier_answers_are_rewritten_each_answer_is_an_example() -> None:
    tokenizer = byte_level(chat_template=FORGETS)
    chat = [
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>easy</think>Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "<think>hard</think>Three."},
    ]
    rendered = ChatTemplate(tokenizer).render(chat)
    first, second = (one(tokenizer, item) for item in rendered)
    user, answer = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>"
    forgot = f"{user.format('Two?')}Two.<|im_end|>\n{user.format('Three?')}"
    for example, before, said in ((first, user.format("Two?"), chat[1]), (second, forgot, chat[3])):
        ids, learn = by_hand(tokenizer, [(before, False), (answer.format(said["content"]), True), ("\n", False)])
        assert (example.ids, example.learn) == (ids, learn)
    assert len(ChatTemplate(tokenizer).render(chat[:2])) == 1


def test_a_chat_may_begin_with_an_answer() -> None:
    tokenizer = byte_level(chat_template=CHATML)
    chat = [{"role": "assistant", "content": "How can I help?"}, *CHAT[1:3]]
    (rendered,) = ChatTemplate(tokenizer).render(chat)
    example = one(tokenizer, rendered)
    assert (example.ids, example.learn) == by_hand(tokenizer, chatml_parts(chat))


def test_a_chat_without_an_answer_has_none() -> None:
    (rendered,) = ChatTemplate(byte_level(chat_template=CHATML)).render(CHAT[:2])
    assert rendered.answers == ()
    (rendered,) = ChatTemplate(byte_level(chat_template=MARKED)).render(CHAT[:2])
    assert rendered.answers == ()


def test_words_of_a_user_that_look_like_an_answer_are_not_learned() -> None:
    """The answers are found by where they stand, not by their words."""
    tokenizer = byte_level(chat_template=PLAIN)
    chat = [
        {"role": "user", "content": "Say yes.\nThe assistant: yes"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "yes"},
    ]
    (rendered,) = ChatTemplate(tokenizer).render(chat)
    first, second = rendered.answers
    text = "user: Say yes.\nThe assistant: yes\nassistant: yes\nuser: yes\nassistant: yes\n"
    assert rendered.text == text
    assert first == (len("user: Say yes.\nThe assistant: yes\nassistant: "), text.index("user: yes"))
    assert second == (len(text) - len("yes\n"), len(text))


def test_errors_of_templates_are_one_line() -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatTemplate(byte_level())
    with pytest.raises(ConfigError, match="the tokenizer's chat templates: "):
        ChatTemplate(byte_level(chat_template={"tool_use": CHATML, "rag": CHATML}))
    template = ChatTemplate(byte_level(chat_template=STRICT))
    with pytest.raises(ConfigError, match="refuses these messages: the first message must be a user's"):
        template.render(CHAT)
    assert len(template.render(CHAT[1:])) == 1


def test_transformers_own_mask_agrees_where_it_is_right() -> None:
    """Answers that neither begin nor end with a blank: there the library's mask of a marked template holds."""
    tokenizer = byte_level(chat_template=MARKED)
    messages = CHAT[:3]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    (rendered,) = ChatTemplate(tokenizer).render(messages)
    example = one(tokenizer, rendered)
    assert example.ids == found["input_ids"]
    assert example.learn == list(map(bool, found["assistant_masks"]))


# -- prompt and completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, metaspace, word_piece])
def test_a_prompt_is_what_the_model_will_be_given_and_the_completion_is_learned(make: Any) -> None:
    tokenizer = make()
    for text in corpus()[:40]:
        at = text.find(" ", len(text) // 2)
        if at < 0:
            continue
        prompt, completion = text[:at], text[at:]
        example = one(tokenizer, render_pair(prompt, completion))
        given = list(tokenizer(prompt)["input_ids"])
        given = given[:-1] if make is word_piece else given  # [SEP] would end it
        assert example.ids[: len(given)] == given
        assert example.learn == [False] * len(given) + [True] * (len(example.ids) - len(given))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        whole = list(tokenizer(text)["input_ids"])
        assert example.ids == [*(whole[:-1] if make is word_piece else whole), *end]


def test_a_completion_that_grows_together_with_its_prompt_is_cut_off_from_it() -> None:
    """As one text, 'arg' and 'ument' would be one token, which the model is never given the half of."""
    tokenizer = byte_level()
    assert len(tokens(tokenizer, " argument")) < len(tokens(tokenizer, " arg")) + len(tokens(tokenizer, "ument"))
    found = tokenize(tokenizer, [render_pair("the arg", "ument"), render_pair("the", " argument")], "answer")
    assert found.joined == 1
    grown, apart = found.examples
    assert grown.ids == [*tokens(tokenizer, "the arg"), *tokens(tokenizer, "ument"), tokenizer.eos_token_id]
    assert grown.learn == [False] * len(tokens(tokenizer, "the arg")) + [True] * (len(tokens(tokenizer, "ument")) + 1)
    assert apart.ids == [*tokens(tokenizer, "the argument"), tokenizer.eos_token_id]


def test_empty_prompts_and_completions() -> None:
    tokenizer = metaspace()
    nothing = one(tokenizer, render_pair("", "yes"))
    assert nothing.ids == [*tokenizer("yes")["input_ids"], tokenizer.eos_token_id]
    assert nothing.learn == [False] + [True] * (len(nothing.ids) - 1)  # <s> is given
    silent = one(tokenizer, render_pair("no", ""))
    assert silent.ids == [*tokenizer("no")["input_ids"], tokenizer.eos_token_id]
    assert silent.learn == [False] * (len(silent.ids) - 1) + [True]


def test_loss_on_all_takes_the_prompt_too() -> None:
    tokenizer = metaspace()
    answer, everything = (one(tokenizer, render_pair("the", " end"), loss_on=on) for on in ("answer", "all"))
    assert answer.ids == everything.ids
    assert all(everything.learn)
    assert not all(answer.learn)


# -- text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_text_is_learned_whole_with_its_end(make: Any) -> None:
    tokenizer = make()
    texts = corpus()
    found = tokenize(tokenizer, map(render_text, texts), "answer").examples
    assert len(found) == len(texts)  # and so the chunks are put together in order
    opening = 1 if make is metaspace else 0
    for text, example in zip(texts, found):
        assert example.ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert example.learn == [False] * opening + [True] * (len(example.ids) - opening)


def test_a_tokenizer_without_an_end_adds_none() -> None:
    example = one(word_piece(), render_text("the end"))
    assert example.ids == list(word_piece()("the end")["input_ids"])[:-1]
