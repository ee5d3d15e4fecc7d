"""Which questions a personal model answers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer

from kilotune import bases
from kilotune.errors import ConfigError
from kilotune.serve.engine.interface import AdapterKey
from kilotune.serve.learning import scope
from kilotune.serve.learning.feedback import Lesson
from kilotune.serve.learning.lessons import question_of
from kilotune.serve.learning.scope import NEAR, Likeness, Scopes, Standing, general_questions
from tests.support.paths import ROOT

WORDS = ["the", "a", "cat", "dog", "mat", "hat", "sat", "on", "what", "is", "sea", "blue", "red"]
GENERAL = ["what is the sea", "what is blue", "is the sea blue", "what is a hat", "the red hat is on the mat"]


class Tokenizer:
    """Words by number; what it does not know is left out."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in text.split() if word in WORDS]}


def embeddings(hidden: int = 16) -> torch.Tensor:
    return torch.randn(len(WORDS), hidden, generator=torch.Generator().manual_seed(0))


def likeness() -> Likeness:
    return Likeness(nn.Embedding.from_pretrained(embeddings()), Tokenizer(), GENERAL)


def by_hand(texts: Sequence[str]) -> np.ndarray:
    """What the module's first lines say, in float64."""
    table = embeddings().double().numpy()
    ids = [Tokenizer()(text)["input_ids"] for text in (*GENERAL, *texts)]
    counts = Counter(token for one in ids[: len(GENERAL)] for token in set(one))
    means = np.zeros((len(ids), table.shape[1]))
    for place, one in enumerate(ids):
        weights = [1 / math.sqrt(1 + counts[token]) for token in one]
        means[place] = sum(w * table[token] for w, token in zip(weights, one, strict=True)) / sum(weights)
    middle = means[: len(GENERAL)].mean(0)
    _, sizes, directions = np.linalg.svd(means[: len(GENERAL)] - middle, full_matrices=False)
    target = sorted(sizes)[(len(sizes) - 1) // 2]
    apart = means - middle
    for size, direction in zip(sizes, directions, strict=True):
        if size > target:
            part = np.outer(apart @ direction, direction)
            apart = apart - part + part * target / size
    return apart / np.linalg.norm(apart, axis=1, keepdims=True)


def test_directions_are_what_is_written() -> None:
    texts = ["the cat sat", "a dog", "is the sea red"]
    wanted = by_hand(texts)[len(GENERAL) :]
    assert np.abs(likeness().of(texts).double().numpy() - wanted).max() < 1e-5


def test_near_is_as_written_too() -> None:
    made = likeness()
    texts = ["the cat sat on the mat", "the cat", "a dog sat on a mat", "what is the sea", "is it blue", "red hat"]
    found = by_hand(texts)
    general, own = found[: len(GENERAL)], found[len(GENERAL) :]
    seen = set()
    for one in range(len(texts)):
        for lesson in range(len(texts)):
            cosine = own[one] @ own[lesson]
            wanted = cosine >= max(NEAR, (general @ own[one]).max()) - 1e-6
            assert made.near(made.of([texts[one]]), made.of([texts[lesson]])) == wanted, (texts[one], texts[lesson])
            seen.add((one == lesson, bool(wanted)))
    assert {(False, True), (False, False), (True, True)} <= seen


def lesson(question: str, **more: Any) -> Lesson:
    told: dict[str, Any] = {"name": "n", "user": "ann", "kind": "correction", "tools": None, "answer": "no"}
    told |= {"better": "yes", "rating": None, "model": "base", "version": None, "created": 0.0, **more}
    return Lesson(messages=[{"role": "user", "content": question}], **told)


def all_of(*lessons: Lesson) -> Standing:
    return Standing(lessons, whole=True)


def key(version: int = 1) -> AdapterKey:
    return AdapterKey("acme", "personal:ann", version, "0" * 64)


def test_the_very_question_is_always_near() -> None:
    """Also one that has no tokens, or that the guard asks too."""
    scopes = Scopes(likeness())
    asked = ["zebra", "", GENERAL[0], "the cat"]
    for version, question in enumerate(asked):
        assert scopes.near(key(version), [question], lambda question=question: all_of(lesson(question)))
    assert not scopes.near(key(0), ["the cat"], pytest.fail)


def test_any_question_of_a_conversation_will_do() -> None:
    scopes = Scopes(likeness())
    assert scopes.near(key(), ["the cat", "what is the sea"], lambda: all_of(lesson("the cat")))
    assert not scopes.near(key(), ["what is the sea"], pytest.fail)
    assert not scopes.near(key(), [], pytest.fail)


def test_of_a_long_conversation_its_end() -> None:
    scopes, far = Scopes(likeness()), ["what is the sea"] * scope.NEWEST
    assert scopes.near(key(), ["the cat", *far[1:]], lambda: all_of(lesson("the cat")))
    assert not scopes.near(key(), ["the cat", *far], pytest.fail)


def test_what_learned_of_no_feedback_answers_everything() -> None:
    scopes = Scopes(likeness())
    assert scopes.near(key(1), ["what is the sea"], lambda: None)
    gone = Standing([], whole=False)  # all that it learned of was taken back just now
    assert not scopes.near(key(2), ["what is the sea"], lambda: gone)


def test_versions_questions_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    scopes, read = Scopes(likeness()), []

    def lessons(version: int) -> Standing:
        read.append(version)
        return all_of(lesson("the cat"))

    monkeypatch.setattr(scope, "HELD", 3 * (scope.OWN + 16 * 4 + scope.DIGEST))
    for version in (1, 2, 3, 1, 4, 1, 2):
        assert scopes.near(key(version), ["the cat"], lambda version=version: lessons(version))
    assert read == [1, 2, 3, 4, 2]


def test_what_is_forgotten_is_read_again() -> None:
    scopes, read = Scopes(likeness()), []
    for name in ("ann", "ann", "bob"):
        one = AdapterKey("acme", f"personal:{name}", 1, "0" * 64)
        scopes.near(one, ["the cat"], lambda name=name: read.append(name))
    scopes.forget("acme", "personal:ann")
    for name in ("ann", "bob"):
        one = AdapterKey("acme", f"personal:{name}", 1, "0" * 64)
        scopes.near(one, ["the cat"], lambda name=name: read.append(name))
    assert read == ["ann", "bob", "ann"]


def test_what_does_not_stand_whole_is_looked_at_again() -> None:
    """It is taken back, or given again, before its user's turn."""
    scopes, standing = Scopes(likeness()), [Standing([], whole=False), all_of(lesson("the cat"))]
    assert [scopes.near(key(), ["the cat"], lambda: standing.pop(0)) for _ in range(2)] == [False, True]
    assert scopes.near(key(), ["the cat"], pytest.fail)


def test_what_was_read_before_something_was_forgotten_is_not_kept() -> None:
    scopes = Scopes(likeness())

    def lessons() -> Standing:
        scopes.forget("acme", "personal:ann")  # meanwhile
        return all_of(lesson("the cat"))

    assert scopes.near(key(), ["the cat"], lessons)
    assert not scopes._held


def test_tokens_that_the_base_lacks_are_passed_over() -> None:
    """As those of a tokenizer that was given more of them than its model."""
    small = nn.Embedding.from_pretrained(embeddings()[:-1])
    made = Likeness(small, Tokenizer(), GENERAL)
    assert torch.equal(made.of(["the cat red"]), made.of(["the cat"]))
    assert bool(torch.isfinite(made.of(["red"])).all())


def test_of_a_long_text_its_beginning() -> None:
    made = likeness()
    long = "the cat " * scope.CHARACTERS
    assert torch.allclose(made.of([long]), made.of([long[: scope.CHARACTERS]]))


def test_equal_general_questions_take_nothing_more_than_their_own() -> None:
    made = Likeness(nn.Embedding.from_pretrained(embeddings()), Tokenizer(), ["what is the sea"] * 3)
    assert bool(torch.isfinite(made.of(["the cat", ""])).all())
    assert made.near(made.of(["the cat"]), made.of(["the cat"]))


def test_the_question_of_a_conversation_is_the_last_one() -> None:
    one, two, answer = {"role": "user", "content": "one"}, {"role": "user", "content": "two"}, {"role": "assistant"}
    assert question_of([{"role": "system", "content": "be kind"}, one, {**answer, "content": "yes"}, two]) == "two"
    assert question_of([{"role": "system", "content": "be kind"}]) == "be kind"
    assert question_of([{**answer, "content": None}]) == question_of([]) == ""


@pytest.mark.heavy
def test_a_real_model_tells_other_words_from_other_questions() -> None:
    """The questions of the benchmark, none of which is the guard's; docs/learning.md has the numbers."""
    try:
        folder, _ = bases.fetch("smollm2")
    except ConfigError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        table = file.get_tensor("model.embed_tokens.weight")
    made = Likeness(nn.Embedding.from_pretrained(table), AutoTokenizer.from_pretrained(folder), general_questions())
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "corrections.jsonl").read_text().splitlines()]
    lessons = made.of([one["question"] for one in lines if "question" in one])
    near = [made.near(made.of([words]), lessons) for one in lines for words in one.get("paraphrases", ())]
    far = [not made.near(made.of([one["control"]]), lessons) for one in lines if "control" in one]
    assert (len(near), len(far)) == (20, 20)
    assert sum(near) >= 18
    assert sum(far) >= 18
    for question, (other, *unlike) in LANGUAGES.items():
        lessons = made.of([question])
        assert made.near(made.of([other]), lessons), other
        assert not any(made.near(made.of([one]), lessons) for one in unlike), question


LANGUAGES = {  # a question, the same in other words, and other ones
    "Wer leitet die Nachtschicht bei uns?": (
        "Welche Person ist bei uns für die Nachtschicht zuständig?",
        "Schreib ein Gedicht über das Meer.",
        "Wie spät ist es?",
        "Hilf mir bei einer Bewerbung.",
    ),
    "Qui dirige l'équipe de nuit ?": (
        "Quelle personne est responsable de l'équipe de nuit ?",
        "Pourquoi le ciel est-il bleu ?",
        "Combien de pattes a une araignée ?",
    ),
    "谁负责夜班？": ("夜班是由哪位负责的？", "天空为什么是蓝色的？", "写一首关于大海的诗。"),
}
