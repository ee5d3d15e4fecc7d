"""An uploaded file of training data: JSON lines as OpenAI has them, to rows of tokens; each fault with its line.

::

    supervised   {"messages": [..., {"role": "assistant", "content": "...", "weight": 1}], "tools": [...]}
    dpo          {"input": {"messages": [...], "tools": [...]},
                  "preferred_output": [{"role": "assistant", ...}], "non_preferred_output": [...]}
    reinforcement  {"messages": [..., {"role": "user", "content": "..."}], "tools": [...], ANYTHING ELSE}

``"user"`` beside them says whose line it is, and goes with that person (forgetting.py).

A message of an assistant with a weight of 0 is read and not learned. Of a DPO pair the two answers are learned. What a
reinforcement's line has beside its messages is for its grader.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from ...errors import ConfigError
from ...train.data.rendering import ChatTemplate, Rendered, tokenize

__all__ = ["FORMS", "Example", "TrainingFile", "read_example", "read_lines"]

Row = dict[str, Any]
TOLD = 20  # faults that are told of one file
MOST_LINE = 2_000_000  # bytes
MOST_MESSAGES = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = ("supervised", "dpo", "reinforcement")


@final
@dataclass(frozen=True)
class Example:
    """What is learned as one: one row, or a pair of rows, or a prompt.

    line: of the file, from 1. tokens: of all its rows. raw: the line itself, where a grader asks for parts of it.
    """

    line: int
    rows: tuple[Row, ...]
    raw: str = ""

    @property
    def tokens(self) -> int:
        """Of all its rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def item(self) -> dict[str, Any]:
        """What the line says."""
        found: dict[str, Any] = json.loads(self.raw)
        return found


@final
@dataclass(frozen=True)
class TrainingFile:
    """A file that can be trained on. ends: the token that ends an answer in the template, where it is a special one."""

    examples: tuple[Example, ...]
    ends: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(example.tokens for example in self.examples)


def read_lines(
    text: str, first: int, form: str, chats: ChatTemplate, tokenizer: Any, *, longest: int
) -> tuple[list[Example], list[str]]:
    """The examples of some lines of a file, and what is wrong with them, up to a number of faults.

    Args:
        text: the lines.
        first: the number of the first one.
        form: of each, one of FORMS.
        chats: renders messages as a request's are rendered.
        tokenizer: of the model.
        longest: tokens that a row may have.

    """
    faults: list[str] = []
    examples = []
    for number, line in enumerate(text.split("\n"), first):
        if not line.strip():
            continue
        try:
            examples.append(read_example(_object(line), form, chats, tokenizer, longest=longest, line=number, raw=line))
        except (ConfigError, RecursionError) as error:
            faults.append(f"line {number}: {error}")
            if len(faults) == TOLD:
                break
    return examples, faults


def read_example(
    given: Mapping[str, Any],
    form: str,
    chats: ChatTemplate,
    tokenizer: Any,
    *,
    longest: int,
    line: int = 0,
    raw: str = "",
) -> Example:
    """What a line of a file says, as rows; see :func:`read_lines`.

    Raises:
        ConfigError: what is wrong with it.

    """
    if not isinstance(given.get("user"), str | None):
        raise ConfigError(f"user: expected a text, whose line this is, got {type(given['user']).__name__}")
    if form == "reinforcement":
        (prompt,) = tokenize(tokenizer, [_prompt(given, chats)], "answer").examples
        if len(prompt.ids) >= longest:
            raise ConfigError(f"{len(prompt.ids)} tokens; the model takes {longest} with its answer")
        return Example(line, (_packed(prompt.ids, [-100] * len(prompt.ids)),), raw)
    make = _supervised if form == "supervised" else _pair
    return Example(line, tuple(_row(one, tokenizer, longest) for one in make(given, chats)))


def _object(line: str) -> Mapping[str, Any]:
    if len(line) > MOST_LINE:
        raise ConfigError(f"more than {MOST_LINE} characters")
    try:
        found = json.loads(line, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # a number of too many digits
        raise ConfigError(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"expected an object, got {type(found).__name__}")
    return found


def _no_number(word: str) -> Any:
    raise ConfigError(f"{word} is no JSON")


# -- messages --------------------------------------------------------------------------------------------


def _messages(given: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}: expected a list of messages")
    if len(given) > MOST_MESSAGES:
        raise ConfigError(f"{where}: {len(given)} messages; at most {MOST_MESSAGES} are taken")
    return [_message(one, f"{where}[{i}]") for i, one in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected an object")
    if given.get("role") not in ROLES:
        raise ConfigError(f"{where}.role: expected one of {', '.join(ROLES)}, got {given.get('role')!r:.50}")
    content = given.get("content")
    if isinstance(content, list):
        content = _parts(content, where)
    calls = given.get("tool_calls")
    if content is None and not calls:
        raise ConfigError(f"{where}.content: is missing")
    if content is not None and not isinstance(content, str):
        raise ConfigError(f"{where}.content: expected a text, got {type(content).__name__}")
    if given.get("weight") not in (None, 0, 1):
        raise ConfigError(f"{where}.weight: expected 0 or 1, got {given['weight']!r:.50}")
    more = {key: given[key] for key in ("name", "tool_call_id") if given.get(key) is not None}
    told = {"role": given["role"], "content": content or "", **more}
    return {**told, **({"tool_calls": calls} if calls else {}), "weight": given.get("weight", 1)}


def _parts(parts: list[Any], where: str) -> str:
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ConfigError(f"{where}.content[{i}]: only parts of text are served, got {kind!r:.50}")
    return "".join(part["text"] for part in parts)


def _plain(messages: Sequence[Mapping[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """As a template takes them, tools behind them."""
    if tools is not None and not isinstance(tools, list):
        raise ConfigError("tools: expected a list")
    chat = [{key: value for key, value in one.items() if key != "weight"} for one in messages]
    return [*chat, {"tools": tools}] if tools else chat


# -- forms -----------------------------------------------------------------------------------------------


def _supervised(given: Mapping[str, Any], chats: ChatTemplate) -> Iterator[Rendered]:
    if "messages" not in given:
        raise ConfigError("expected messages, as supervised fine-tuning has them; DPO's lines have input")
    messages = _messages(given["messages"], "messages")
    weights = [one["weight"] for one in messages if one["role"] == "assistant"]
    if not any(weights):
        raise ConfigError("messages: there is no assistant's message to learn")
    rendered = _rendered(chats, _plain(messages, given.get("tools")))
    if all(weights):
        yield from rendered
        return
    if sum(len(one.answers) for one in rendered) != len(weights):
        raise ConfigError("weight: this model's template does not tell the messages of an assistant apart")
    left = iter(weights)
    for one in rendered:
        answers = tuple(answer for answer in one.answers if next(left))
        if answers:
            yield replace(one, answers=answers)


def _pair(given: Mapping[str, Any], chats: ChatTemplate) -> Iterator[Rendered]:
    asked = given.get("input")
    if not isinstance(asked, dict):
        raise ConfigError("expected input, as DPO's lines have it; supervised ones have messages")
    before = _messages(asked.get("messages"), "input.messages")
    for name in ("preferred_output", "non_preferred_output"):
        answer = _messages(given.get(name), name)
        if [one["role"] for one in answer] != ["assistant"]:
            raise ConfigError(f"{name}: expected one message of the assistant's")
        (last, *others) = reversed(_rendered(chats, _plain([*before, *answer], asked.get("tools"))))
        if not last.answers:
            raise ConfigError(f"{name}: the template leaves nothing of it")
        del others  # of earlier messages, where a template writes each answer's text anew
        yield replace(last, answers=last.answers[-1:])


def _prompt(given: Mapping[str, Any], chats: ChatTemplate) -> Rendered:
    if "messages" not in given:
        raise ConfigError("expected messages, as reinforcement fine-tuning has them")
    messages = _messages(given["messages"], "messages")
    if messages[-1]["role"] == "assistant":
        raise ConfigError("messages: the last one is the assistant's, which the model is to say itself")
    try:
        found = chats.prompt(_plain(messages, given.get("tools")))
        found.text.encode()
        return found
    except UnicodeEncodeError:
        raise ConfigError("half of a surrogate pair, which is no character") from None


def _rendered(chats: ChatTemplate, messages: Sequence[dict[str, Any]]) -> list[Rendered]:
    try:
        found = chats.render(messages)
        for one in found:
            one.text.encode()
        return found
    except UnicodeEncodeError:
        raise ConfigError("half of a surrogate pair, which is no character") from None


def _row(rendered: Rendered, tokenizer: Any, longest: int) -> Row:
    (example,) = tokenize(tokenizer, [rendered], "answer").examples
    if len(example.ids) > longest:
        raise ConfigError(f"{len(example.ids)} tokens; the model takes {longest}")
    labels = [token if learn else -100 for token, learn in zip(example.ids, example.learn, strict=True)]
    if all(label == -100 for label in labels[1:]):
        raise ConfigError("no token to learn: the answer is empty")
    return _packed(example.ids, labels)


def _packed(ids: Sequence[int], labels: Sequence[int]) -> Row:
    """A row that takes eight bytes a token, and not eighty."""
    return {"input_ids": array("i", ids), "labels": array("i", labels)}
