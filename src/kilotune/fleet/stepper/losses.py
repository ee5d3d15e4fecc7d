"""What is learned, row by row: a joint batch is the rows of many users, so a loss says what each row adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, did_you_mean

__all__ = ["LOSSES", "KeptLogits", "Loss", "RowLoss", "causal_lm", "classification", "label_losses", "loss_of"]

IGNORED = -100


@final
class RowLoss(NamedTuple):
    """totals: (rows,) the loss of each row, summed. counts: (rows,) over how many things it was summed.

    A user's loss is the sum of its rows' totals over the sum of their counts, as a mean over its own batch is.
    told: (rows, ...) what else is to be known of each row; nothing is learned from it.
    """

    totals: Tensor
    counts: Tensor
    told: Tensor | None = None


@final
class KeptLogits(NamedTuple):
    """What a model returned, at some of its tokens alone. logits: (rows, places, vocabulary). places: (places,)."""

    logits: Tensor
    places: Tensor


Loss = Callable[[Any, Mapping[str, Tensor]], RowLoss]
"""Of what the model returned and the batch, its ``labels`` included."""


def causal_lm(output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
    """The mean over the tokens that have a label (-100: none), each predicted by those before it.

    output: has ``logits`` (rows, tokens, vocabulary), or is that tensor. batch: ``labels`` (rows, tokens).
    """
    each = label_losses(output, batch["labels"])
    return RowLoss(each.sum(1), (batch["labels"][:, 1:] != IGNORED).sum(1))


def label_losses(output: Any, labels: Tensor) -> Tensor:
    """(rows, tokens - 1) of each token but the first: the cross-entropy of its label; 0 where it has none.

    output: see :func:`causal_lm`, or :class:`KeptLogits` of all tokens whose next one has a label.
    """
    logits, following = _wide(_logits(output)), labels[:, 1:]
    if not isinstance(output, KeptLogits):  # the labels move, not the logits, which are large
        return _entropies(logits, F.pad(following, (0, 1), value=IGNORED))[:, :-1]
    each = _entropies(logits, following[:, output.places])
    return each.new_zeros(following.shape).index_copy(1, output.places, each)


def _entropies(logits: Tensor, labels: Tensor) -> Tensor:
    _check(labels, logits.shape[-1])
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return each.view_as(labels)


def classification(output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
    """The mean over the rows that have a label (-100: none): ``logits`` (rows, classes) and ``labels`` (rows,)."""
    logits, labels = _logits(output), batch["labels"]
    _check(labels, logits.shape[-1])
    return RowLoss(F.cross_entropy(_wide(logits), labels, ignore_index=IGNORED, reduction="none"), labels != IGNORED)


LOSSES: Mapping[str, Loss] = {"causal-lm": causal_lm, "classification": classification}


def loss_of(loss: str | Loss) -> Loss:
    """A loss by its name, or the caller's own.

    Raises:
        ConfigError: no such name.

    """
    if callable(loss):
        return loss
    if loss not in LOSSES:
        names = ", ".join(LOSSES)
        raise ConfigError(f"loss: expected {names} or a function, got {loss!r}.{did_you_mean(str(loss), LOSSES)}")
    return LOSSES[loss]


def _check(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no classes: a GPU would stop for good, and say nothing of them."""
    if labels.numel() and (high := int(labels.max())) >= classes:
        raise ConfigError(f"labels: {high} is not in 0 ... {classes - 1}, what the model tells apart")


def _logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
