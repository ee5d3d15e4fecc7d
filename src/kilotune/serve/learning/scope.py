"""Which questions a personal model answers: those near one that its user gave feedback on.

::

    a text   the mean of the base's input embeddings of its tokens, a token counting less the more general questions
             have it; less the mean of those questions, and with the directions in which they differ most made as
             small as the middle one of them
    near     its cosine with a lesson's question is at least NEAR, and no smaller than with each general question

General questions are the guard's, and those of general.jsonl in fourteen other languages: without these, that two
questions are in one language that is not the guard's would make them near.

So what no lesson is about is answered by what the model stands on, to the bit. The weights are those of Arora, Liang
and Ma, "A simple but tough-to-beat baseline for sentence embeddings" (2017), in kind. No pass of the model is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from ..engine.interface import AdapterKey
from ..engine.tenant_adapters import AdapterRegistry
from .feedback import Feedback, Lesson
from .guard import guard_lines
from .lessons import mark_of, question_of
from .rollback import marks_of

__all__ = ["NEAR", "Likeness", "Scopes", "Standing", "general_questions", "lessons_in"]

NEAR = 0.35  # cosine
ROUNDING = 1e-4  # of cosines
CHARACTERS, NEWEST = 1024, 16  # of a text that are looked at; messages of a conversation
LESSONS = 1024  # whose questions are compared, the newest; of others the very question alone
HELD = 2**26  # bytes of versions' questions that are kept
OWN, DIGEST = 1024, 64  # bytes of a version without any, and of a text's hash, about


@final
class Likeness:
    """How like two questions are, for one base.

    Args:
        embedding: the base's, of tokens: numbers (tokens,) to (tokens, hidden).
        tokenizer: of the base; a copy of it is used.
        general: questions that are about nothing of a user's.

    """

    def __init__(self, embedding: nn.Module, tokenizer: Any, general: Sequence[str]) -> None:
        self._embedding, self._tokenizer = embedding, copy.deepcopy(tokenizer)
        weight = next(embedding.parameters())
        self._device, self._tokens = weight.device, len(weight)
        self._lock = threading.Lock()  # fast tokenizers do not like two users in one instant
        ids = self._ids(general)
        self._questions = Counter(token for one in ids for token in set(one))
        means = self._means(ids)  # (general, hidden)
        self._mean = means.mean(0)
        _, sizes, self._directions = torch.linalg.svd(means - self._mean, full_matrices=False)
        middle = sizes.median()
        self._taken = 1 - middle / sizes.clamp(min=float(middle) or 1.0)
        self._general = self._settled(means)

    def of(self, texts: Sequence[str]) -> Tensor:
        """Texts as directions (texts, hidden); of a long one its beginning."""
        return self._settled(self._means(self._ids(texts)))

    def near(self, asked: Tensor, lessons: Tensor) -> bool:
        """Whether one of what was asked is near one of the lessons' questions; both (texts, hidden), of :meth:`of`."""
        general = (asked @ self._general.T).amax(1)
        return bool(((asked @ lessons.T).amax(1) >= general.clamp(min=NEAR) - ROUNDING).any())

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._numbers(text[:CHARACTERS]) for text in texts]

    def _numbers(self, text: str) -> list[int]:
        with self._lock:
            found: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [token for token in found if token < self._tokens]  # a tokenizer may have some that the base lacks

    def _means(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self._mean_of(one) for one in ids])

    @torch.no_grad()
    def _mean_of(self, ids: Sequence[int]) -> Tensor:
        """(hidden,); of no tokens 0."""
        weights = torch.tensor([(1 + self._questions[token]) ** -0.5 for token in ids])
        found: Tensor = self._embedding(torch.tensor(ids, dtype=torch.long, device=self._device))
        return weights @ found.float().cpu() / weights.sum().clamp(min=1e-9)

    def _settled(self, means: Tensor) -> Tensor:
        apart = means - self._mean
        apart = apart - (apart @ self._directions.T * self._taken) @ self._directions
        return torch.nn.functional.normalize(apart, dim=1)


@final
class Standing(NamedTuple):
    """The lessons in a version that still stand. whole: they are all of them."""

    lessons: Sequence[Lesson]
    whole: bool


@final
@dataclass(frozen=True)
class _Asked:
    """The questions of the lessons in a version: their texts' SHA-256, and the newest ones' directions."""

    texts: frozenset[bytes]
    directions: Tensor  # (texts, hidden)

    @property
    def size(self) -> int:
        """Bytes, about."""
        return self.directions.numel() * self.directions.element_size() + DIGEST * len(self.texts)


@final
class Scopes:
    """What each version of a personal model answers. likeness: of the base."""

    def __init__(self, likeness: Likeness) -> None:
        self._likeness, self._lock, self._forgotten = likeness, threading.Lock(), 0
        self._held: OrderedDict[AdapterKey, _Asked | None] = OrderedDict()

    def near(self, key: AdapterKey, asked: Sequence[str], lessons: Callable[[], Standing | None]) -> bool:
        """Whether a version is to answer a conversation.

        Args:
            key: the version.
            asked: what its user says in the conversation, of which the newest are looked at.
            lessons: gives those in the version; None: it learned of none, and answers everything.

        """
        held, asked = self._asked(key, lessons), asked[-NEWEST:]
        if held is None or not held.texts.isdisjoint(map(_digest, asked)):
            return True
        if not held.texts or not asked:
            return False
        return self._likeness.near(self._likeness.of(asked), held.directions)

    def forget(self, namespace: str, name: str) -> None:
        """Drop what is known of an adapter's versions."""
        with self._lock:
            self._forgotten += 1
            for key in [one for one in self._held if (one.namespace, one.name) == (namespace, name)]:
                del self._held[key]

    def _asked(self, key: AdapterKey, lessons: Callable[[], Standing | None]) -> _Asked | None:
        with self._lock:
            before = self._forgotten
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        found, made = lessons(), None
        if found is not None:
            texts = list(dict.fromkeys(question_of(one.messages) for one in reversed(found.lessons)))
            directions = self._likeness.of(texts[:LESSONS]) if texts else torch.empty(0, 0)
            made = _Asked(frozenset(map(_digest, texts)), directions)
        if found is None or found.whole:  # else something is to be learned again, or to be given again
            self._keep(key, made, before)
        return made

    def _keep(self, key: AdapterKey, made: _Asked | None, before: int) -> None:
        with self._lock:
            if self._forgotten != before:  # perhaps of this one, just now
                return
            self._held[key] = made
            while len(self._held) > 1 and self._size() > HELD:
                self._held.popitem(last=False)

    def _size(self) -> int:
        return sum(OWN + (0 if one is None else one.size) for one in self._held.values())


def general_questions() -> list[str]:
    """Questions about nothing of a user's, in several languages."""
    text = files(__package__).joinpath("general.jsonl").read_text(encoding="utf-8")
    return [line["asked"] for line in (*guard_lines(), *map(json.loads, text.splitlines()))]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def lessons_in(adapters: AdapterRegistry, feedback: Feedback, key: AdapterKey, user: str) -> Standing | None:
    """The lessons in a version of a user's own model that still stand; None: it learned from no feedback.

    Raises:
        AdapterError: there is no such version any more.

    """
    marks = marks_of(adapters.info(key.namespace, key.name, key.version))
    if not marks:
        return None
    found = {mark_of(one): one for one in feedback.lessons(user)}
    standing = [one for mark, one in found.items() if mark in marks]
    return Standing(standing, len(standing) == len(marks))
