"""The loss on answers, with the model's head on their tokens alone.

A small model's head is larger than its last blocks: SmolLM2's has 28 million numbers, four of its blocks have 14
million. A prompt's tokens are not learned, so nothing of what the head would make of them is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...fleet.stepper.losses import RowLoss
from .bases import IGNORED, Base

__all__ = ["AnswersOnly"]


@final
class AnswersOnly:
    """Inside this context the head of ``base`` runs on the tokens that predict a label in the batch collated last.

    Outside of it, all tokens go through the head, as ever.
    """

    def __init__(self, base: Base) -> None:
        self.end = base.speech.end
        getter: Any = base.model.get_output_embeddings
        self._head: nn.Module = getter()
        self._mask: Tensor | None = None
        self._handle: Any = None

    def __enter__(self) -> AnswersOnly:
        self._handle = self._head.register_forward_pre_hook(self._select)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        self._mask = None

    def _select(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._mask is None or args[0].shape[:2] != self._mask.shape:
            return None
        return (args[0][self._mask], *args[1:])

    def collate(self, rows: list[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Rows as a batch, filled up on the right: input_ids, attention_mask and labels, each (rows, tokens)."""
        longest = max(len(row["input_ids"]) for row in rows)

        def filled(key: str, value: int) -> Tensor:
            return torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in rows])

        labels = filled("labels", IGNORED)
        self._mask = _predicting(labels) != IGNORED
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
        return {"input_ids": filled("input_ids", self.end), "labels": labels, "attention_mask": mask}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
        """Of each row its answer's nats, and how many tokens that are.

        output: its ``logits`` are (tokens that predict a label, vocabulary). batch: as :meth:`collate` made it.
        """
        labels = _predicting(batch["labels"])
        mask = labels != IGNORED
        each = F.cross_entropy(output.logits, labels[mask], reduction="none")
        counts = mask.sum(1)
        owner = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
        return RowLoss(each.new_zeros(len(labels)).index_add(0, owner, each), counts)


def _predicting(labels: Tensor) -> Tensor:
    """The label that each token predicts: that of the next one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
