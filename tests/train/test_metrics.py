"""Scores against other formulas, against hand-counted cases, and against the losses that models compute."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from kilotune.train import metrics
from kilotune.train.metrics import entities

# -- language models -----------------------------------------------------------------------------------


def batch(rows: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(30, (rows, tokens), generator=generator)
    labels[torch.rand(rows, tokens, generator=generator) < 0.4] = -100
    return 3 * torch.randn(rows, tokens, 30, generator=generator), labels


@pytest.mark.parametrize("shift", [True, False])
def test_perplexity_counts_every_token_alike_however_rows_are_batched(shift: bool) -> None:
    batches = [batch(4, 9, 0), batch(1, 5, 1), batch(2, 17, 2)]
    sums = torch.cat([metrics.reduce_language((logits, "cache"), labels, shift) for logits, labels in batches])
    assert sums.shape == (7, 3)
    found = metrics.language(sums.numpy())
    nll, right, count = 0.0, 0, 0
    for logits, labels in batches:
        for b, t in np.ndindex(*labels.shape):
            wanted = int(labels[b, t])
            at = t - 1 if shift else t
            if wanted == -100 or at < 0:
                continue
            probabilities = torch.softmax(logits[b, at].double(), dim=-1)
            nll -= math.log(float(probabilities[wanted]))
            right += int(probabilities.argmax()) == wanted
            count += 1
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-6)
    assert found["token_accuracy"] == pytest.approx(right / count)


def test_perplexity_is_that_of_the_models_own_loss() -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    ids = torch.randint(50, (3, 12))
    labels = torch.where(torch.rand(3, 12) < 0.5, ids, -100)
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    sums = metrics.reduce_language(output.logits.bfloat16().float(), labels, shift=True)
    assert metrics.language(sums.numpy())["perplexity"] == pytest.approx(math.exp(output.loss.item()), rel=1e-2)
    sums = metrics.reduce_language((output.logits, output.past_key_values), labels, shift=True)
    assert metrics.language(sums.numpy())["perplexity"] == pytest.approx(math.exp(output.loss.item()), rel=1e-5)


def test_edges_of_perplexity() -> None:
    assert math.isnan(metrics.language(np.zeros((2, 3)))["perplexity"])
    assert metrics.language(np.array([[1e6, 10, 0]]))["perplexity"] == math.inf
    generated = torch.randint(9, (2, 4))
    assert metrics.reduce_language(generated, generated, shift=False) is generated


# -- generated text ------------------------------------------------------------------------------------


def bleu_by_hand(said: list[str], meant: list[str]) -> float:
    """Papineni et al. 2002: clipped n-gram precisions of the corpus, and the brevity penalty."""
    right, count = [0] * 4, [0] * 4
    for one, other in zip(said, meant):
        for n in range(1, 5):
            mine, its = (
                Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
                for words in (one.split(), other.split())
            )
            right[n - 1] += sum((mine & its).values())
            count[n - 1] += sum(mine.values())
    lengths = [sum(len(text.split()) for text in texts) for texts in (said, meant)]
    brevity = min(1.0, math.exp(1 - lengths[1] / lengths[0]))
    return 100 * brevity * math.exp(sum(math.log(a / b) for a, b in zip(right, count)) / 4)


def test_bleu_is_that_of_the_paper() -> None:
    meant = ["the cat sat on the mat by the door", "a small house stands in the rain today"]
    said = ["the cat sat on the mat near a door", "a small house stands in rain"]
    found = metrics.generation(said, meant)
    assert found["bleu"] == pytest.approx(bleu_by_hand(said, meant), rel=1e-6)
    assert 0 < found["chrf"] < 100
    assert found["exact_match"] == 0
    same = metrics.generation([f" {text}\n" for text in meant], meant)
    assert same == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "exact_match": 1.0}


# -- classes and numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_of_classes_by_their_formulas(classes: int) -> None:
    generator = np.random.default_rng(classes)
    labels = generator.integers(classes, size=200)
    predicted = np.where(generator.random(200) < 0.6, labels, generator.integers(classes, size=200))
    found = metrics.classification(predicted, labels, classes)
    confusion = np.zeros((classes, classes))
    for wanted, said in zip(labels, predicted):
        confusion[wanted, said] += 1
    right, wanted, said = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = 2 * right / (wanted + said)
    correlation = (200 * right.sum() - wanted @ said) / math.sqrt((200**2 - said @ said) * (200**2 - wanted @ wanted))
    assert found["accuracy"] == pytest.approx(right.sum() / 200)
    assert found["f1_macro"] == pytest.approx(f1.mean())
    assert found["matthews"] == pytest.approx(correlation)
    assert found.get("f1") == (pytest.approx(f1[1]) if classes == 2 else None)


def test_a_split_of_one_class_can_be_scored() -> None:
    found = metrics.classification(np.zeros(4, int), np.zeros(4, int), 2)
    assert found == {"accuracy": 1.0, "f1_macro": 1.0, "matthews": 0.0, "f1": 0.0}


def test_scores_of_numbers_by_their_formulas() -> None:
    generator = np.random.default_rng(0)
    labels = generator.normal(size=100)
    predicted = np.exp(labels + 0.3 * generator.normal(size=100))
    found = metrics.regression(predicted, labels)
    assert found["mse"] == pytest.approx(sum((a - b) ** 2 for a, b in zip(predicted, labels)) / 100)
    assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(predicted, labels)) / 100)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1])
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, labels)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["spearman"] > found["pearson"]


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0], [2.0])],
)
def test_correlations_with_what_does_not_vary_are_none(predicted: list[float], labels: list[float]) -> None:
    found = metrics.regression(np.array(predicted), np.array(labels))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)


def test_reductions_of_heads() -> None:
    logits = torch.randn(4, 3)
    assert torch.equal(metrics.reduce_to_class((logits, None), logits), logits.max(dim=1).indices)
    numbers = torch.randn(4, 1)
    assert torch.equal(metrics.reduce_to_number(numbers, numbers), numbers[:, 0])


# -- tags ----------------------------------------------------------------------------------------------

NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("O B-PER I-PER O", [("PER", 1, 2)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("B-PER I-LOC", [("PER", 0, 0), ("LOC", 1, 1)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),  # IOB1, and models that forget the B-
        ("B-LOC I-LOC B-LOC", [("LOC", 0, 1), ("LOC", 2, 2)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities_by_hand(tags: str, wanted: list[Any]) -> None:
    assert entities(tags.split()) == wanted


def test_entity_scores_by_hand() -> None:
    """Three entities are meant, four said, two right: one has a wrong end, one a wrong type."""
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    said = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "B-LOC"]]
    labels = np.full((2, 7), -100)
    predicted = np.full((2, 7), 3)  # what stands where no word begins must not count
    for row, (one, other) in enumerate(zip(truth, said)):
        for word, (a, b) in enumerate(zip(one, other)):
            labels[row, 1 + word], predicted[row, 1 + word] = NAMES.index(a), NAMES.index(b)
    found = metrics.tagging(predicted, labels, NAMES)
    assert found == {
        "accuracy": pytest.approx(4 / 6),
        "precision": pytest.approx(2 / 4),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)),
    }
    assert metrics.tagging(labels.clip(min=0), labels, NAMES)["f1"] == 1.0
    nothing = metrics.tagging(np.zeros_like(labels), labels, NAMES)
    assert (nothing["f1"], nothing["precision"], nothing["recall"]) == (0.0, 0.0, 0.0)


def test_a_known_score_of_a_published_example() -> None:
    """The example on seqeval's own page: of two entities that are meant, one is found; all scores are 0.5."""
    truth = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    said = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O"]
    names = ("B-MISC", "B-PER", "I-MISC", "I-PER", "O")
    labels, predicted = (np.full((2, 7), -100) for _ in range(2))
    for row, (one, other) in enumerate(zip(truth, said)):
        for word, (a, b) in enumerate(zip(one.split(), other.split())):
            labels[row, word], predicted[row, word] = names.index(a), names.index(b)
    found = metrics.tagging(predicted, labels, names)
    assert (found["precision"], found["recall"], found["f1"]) == (0.5, 0.5, 0.5)


def test_tags_that_name_no_entities_are_scored_as_classes() -> None:
    names = ("ADJ", "NOUN", "VERB")
    labels = np.array([[-100, 0, 1, 2, -100], [-100, 1, 1, -100, -100]])
    predicted = np.array([[2, 0, 1, 1, 0], [1, 1, 2, 0, 0]])
    found = metrics.tagging(predicted, labels, names)
    noun, verb = 2 * (2 / 3) * (2 / 3) / (4 / 3), 0.0
    assert found == {"accuracy": pytest.approx(3 / 5), "f1_macro": pytest.approx((1 + noun + verb) / 3)}
    assert not metrics.is_iob(names)
    assert not metrics.is_iob(("O",))
    assert not metrics.is_iob(("O", "B-X", "U-X"))


def test_the_loss_of_a_language_model_is_what_the_sums_say() -> None:
    logits, labels = batch(2, 6)
    sums = metrics.reduce_language(logits, labels, shift=False)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert sums[:, 0].sum().item() == pytest.approx(wanted.item(), rel=1e-5)
    assert sums[:, 1].tolist() == (labels != -100).sum(1).tolist()
