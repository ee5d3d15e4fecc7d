"""Learning from corrections, one after another, of one user: how long until the exact answer, and what stays known."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kilotune
from kilotune.bases import located
from kilotune.errors import AdapterError
from kilotune.fleet import open_store
from kilotune.fleet.store.documents import Documents
from kilotune.model.last_blocks import in_last_blocks
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.interface import AdapterKey, Generation, Sampling, Token
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from kilotune.serve.learning.feedback import Answered, Feedback, FeedbackRules, Said
from kilotune.serve.learning.learner import Learner, LearningSettings
from kilotune.serve.learning.personal import PersonalRunner
from kilotune.serve.learning.scope import Likeness, Scopes, Standing, general_questions, lessons_in
from kilotune.serve.learning.training_file import Example, read_example
from kilotune.serve.learning.turns import LEARNING, events, turn_name, wake
from kilotune.serve.learning.users import LIVE, model_of
from kilotune.serve.twin import twin_of
from kilotune.train.data.processors import load_tokenizer
from kilotune.train.data.rendering import ChatTemplate, tokenize

TEXTS = Path(__file__).with_name("corrections.jsonl")
SPACE = "bench"
LIMIT = 600.0  # seconds after which a correction counts as not learned


@dataclass
class Taught:
    """What came of one user's corrections. seconds: of each, None: it did not come to the exact answer. processor: of
    training. facts, paraphrases, controls: how many are right at the end. events: of each."""

    seconds: list[float | None] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    facts: int = 0
    paraphrases: int = 0
    controls: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)


class School:
    """A base that answers and learns, and one user after another."""

    def __init__(self, base: Any, chosen: argparse.Namespace, folder: str, threads: int) -> None:
        twin = twin_of(base)
        config = kilotune.get_config("lora", r=8, target_modules="all-linear")
        config = in_last_blocks(twin, config, chosen.last_blocks)
        self.tokenizer = load_tokenizer(str(located(chosen.model)), None)
        self.chats = ChatTemplate(self.tokenizer)
        url = f"sqlite:///{folder}/adapters.db"
        self.registry = AdapterRegistry(url, base)
        self.engine = TransformersEngine(base, self.tokenizer, self.registry)
        settings = LearningSettings(threads=threads)
        self.learner = Learner(twin, self.registry, self.engine, settings, self.engine.cores)
        self.store = open_store(url)
        everyone = Documents(self.store)
        self.documents = everyone.within(SPACE)
        self.feedback = Feedback(self.documents)
        self.scopes = Scopes(Likeness(self.learner.embedding, self.tokenizer, general_questions()))
        self.runner = PersonalRunner(everyone, self.learner, self.registry, self.engine, config, self._make)

    def _make(self, given: Any, form: str) -> Example:
        return read_example(given, form, self.chats, self.tokenizer, longest=self.engine.max_length)

    def __enter__(self) -> School:
        self.engine.start()
        self.learner.start()
        self.runner.start()
        self.feedback.set_rules(FeedbackRules(enabled=True, pause_seconds=0))
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.stop()
        self.learner.stop()
        self.engine.stop()
        self.registry.close()
        self.store.close()

    def said(self, user: str | None, question: str, most: int = 24) -> str:
        """The greedy answer of ``personal``, as the service says what that is, or of the base."""
        key = None if user is None else self._live(user)
        if key is not None and not self.scopes.near(key, [question], partial(self._lessons, key, str(user))):
            key = None
        prompt = self.chats.prompt([{"role": "user", "content": question}])
        ids = tokenize(self.tokenizer, [prompt], "all").examples[0].ids
        sampling = Sampling(max_tokens=most, temperature=0.0)
        request = Generation(id="a", tenant=SPACE, adapter=key, prompt=tuple(ids), sampling=sampling)

        async def run() -> list[int]:
            return [item.id async for item in self.engine.generate(request) if isinstance(item, Token)]

        return str(self.tokenizer.decode(asyncio.run(run()), skip_special_tokens=True)).strip()

    def _live(self, user: str) -> AdapterKey | None:
        try:
            return AdapterKey.of(SPACE, self.registry.info(SPACE, model_of(user), LIVE))
        except AdapterError:
            return None

    def _lessons(self, key: AdapterKey, user: str) -> Standing | None:
        return lessons_in(self.registry, self.feedback, key, user)

    def asked(self, user: str, fact: dict[str, Any]) -> str:
        """The answer that is kept of a question; by its name."""
        messages = [{"role": "user", "content": fact["question"]}]
        given = Answered(user=user, messages=messages, tools=None, text=self.said(user, fact["question"]), model="base")
        answer = self.feedback.keep(given, 3600)
        assert answer is not None
        return answer.name

    def give(self, user: str, fact: dict[str, Any], answer: str) -> None:
        """Send a correction of an answer."""
        self.feedback.add(user, Said(answer=answer, correction=fact["answer"]))
        wake(self.documents, user, 0)

    def wait(self, user: str) -> None:
        """Until what was given is learned or refused, or it took too long."""
        began, name = time.monotonic(), turn_name(SPACE, user)
        while (now := self.documents.find(LEARNING, name)) is None or now.state != "rests":
            if time.monotonic() - began > LIMIT:
                break
            time.sleep(0.02)

    def correct(self, user: str, fact: dict[str, Any], taught: Taught) -> None:
        """Send a correction, and wait until it is learned or refused."""
        answer = self.asked(user, fact)
        before, began = self.learner.stats().seconds, time.monotonic()
        self.give(user, fact, answer)
        self.wait(user)
        right = self.said(user, fact["question"]) == fact["answer"]
        taught.seconds.append(time.monotonic() - began if right else None)
        taught.processor.append(self.learner.stats().seconds - before)
        taught.events.append(dict(events(self.documents, user, limit=1)[0].data))


def texts(file: Path = TEXTS) -> tuple[list[dict[str, Any]], list[str]]:
    """(facts, controls), as they were committed."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [one for one in lines if "question" in one], [one["control"] for one in lines if "control" in one]


def teach(base: Any, chosen: argparse.Namespace, seed: int, show: Callable[[str], None]) -> Taught:
    """One user is taught the facts, one after another, in an order of the seed's; then all is asked."""
    facts, controls = texts()
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed)).tolist()[: chosen.facts]
    facts, controls = [facts[place] for place in order], controls[: chosen.controls]
    taught, user = Taught(), f"user-{seed}"
    threads = chosen.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, School(base, chosen, folder, threads) as school:
        before = [school.said(None, one) for one in controls]
        for number, fact in enumerate(facts):
            school.correct(user, fact, taught)
            event = taught.events[-1]
            show(
                f"seed {seed}, fact {number + 1} of {len(facts)}: {event['type']}, {taught.seconds[-1]} s, "
                f"{taught.processor[-1]:.1f} s of the processor, {event['data'].get('steps')} steps"
            )
        taught.facts = sum(school.said(user, one["question"]) == one["answer"] for one in facts)
        asked = [(words, one["key"]) for one in facts for words in one["paraphrases"]]
        taught.paraphrases = sum(key in school.said(user, words) for words, key in asked)
        taught.controls = sum(school.said(user, one) == told for one, told in zip(controls, before, strict=True))
    return taught


def together(base: Any, chosen: argparse.Namespace, show: Callable[[str], None]) -> tuple[int, float]:
    """Corrections of as many users as there are facts, all at once: (how many are answered exactly, seconds)."""
    facts = texts()[0][: chosen.facts]
    threads = chosen.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, School(base, chosen, folder, threads) as school:
        show("the first correction after a start")
        school.correct("first", facts[0], Taught())
        users = [f"user-{number}" for number in range(len(facts))]
        answers = [school.asked(user, fact) for user, fact in zip(users, facts, strict=True)]
        began = time.monotonic()
        for user, fact, answer in zip(users, facts, answers, strict=True):
            school.give(user, fact, answer)
        for number, user in enumerate(users):
            school.wait(user)
            show(f"{number + 1} of {len(users)} users")
        took = time.monotonic() - began
        pairs = zip(users, facts, strict=True)
        return sum(school.said(user, fact["question"]) == fact["answer"] for user, fact in pairs), took


def judged(chosen: argparse.Namespace) -> dict[str, tuple[int, int, int, int]]:
    """By file: (paraphrases that are near their own question alone, of how many; other questions that are near one of
    all of them, of how many)."""
    folder = str(located(chosen.model))
    likeness = Likeness(embedding(folder), load_tokenizer(folder, None), general_questions())
    everything: list[dict[str, Any]] = []
    others: list[str] = []
    found = {}
    for name in (TEXTS, TEXTS.with_name("scope.jsonl"), TEXTS.with_name("scope_unseen.jsonl")):
        facts, controls = texts(name)
        lessons = [likeness.of([one["question"]]) for one in facts]
        pairs = [(words, own) for one, own in zip(facts, lessons, strict=True) for words in one["paraphrases"]]
        near = sum(likeness.near(likeness.of([words]), own) for words, own in pairs)
        wrong = sum(likeness.near(likeness.of([words]), torch.cat(lessons)) for words in controls)
        found[name.name] = near, len(pairs), wrong, len(controls)
        everything, others = everything + facts, others + controls
    lessons = [likeness.of([one["question"] for one in everything])]
    wrong = sum(likeness.near(likeness.of([words]), lessons[0]) for words in others)
    found["all together"] = 0, 0, wrong, len(others)
    return found


def embedding(folder: str) -> torch.nn.Module:
    """A model's, of tokens."""
    from transformers import AutoModelForCausalLM

    made: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings()
    return made
