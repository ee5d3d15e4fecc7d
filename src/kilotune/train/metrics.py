"""Scores of predictions. Each task's are functions of plain arrays, and each is what scikit-learn or scipy say.

What a batch of logits is reduced to before it is gathered stands here too: a language model's logits of a whole
split would be gigabytes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingExtraError

__all__ = [
    "classification",
    "entities",
    "generation",
    "is_iob",
    "language",
    "reduce_language",
    "reduce_to_class",
    "reduce_to_number",
    "regression",
    "tagging",
]

IGNORED = -100
Array = np.ndarray[Any, Any]
Entity = tuple[str, int, int]
"""Type, first word, last word."""


def _logits(output: Any) -> Tensor:
    """The first of what the model gives: others are caches and hidden states."""
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


# -- language models -----------------------------------------------------------------------------------


def reduce_language(output: Any, labels: Tensor, shift: bool) -> Tensor:
    """(rows, 3), float64: the sum of the tokens' losses, how many they are, how many the model would have said.

    Args:
        output: logits (rows, tokens, vocabulary), or a tuple that begins with them. Token numbers that
            ``generate`` made are given back as they are.
        labels: (rows, tokens), -100 where there is no loss.
        shift: whether token i is predicted by the logits at i - 1 (a decoder alone), or by those at i.

    """
    logits = _logits(output)
    if not logits.is_floating_point():
        return logits
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = []
    for row, wanted in zip(logits, labels):  # one by one: in float32, a batch of them would need as much again
        chosen = wanted != IGNORED
        row, wanted = row[chosen].float(), wanted[chosen]
        loss = F.cross_entropy(row, wanted, reduction="sum").double()
        right = (row.argmax(-1) == wanted).sum().double()
        rows.append(torch.stack([loss, chosen.sum().double(), right]))
    return torch.stack(rows)


def language(sums: Array) -> dict[str, float]:
    """``perplexity`` (of the tokens with loss, all alike, whatever the batches) and ``token_accuracy``."""
    loss, tokens, right = np.asarray(sums, np.float64).reshape(-1, 3).sum(axis=0)
    if tokens == 0:
        return {"perplexity": math.nan, "token_accuracy": math.nan}
    mean = loss / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "token_accuracy": right / tokens}


def generation(predicted: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """``bleu`` and ``chrf`` (0 to 100, of the whole split, by sacrebleu) and ``exact_match`` (0 to 1).

    Raises:
        MissingExtraError: sacrebleu is not installed.

    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise MissingExtraError("sacrebleu", "train", "BLEU and chrF") from error
    said, meant = [text.strip() for text in predicted], [text.strip() for text in wanted]
    exact = sum(a == b for a, b in zip(said, meant)) / max(1, len(meant))
    return {
        "bleu": float(BLEU().corpus_score(said, [meant]).score),
        "chrf": float(CHRF().corpus_score(said, [meant]).score),
        "exact_match": exact,
    }


# -- classes and numbers -------------------------------------------------------------------------------


def reduce_to_class(output: Any, labels: Tensor) -> Tensor:
    """The class with the highest logit, of each row (rows,) or token (rows, tokens)."""
    return _logits(output).argmax(-1)


def reduce_to_number(output: Any, labels: Tensor) -> Tensor:
    """The one output of each row, (rows,)."""
    return _logits(output).reshape(-1)


def classification(predicted: Array, labels: Array, classes: int) -> dict[str, float]:
    """``accuracy``, ``f1_macro``, ``matthews``; with two classes also ``f1`` of the second one.

    Args:
        predicted: (rows,) class numbers.
        labels: (rows,) class numbers.
        classes: how many there are. A class that is neither in ``labels`` nor predicted does not count in f1_macro.

    """
    metrics = _sklearn()
    predicted, labels = np.asarray(predicted).reshape(-1), np.asarray(labels).reshape(-1)
    found = {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1_macro": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "matthews": _matthews(metrics, labels, predicted),
    }
    if classes == 2:
        found["f1"] = float(metrics.f1_score(labels, predicted, pos_label=1, average="binary", zero_division=0.0))
    return found


def _matthews(metrics: Any, labels: Array, predicted: Array) -> float:
    with warnings.catch_warnings():  # it warns where only one class is there; the coefficient is then 0
        warnings.simplefilter("ignore")
        return float(metrics.matthews_corrcoef(labels, predicted))


def regression(predicted: Array, labels: Array) -> dict[str, float]:
    """``mse``, ``mae``, ``pearson``, ``spearman``; the correlations are 0 where one side is constant."""
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "train", "Scoring a regression") from error
    predicted = np.asarray(predicted, np.float64).reshape(-1)
    labels = np.asarray(labels, np.float64).reshape(-1)
    apart = predicted - labels
    found = {"mse": float(np.mean(apart**2)), "mae": float(np.mean(np.abs(apart)))}
    for name, function in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        varied = len(labels) > 1 and np.ptp(predicted) > 0 and np.ptp(labels) > 0
        with warnings.catch_warnings():  # scipy warns of nearly constant input, where rounding decides
            warnings.simplefilter("ignore")
            value = float(function(predicted, labels)[0]) if varied else 0.0
        found[name] = value if math.isfinite(value) else 0.0
    return found


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train", "Scoring a classifier") from error
    return metrics


# -- tags ----------------------------------------------------------------------------------------------


def tagging(predicted: Array, labels: Array, names: Sequence[str]) -> dict[str, float]:
    """Scores of tagged words: ``accuracy``, and ``f1``, ``precision`` and ``recall`` of whole entities.

    An entity counts when its type, first and last word are right, over the whole split (micro average), as CoNLL
    scores it. Where the tags are not of the B-, I-, O form, ``f1_macro`` over the tags stands in place of the three.

    Args:
        predicted: (rows, tokens) tag numbers.
        labels: (rows, tokens) tag numbers, -100 where a token has no tag of its own.
        names: the tags' names.

    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    chosen = labels != IGNORED
    accuracy = float((predicted[chosen] == labels[chosen]).mean()) if chosen.any() else math.nan
    if not is_iob(names):
        score = _sklearn().f1_score(labels[chosen], predicted[chosen], average="macro", zero_division=0.0)
        return {"accuracy": accuracy, "f1_macro": float(score)}
    right = guessed = wanted = 0
    for row, truth, keep in zip(predicted, labels, chosen):
        said = set(entities([names[i] for i in row[keep]]))
        meant = set(entities([names[i] for i in truth[keep]]))
        right, guessed, wanted = right + len(said & meant), guessed + len(said), wanted + len(meant)
    precision = right / guessed if guessed else 0.0
    recall = right / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"accuracy": accuracy, "f1": f1, "precision": precision, "recall": recall}


def is_iob(names: Sequence[str]) -> bool:
    """Whether tags name entities: each is O, or B- or I- with a type, and there is a B- or I-."""
    marked = [name for name in names if name[:2] in ("B-", "I-")]
    return bool(marked) and all(name == "O" or name in marked for name in names)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sequence of tags.

    An I- begins an entity where none of its type goes on, as conlleval reads it, so that the older IOB1 form is
    read rightly too.
    """
    found: list[Entity] = []
    kind, first = "", 0
    for at, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.append((kind, first, at - 1))
            kind = ""
        if mark in ("B", "I") and not goes_on:
            kind, first = name, at
    return found
