"""What learns from feedback, of the tests: the tiny base, its engine and learner, and users who say what was wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilotune import AdapterConfig
from kilotune.fleet.store import open_store
from kilotune.fleet.store.documents import Documents
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.interface import AdapterKey
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from kilotune.serve.learning.feedback import Answered, Feedback, FeedbackRules, Said
from kilotune.serve.learning.gate import Bounds
from kilotune.serve.learning.learner import Learner, LearningSettings
from kilotune.serve.learning.personal import PersonalRunner
from kilotune.serve.learning.study import Pace
from kilotune.serve.learning.training_file import Example, read_example
from kilotune.serve.learning.turns import LEARNING, events, turn_name, wake
from kilotune.serve.learning.users import LIVE, model_of
from kilotune.serve.learning.workers import Claim
from kilotune.serve.twin import twin_of
from kilotune.train.data.rendering import ChatTemplate
from tests.support.generation_support import loaded
from tests.support.http_support import BASE, base_folder, tokenizer
from tests.support.serve_support import answer, greedy
from tests.support.training_support import CONFIG

__all__ = ["TOY", "WIDE", "Learning", "learning", "texts"]

TOY = Pace(rate=1.0, steps=24, guard=1.0)
WIDE = Bounds(divergence=1.0, held_out=2.0)  # the toy has no room to learn a thing without forgetting others


class Learning:
    """A namespace's users, over one base that learns and answers."""

    def __init__(self, folder: Path, space: str, config: AdapterConfig, pace: Pace, bounds: Bounds) -> None:
        self.url = f"sqlite:///{folder / 'adapters.db'}"
        self.space = space
        base = loaded("llama", base_folder())
        twin = twin_of(base)
        self.registry = AdapterRegistry(self.url, base)
        self.engine = TransformersEngine(self.registry.model.get_base_model(), tokenizer(), self.registry)
        self.learner = Learner(twin, self.registry, self.engine, LearningSettings(), self.engine.cores)
        self.store = open_store(self.url)
        self.everyone = Documents(self.store)
        self.documents = self.everyone.within(space)
        self.feedback = Feedback(self.documents)
        self.chats = ChatTemplate(tokenizer())
        self.runner = PersonalRunner(
            self.everyone, self.learner, self.registry, self.engine, config, self.make, pace, bounds
        )

    def make(self, given: Any, form: str) -> Example:
        return read_example(given, form, self.chats, tokenizer(), longest=256)

    def begin(self) -> None:
        self.engine.start()
        self.learner.start()
        self.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0))

    def end(self) -> None:
        self.learner.stop()
        self.engine.stop()
        self.registry.close()
        self.store.close()

    # -- what users do -----------------------------------------------------------------------------

    def answered(self, user: str, question: str, text: str | None = None, **more: Any) -> str:
        """An answer that was given; by its name."""
        told = {"model": BASE, **more}
        given = self.said(user, question) if text is None else text
        messages = [{"role": "user", "content": question}]
        kept = self.feedback.keep(Answered(user=user, messages=messages, tools=None, text=given, **told), 3600)
        assert kept is not None
        return kept.name

    def correct(self, user: str, question: str, right: str, wrong: str | None = None) -> str:
        """A correction; by its name."""
        said = Said(answer=self.answered(user, question, wrong), correction=right)
        return self.feedback.add(user, said)[0].name

    def claim(self) -> Claim | None:
        """The next turn that is due, as a server takes it."""
        found = self.everyone.claim(LEARNING, "the tests", 15)
        return None if found is None else Claim(self.runner._workers, found)

    def learn(self, user: str) -> dict[str, Any]:
        """Have all feedback of a user learned, here and now; the last event."""
        wake(self.documents, user, 0)
        claim = self.claim()
        assert claim is not None
        assert claim.document.data["user"] == user
        self.runner._work(claim)
        return self.last(user)

    def state(self, user: str) -> str:
        found = self.documents.find(LEARNING, turn_name(self.space, user))
        return "" if found is None else found.state

    def last(self, user: str) -> dict[str, Any]:
        found = events(self.documents, user, limit=1)
        return dict(found[0].data) if found else {}

    def live(self, user: str) -> int | None:
        """The version that answers."""
        name = model_of(user)
        return self.registry.aliases(self.space, name).get(LIVE) if self.versions(user) else None

    def choose(self, user: str, question: str, better: str, worse: str) -> str:
        """Say that one answer is better than another; the name of that."""
        first, second = (self.answered(user, question, text) for text in (better, worse))
        return self.feedback.add(user, Said(answer=first, better_than=second))[0].name

    def rate(self, user: str, question: str, text: str, up: bool, **more: Any) -> str:
        """Rate an answer; the name of that."""
        return self.feedback.add(user, Said(answer=self.answered(user, question, text, **more), rating=up))[0].name

    def versions(self, user: str) -> list[int]:
        return [one.version for one in self.registry.versions(self.space, model_of(user))]

    def said(self, user: str, question: str, count: int = 12) -> str:
        """The greedy answer of a user's model, or of the base."""
        key = None
        if (live := self.live(user)) is not None:
            key = AdapterKey.of(self.space, self.registry.info(self.space, model_of(user), live))
        rendered = self.chats.prompt([{"role": "user", "content": question}])
        ids = tokenizer()(rendered.text, add_special_tokens=False)["input_ids"]
        found = asyncio.run(answer(self.engine, ids, greedy(count), key, self.space))
        return str(tokenizer().decode(found.ids, skip_special_tokens=True)).strip()


@contextmanager
def learning(
    folder: Path,
    space: str = "ann",
    config: AdapterConfig = CONFIG,
    pace: Pace | None = None,
    bounds: Bounds | None = None,
) -> Iterator[Learning]:
    """An engine that answers and a learner; turns are run by ``learn``."""
    made = Learning(folder, space, config, pace or TOY, bounds or WIDE)
    made.begin()
    try:
        yield made
    finally:
        made.end()


def texts(seed: int, count: int) -> Sequence[str]:
    """Short texts of words that the tiny tokenizer knows."""
    words = ["the", "a", "cat", "dog", "mat", "hat", "sat", "on"]
    draws = random.Random(seed)
    return [" ".join(draws.choice(words) for _ in range(draws.randint(2, 4))) for _ in range(count)]
