"""Rows as token numbers, and which of them the loss is on: plain text, prompt and completion, chats.

What the model is asked to say is known as spans of the rendered text, and the spans become tokens by where the
tokenizer itself puts the boundary: the tokens before an answer are those that the model will be given when it is
asked for one. No offsets are used, so every tokenizer will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, islice, pairwise
from typing import Any, Literal, final

from ...errors import ConfigError, first_line
from .neutral import Again, Kept, Write, Written, keep_apart
from .spelling import Speller
from .turn_marks import ASSISTANT, Message, marks_of, split_tools

__all__ = [
    "ChatTemplate",
    "Ending",
    "Example",
    "Render",
    "Rendered",
    "Tokenized",
    "render_pair",
    "render_text",
    "tokenize",
]

CHUNK = 512  # rows that are tokenised at once
PROBE = "kilotune"  # an answer, behind which an end of the turn is looked for
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Ending = Literal["asked", "closed", "continued"]
"""How a prompt ends: where an answer begins, behind the last message, or within it, for the model to go on with it."""
Render = Callable[[Sequence[Message], bool, bool], str]
"""(messages, whether the prompt of an answer follows, whether the last one goes on) -> the text; raises ConfigError."""
Encode = Callable[[Sequence[str]], list[list[int]]]


@final
@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: as the tokenizer is given it.
        answers: (start, end) in characters of what the model is to say, in order and apart from each other.
        bare: whether the tokenizer's own special tokens are to be added (a chat template writes them itself).
        speller: makes the tokens, where messages hold marks of turns that are only words; None: the tokenizer does.
        held: these marks.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    bare: bool = True
    speller: Speller | None = None
    held: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Example:
    """A row as token numbers; ``learn`` (same length) says on which of them the loss is."""

    ids: list[int]
    learn: list[bool]


@final
@dataclass(frozen=True)
class Tokenized:
    """Rows as token numbers, and of how many the tokens reach across the beginning or end of an answer."""

    examples: list[Example]
    joined: int


# -- text ----------------------------------------------------------------------------------------------


def render_text(text: str) -> Rendered:
    """Plain text: the loss is on all of it."""
    return Rendered(text, ((0, len(text)),))


def render_pair(prompt: str, completion: str) -> Rendered:
    """A prompt and its completion, one directly after the other."""
    return Rendered(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))


@final
class ChatTemplate:
    """Chats by a template; the assistant's messages are the answers, with what ends them.

    What a message says never begins or ends a turn: tokens that the template marks turns with are words where a message
    holds them (:mod:`~kilotune.train.data.turn_marks`). A developer's message is the system's for a template that
    knows no developers.

    Args:
        tokenizer: the model's.
        template: instead of the tokenizer's own.
        render: what renders it; None: transformers, here.
        speller: makes what spells tokens out; None: a new one.

    Raises:
        ConfigError: the tokenizer has no template.

    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        render: Render | None = None,
        speller: Callable[[tuple[str, ...]], Speller] | None = None,
    ) -> None:
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template, so messages cannot be rendered: put the model's "
                "chat_template.jinja into its folder, take the model that was tuned for chat, or give the columns "
                "prompt and completion"
            )
        self._tokenizer = tokenizer
        try:
            self._template = str(tokenizer.get_chat_template(template))
        except ValueError as error:  # several templates, and none of them the usual one
            raise ConfigError(f"the tokenizer's chat templates: {first_line(error)}") from error
        self._make_speller = partial(Speller, tokenizer) if speller is None else speller
        self._render = self._rendered if render is None else render
        self._marked, self._developers = bool(GENERATION.search(self._template)), "developer" in self._template
        self._special = tuple({*map(str, tokenizer.all_special_tokens), *tokenizer.get_added_vocab()} - {""})
        self._marks = marks_of(tokenizer, self._text)

    def render(self, messages: Sequence[Message]) -> list[Rendered]:
        """One text, as a rule.

        Where the template writes an earlier message differently once a later one follows (leaving out its reasoning,
        say), there is a text for each answer, which is what the model sees when it gives it.

        Raises:
            ConfigError: the template refuses these messages, or one of their texts cannot be kept apart from its marks.

        """
        return self._apart(messages, self._by_marks if self._marked else self._by_turns)

    def prompt(self, messages: Sequence[Message], ending: Ending = "asked") -> Rendered:
        """The chat up to where the answer begins, or with another ending.

        Behind the messages there may be tools, ``{"tools": [...]}``, which the template gets as such.

        Raises:
            ConfigError: as :meth:`render`.

        """
        if ending == "continued":
            return self._apart(messages, self._unfinished, lambda some, _: self._text(some, going_on=True))[0]
        return self._apart(messages, self._asked if ending == "asked" else self._closed)[0]

    @property
    def template(self) -> str:
        """Its text."""
        return self._template

    @cached_property
    def turn_end(self) -> int | None:
        """The special token that the template puts behind an answer; it need not be the end-of-text token."""
        with suppress(ConfigError):
            text = self._text([{"role": "user", "content": "x"}, {"role": ASSISTANT, "content": PROBE}])
            ids = _ids(self._tokenizer, [text.rpartition(PROBE)[2]])[0]
            return ids[0] if ids and ids[0] in self._tokenizer.all_special_ids else None
        return None

    def warm(self) -> None:
        """Make now what is else made when a text first holds a mark: seconds for the largest vocabularies."""
        with suppress(ConfigError):
            _ = self._speller

    @cached_property
    def _speller(self) -> Speller:
        return self._make_speller(tuple(sorted(self._marks.tokens)))

    def _apart(self, messages: Sequence[Message], write: Write, again: Again | None = None) -> list[Rendered]:
        """What is written, in which no text of a message makes a mark of a turn."""
        if not self._developers:
            messages = [{**one, "role": "system"} if one.get("role") == "developer" else one for one in messages]
        kept = keep_apart(self._marks, messages, write, again or self._text)
        for i, message in enumerate(kept.neutral.messages):
            content = message.get("content")
            if isinstance(content, (list, dict)) and content and str(content) in kept.written[-1].text:
                raise ConfigError(
                    f"messages[{i}].content is no text, and the chat template writes it as Python does "
                    f"({str(content)[:40]} ...): make one text of it"
                )
        if not kept.held:
            return [Rendered(item.text, item.answers, bare=False) for item in kept.written]
        try:
            speller = self._speller
        except ConfigError as error:
            mark, place = next(iter(kept.held.items()))
            raise ConfigError(f"{place} makes {mark!r}, and {error}: leave it out, or write it otherwise") from error
        if any(other in item.text for other in speller.other.values() for item in kept.written):
            raise ConfigError("the messages hold a mark of a turn, and a private character of Unicode: leave one out")
        return [_spelled(kept, item, speller) for item in kept.written]

    # -- the template ----------------------------------------------------------------------------------

    def _asked(self, messages: Sequence[Message]) -> list[Written]:
        return [Written(self._text(messages, prompt=True), (), len(messages), prompt=True)]

    def _closed(self, messages: Sequence[Message]) -> list[Written]:
        return [Written(self._text(messages), (), len(messages))]

    def _unfinished(self, messages: Sequence[Message]) -> list[Written]:
        return [Written(self._text(messages, going_on=True), (), len(messages))]

    def _by_turns(self, messages: Sequence[Message]) -> list[Written]:
        chat, tools = split_tools(messages)
        more: list[Message] = [] if tools is None else [{"tools": tools}]
        turns = [i for i, message in enumerate(chat) if message["role"] == ASSISTANT]
        whole = self._text(messages)
        upto = [self._text([*chat[: i + 1], *more]) if i + 1 < len(chat) else whole for i in turns]
        answers = [(self._start(chat[:i], more, text), self._end(text)) for i, text in zip(turns, upto)]
        if all(whole.startswith(text[:end]) for text, (_, end) in zip(upto, answers)):
            return [Written(whole, tuple(answers), len(messages))]
        return [Written(text, (answer,), i + 1) for i, text, answer in zip(turns, upto, answers)]

    def _text(self, messages: Sequence[Message], prompt: bool = False, going_on: bool = False) -> str:
        return self._render(messages, prompt, going_on)

    def _rendered(self, messages: Sequence[Message], prompt: bool, going_on: bool) -> str:
        chat, tools = split_tools(messages)
        with _refusals():
            text = self._tokenizer.apply_chat_template(
                list(chat),
                tools=tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=going_on,
            )
        return str(text)

    def _start(self, before: Sequence[Message], tools: Sequence[Message], text: str) -> int:
        """Where the answer begins in ``text``, which ends with it: after what the model is given to answer."""
        if not before:  # no template renders an empty chat: what it puts before any answer is taken from another one
            asked = [{"role": "user", "content": "x"}]
            header = self._text(asked, prompt=True).removeprefix(self._text(asked))
            return text.find(header) + len(header) if header and header in text else 0
        given = self._text([*before, *tools], prompt=True)
        if text.startswith(given):
            return len(given)
        # The template ends what it gives the model with words that it leaves out of the chat afterwards (a tag that
        # begins the reasoning): the answer begins where the two part.
        parting = (i for i, (mine, its) in enumerate(zip(text, given)) if mine != its)
        return next(parting, min(len(text), len(given)))

    def _end(self, text: str) -> int:
        """Where the answer ends: after the token that ends a turn, without the blanks that templates put behind it."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self._special) else len(text)

    def _by_marks(self, messages: Sequence[Message]) -> list[Written]:
        """The template says itself what the assistant's words are, between its generation marks.

        ``apply_chat_template`` gives only tokens for them, and those are wrong where an answer begins or ends with a
        blank; so the spans are taken from the function under it. Tested with transformers 5.23.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        chat, tools = split_tools(messages)
        with _refusals():
            texts, spans = render_jinja_template(
                conversations=[list(chat)],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        answers = tuple((start, end) for start, end in spans[0] if end > start)
        return [Written(texts[0], answers, len(messages))]


def _spelled(kept: Kept, item: Written, speller: Speller) -> Rendered:
    """A chat as a speller takes it: the answers move, for the marks are longer than what stood for them."""
    edges = sorted({0, len(item.text), *(at for span in item.answers for at in span)})
    pieces = [kept.neutral.spelled(item.text[a:b], speller) for a, b in pairwise(edges)]
    moved = dict(zip(edges, accumulate(map(len, pieces), initial=0)))
    answers = tuple((moved[start], moved[end]) for start, end in item.answers)
    return Rendered("".join(pieces), answers, bare=False, speller=speller, held=tuple(kept.held))


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template says against the messages, as a ConfigError."""
    try:
        yield
    except Exception as error:  # templates raise what they like: jinja2's errors, Python's, and those of their own
        raise ConfigError(f"the chat template refuses these messages: {first_line(error)}") from error


# -- tokens --------------------------------------------------------------------------------------------


def tokenize(tokenizer: Any, rendered: Iterable[Rendered], loss_on: str) -> Tokenized:
    """The token numbers of rows, in order; ``loss_on`` is ``answer`` or ``all``.

    Plain text, prompts and completions begin with the special tokens that the tokenizer begins a text with, and end
    with its end-of-text token, which belongs to the answer. Chats are as the template wrote them.
    """
    before = _opening(tokenizer)
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    joined = 0
    for chunk in _chunks(rendered):
        for item, (ids, learn, across) in zip(chunk, _encoded(tokenizer, chunk)):
            joined += across
            first, last = (before, after) if item.bare else ([], [])
            learns = [*([False] * len(first)), *learn, *([True] * len(last))]
            whole = [*first, *ids, *last]
            examples.append(Example(whole, [True] * len(whole) if loss_on == "all" else learns))
    return Tokenized(examples, joined)


def _chunks(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    chunk: list[Rendered] = []
    for item in rendered:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text (some put others behind it)."""
    empty, some = _ids(tokenizer, [""], special=True)[0], _ids(tokenizer, ["a"], special=True)[0]
    same = next((i for i, (one, other) in enumerate(zip(empty, some)) if one != other), min(len(empty), len(some)))
    return empty[:same]


def _ids(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    if not texts:
        return []
    # verbose: else the tokenizer says that a text is longer than the model takes, which is counted and told here.
    found = tokenizer(
        list(texts), add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [list(map(int, ids)) for ids in found["input_ids"]]


Encoded = tuple[list[int], list[bool], bool]
"""Token numbers, whether each is learned, and whether a token would reach across an edge of an answer."""


def _encoded(tokenizer: Any, chunk: Sequence[Rendered]) -> list[Encoded]:
    """Each row by its speller, or by the tokenizer where it has none."""
    found: dict[int, Encoded] = {}
    for speller in {id(item.speller): item.speller for item in chunk}.values():
        rows = [i for i, item in enumerate(chunk) if item.speller is speller]
        encode: Encode = partial(_ids, tokenizer) if speller is None else speller.ids
        found.update(zip(rows, _encode(encode, [chunk[i] for i in rows])))
    return [found[i] for i in range(len(chunk))]


def _encode(encode: Encode, chunk: Sequence[Rendered]) -> list[Encoded]:
    edges = [sorted({0, len(item.text), *(at for span in item.answers for at in span)}) for item in chunk]
    wholes = encode([item.text for item in chunk])
    pieces = iter(encode([item.text[a:b] for item, found in zip(chunk, edges) for a, b in pairwise(found)]))
    parts = [list(islice(pieces, len(found) - 1)) for found in edges]
    apart = [[token for part in held for token in part] for held in parts]
    # Tokenised part by part, most rows come out as in one go. Else (some tokenizers put a mark before every text) it is
    # the beginnings of the text that tell: each must be what the row begins with.
    asked = [i for i, (one, other) in enumerate(zip(apart, wholes)) if one != other]
    begun = iter(encode([chunk[i].text[:at] for i in asked for at in edges[i][1:-1]]))
    joined = [False] * len(chunk)
    for i in asked:
        beginnings = list(islice(begun, len(edges[i]) - 2))
        if all(wholes[i][: len(ids)] == ids for ids in beginnings):
            counts = [0, *map(len, beginnings), len(wholes[i])]
            parts[i] = [wholes[i][a:b] for a, b in pairwise(counts)]
        else:  # the parts by themselves then, so that what comes before an answer is what the model will be given
            joined[i] = True
    learned = [[_inside(a, b, item.answers) for a, b in pairwise(found)] for item, found in zip(chunk, edges)]
    return [
        ([token for part in held for token in part], [flag for part, flag in zip(held, flags) for _ in part], across)
        for held, flags, across in zip(parts, learned, joined)
    ]


def _inside(start: int, end: int, answers: Sequence[tuple[int, int]]) -> bool:
    return any(a <= start and end <= b for a, b in answers)
