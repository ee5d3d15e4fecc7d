"""As ``peft.optimizers``: LoRA+'s groups (arXiv 2402.12354).

What it does is in ``model/optimizer_groups.py``; here it has PEFT's names.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ...model.optimizer_groups import optimizer_groups
from ..utils.save_and_load import tuner_in

__all__ = ["create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: Any, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer that trains B faster than A.

    Args:
        model: a PeftModel.
        optimizer_cls: such as ``torch.optim.AdamW``.
        lr: the rate of A and of all else.
        loraplus_lr_ratio: B's rate over A's.
        kwargs: loraplus_weight_decay, loraplus_lr_embedding (1e-6), and the optimizer's own.

    """
    decay, embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups = optimizer_groups(
        tuner_in(model), lr, lora_plus_ratio=loraplus_lr_ratio, embedding_lr=embedding, weight_decay=decay
    )
    return optimizer_cls(groups, **kwargs)
