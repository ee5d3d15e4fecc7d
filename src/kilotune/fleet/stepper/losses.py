"""What is learned, row by row: a joint batch is the rows of many users, so a loss says what each row adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, did_you_mean

__all__ = ["LOSSES", "Loss", "RowLoss", "causal_lm", "classification", "loss_of"]


@final
class RowLoss(NamedTuple):
    """totals: (rows,) the loss of each row, summed. counts: (rows,) over how many things it was summed.

    A user's loss is the sum of its rows' totals over the sum of their counts, as a mean over its own batch is.
    told: (rows, ...) what else is to be known of each row; nothing is learned from it.
    """

    totals: Tensor
    counts: Tensor
    told: Tensor | None = None


Loss = Callable[[Any, Mapping[str, Tensor]], RowLoss]
"""Of what the model returned and the batch, its ``labels`` included."""


def causal_lm(output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
    """The mean over the tokens that have a label (-100: none), each predicted by those before it.

    output: has ``logits`` (rows, tokens, vocabulary), or is that tensor. batch: ``labels`` (rows, tokens).
    """
    logits = _logits(output)
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # the labels move, not the logits, which are large
    _check(labels, logits.shape[-1])
    each = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return RowLoss(each.view_as(labels).sum(1), (labels != -100).sum(1))


def classification(output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
    """The mean over the rows that have a label (-100: none): ``logits`` (rows, classes) and ``labels`` (rows,)."""
    logits, labels = _logits(output), batch["labels"]
    _check(labels, logits.shape[-1])
    return RowLoss(F.cross_entropy(_wide(logits), labels, ignore_index=-100, reduction="none"), labels != -100)


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
