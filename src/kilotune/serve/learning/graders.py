"""Graders as OpenAI has them: what an answer is worth, by what a text is compared with.

::

    string_check      {"type", "name", "input", "reference", "operation": eq | ne | like | ilike}
    text_similarity   {"type", "name", "input", "reference", "evaluation_metric": fuzzy_match | bleu | rouge_1 ...}
    multi             {"type", "name", "graders": {"NAME": {...}}, "calculate_output": "(NAME + OTHER) / 2"}

Inputs and references are templates: ``{{ item.answer }}`` is of the row, ``{{ sample.output_text }}`` what the model
said, ``{{ sample.output_json.name }}`` a part of it, where that is JSON. A model, or a program, grades nothing here.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, final

from ...errors import ConfigError, did_you_mean
from .formulas import FUNCTIONS, Formula
from .similarity import LONGEST, METRICS

__all__ = ["Fault", "Graded", "Grader", "read_grader"]

Fault = Literal["invalid_variable_error", "sample_parse_error", "other_error"]
MOST_GRADERS = 16  # of a multi
MOST_TEMPLATE = 20_000  # characters
MOST_FILLED = 2**20  # characters of what its variables stand for
MOST_NAME = 200
REFUSED = {
    "score_model": "asks a model",
    "label_model": "asks a model",
    "python": "runs a program",
}
OPERATIONS: Mapping[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}
VARIABLE = re.compile(r"\{\{([^{}]*)\}\}")
PLACE = re.compile(r"(item|sample)((?:\.[^\W\d][\w-]*|\[\d{1,6}\])+)")
STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")
KEYWORD = re.compile(r"[^\W\d]\w*", re.ASCII)


@final
class Graded(NamedTuple):
    """What came of it. scores: of each grader by its name. fault: why there is no reward, which is 0 then."""

    reward: float
    scores: Mapping[str, float]
    fault: Fault | None = None
    told: str | None = None


@final
class _FaultError(Exception):
    """An answer that cannot be graded."""

    def __init__(self, fault: Fault, told: str) -> None:
        super().__init__(told)
        self.fault, self.told = fault, told


@final
class _Texts:
    """What a template is filled in with."""

    def __init__(self, item: Mapping[str, Any], text: str) -> None:
        self.item, self.text = item, text

    def at(self, path: tuple[str | int, ...]) -> Any:
        """What a variable stands for."""
        space, first, *more = path
        if space == "sample" and first == "output_text":
            return self.text
        if space == "sample":
            found, fault = self._json(), "sample_parse_error"
        else:
            found, fault, more = self.item, "invalid_variable_error", [first, *more]
        for step in more:
            try:
                found = cast(Any, found)[step] if isinstance(found, (dict, list)) else None
            except (KeyError, IndexError, TypeError):
                found = None
            if found is None:
                name = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in path[1:])
                raise _FaultError(fault, f"{{{{ {space}{name} }}}}: there is no such thing")  # type: ignore[arg-type]
        return found

    def _json(self) -> Any:
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            raise _FaultError("sample_parse_error", "sample.output_json: what the model said is no JSON") from None


@final
class _Template:
    """A text with variables in it."""

    def __init__(self, given: Any, where: str) -> None:
        if not isinstance(given, str):
            raise ConfigError(f"{where}: expected a text, got {type(given).__name__}")
        _check_text(given, MOST_TEMPLATE, where)
        pieces = VARIABLE.split(given)
        self._texts = pieces[::2]
        self._paths = [_path(one.strip(), where) for one in pieces[1::2]]
        if any("{{" in text for text in self._texts):
            raise ConfigError(f"{where}: '{{{{' without its '}}}}'")

    @property
    def items(self) -> frozenset[tuple[str | int, ...]]:
        """What of a row it needs."""
        return frozenset(path for path in self._paths if path[0] == "item")

    def fill(self, texts: _Texts) -> str:
        found, left = [self._texts[0]], MOST_FILLED
        for path, text in zip(self._paths, self._texts[1:], strict=True):
            value = _written(texts.at(path))
            if (left := left - len(value)) < 0:
                raise _FaultError("other_error", f"a text of more than {MOST_FILLED} characters")
            found += [value, text]
        return "".join(found)


def _path(name: str, where: str) -> tuple[str | int, ...]:
    found = PLACE.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"{where}: {{{{ {name:.50} }}}}: expected item. and a field of the row, sample.output_text or "
            "sample.output_json"
        )
    steps = [word or int(number) for word, number in STEP.findall(found[2])]
    if found[1] == "sample" and steps[0] not in ("output_text", "output_json"):
        raise ConfigError(f"{where}: sample.{steps[0]} is not served; there are sample.output_text and output_json")
    if found[1] == "sample" and steps[0] == "output_text" and len(steps) > 1:
        raise ConfigError(f"{where}: sample.output_text is a text, without parts")
    return (found[1], *steps)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- graders ---------------------------------------------------------------------------------------------


class Grader(ABC):
    """What an answer is worth. name: of it. kind: OpenAI's ``type``. needs: what of a row."""

    kind: str
    name: str

    @abstractmethod
    def scores(self, texts: _Texts) -> dict[str, float]:
        """The reward, last, and before it what it is made of."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[tuple[str | int, ...]]:
        """Places in a row."""

    def grade(self, item: Mapping[str, Any], text: str) -> Graded:
        """Grade an answer to a row. Takes some tenths of a second at most for each of its graders."""
        try:
            found = self.scores(_Texts(item, text))
        except _FaultError as error:
            return Graded(0.0, {}, error.fault, error.told)
        return Graded(list(found.values())[-1], found)

    def lacks(self, item: Mapping[str, Any]) -> str | None:
        """What a row lacks for this grader; None: nothing."""
        texts = _Texts(item, "")
        for path in sorted(self.needs, key=str):
            try:
                texts.at(path)
            except _FaultError as error:
                return error.told
        return None


@final
class StringCheck(Grader):
    """1 or 0. ``like``: the reference is somewhere in the text; ``ilike``: in letters of whatever case."""

    kind = "string_check"

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.name = _take(given, ("input", "reference", "operation"), where)
        self._input = _Template(given["input"], f"{where}.input")
        self._reference = _Template(given["reference"], f"{where}.reference")
        self._check = OPERATIONS[_one_of(given["operation"], OPERATIONS, f"{where}.operation")]

    @property
    def needs(self) -> frozenset[tuple[str | int, ...]]:
        return self._input.items | self._reference.items

    def scores(self, texts: _Texts) -> dict[str, float]:
        return {self.name: float(self._check(self._input.fill(texts), self._reference.fill(texts)))}


@final
class TextSimilarity(Grader):
    """From 0 to 1, by a metric of similarity.py."""

    kind = "text_similarity"

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.name = _take(given, ("input", "reference", "evaluation_metric"), where)
        self._input = _Template(given["input"], f"{where}.input")
        self._reference = _Template(given["reference"], f"{where}.reference")
        self._metric = METRICS[_one_of(given["evaluation_metric"], METRICS, f"{where}.evaluation_metric")]

    @property
    def needs(self) -> frozenset[tuple[str | int, ...]]:
        return self._input.items | self._reference.items

    def scores(self, texts: _Texts) -> dict[str, float]:
        text, reference = self._input.fill(texts), self._reference.fill(texts)
        if (longest := max(len(text), len(reference))) > LONGEST:
            raise _FaultError("other_error", f"{self.name}: {longest} characters; at most {LONGEST} are compared")
        return {self.name: self._metric(text, reference)}


@final
class Multi(Grader):
    """A formula over other graders, by their names."""

    kind = "multi"

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.name = _take(given, ("graders", "calculate_output"), where)
        graders = given["graders"]
        if isinstance(graders, dict) and isinstance(graders.get("type"), str):  # one, as OpenAI's clients have its type
            graders = {str(graders.get("name")): graders}
        if not isinstance(graders, dict) or not 1 <= len(graders) <= MOST_GRADERS:
            raise ConfigError(f"{where}.graders: expected an object of 1 to {MOST_GRADERS} graders by name")
        wrong = [name for name in graders if not KEYWORD.fullmatch(name) or name in FUNCTIONS]
        if wrong:
            told = "a name is letters, digits and _, and none of a function"
            raise ConfigError(f"{where}.graders: {wrong[0]!r:.50} cannot be in a formula; {told}")
        self._graders = {name: _read(one, f"{where}.graders.{name}", nested=True) for name, one in graders.items()}
        formula = given["calculate_output"]
        if not isinstance(formula, str):
            raise ConfigError(f"{where}.calculate_output: expected a formula, got {type(formula).__name__}")
        self._formula = Formula(formula, self._graders, f"{where}.calculate_output")

    @property
    def needs(self) -> frozenset[tuple[str | int, ...]]:
        return frozenset().union(*(one.needs for one in self._graders.values()))

    def scores(self, texts: _Texts) -> dict[str, float]:
        found = {name: list(one.scores(texts).values())[-1] for name, one in self._graders.items()}
        try:
            return {**found, "": self._formula(found)}
        except (ArithmeticError, ValueError) as error:
            raise _FaultError("other_error", f"calculate_output: {error} (with {found})") from None


KINDS: Mapping[str, Callable[[Mapping[str, Any], str], Grader]] = {
    "string_check": StringCheck,
    "text_similarity": TextSimilarity,
    "multi": Multi,
}


def read_grader(given: Any, where: str = "grader") -> Grader:
    """A grader as a request has it.

    Raises:
        ConfigError: it is none, or one that is not served, with the place.

    """
    return _read(given, where, nested=False)


def _read(given: Any, where: str, *, nested: bool) -> Grader:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected an object, got {type(given).__name__}")
    kind = given.get("type")
    served = [name for name in KINDS if not (nested and name == "multi")]
    if isinstance(kind, str) and kind in REFUSED:
        told = f"{kind!r} graders are not served, for such a one {REFUSED[kind]}"
        raise ConfigError(f"{where}.type: {told}; there are {', '.join(served)}")
    if not isinstance(kind, str) or kind not in served:
        near = did_you_mean(str(kind)[:50], served)
        raise ConfigError(f"{where}.type: expected one of {', '.join(served)}, got {kind!r:.50}.{near}")
    return KINDS[kind](given, where)


def _take(given: Mapping[str, Any], own: tuple[str, ...], where: str) -> str:
    """See that a grader has what it takes and nothing else; its name."""
    keys = ("type", "name", *own)
    for key in given:
        if key not in keys:
            raise ConfigError(f"{where}.{str(key)[:50]}: there is no such option.{did_you_mean(str(key)[:50], keys)}")
    for key in keys:
        if given.get(key) is None:
            raise ConfigError(f"{where}.{key}: is missing")
    name = given["name"]
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}.name: expected a text")
    _check_text(name, MOST_NAME, f"{where}.name")
    return name


def _check_text(text: str, most: int, where: str) -> None:
    if len(text) > most:
        raise ConfigError(f"{where}: {len(text)} characters; at most {most} are taken")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: half of a surrogate pair, which is no character") from None


def _one_of(word: Any, words: Mapping[str, object], where: str) -> str:
    if not isinstance(word, str) or word not in words:
        near = did_you_mean(str(word)[:50], words)
        raise ConfigError(f"{where}: {word!r:.50} is not served; there are {', '.join(words)}.{near}")
    return word
