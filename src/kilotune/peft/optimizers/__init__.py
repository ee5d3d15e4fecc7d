"""As ``peft.optimizers``: LoRA+'s groups (arXiv 2402.12354), and LoRA-FA (lorafa.py).

What LoRA+ does is in ``model/optimizer_groups.py``; here it has PEFT's names.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ...model.optimizer_groups import optimizer_groups
from ..tuners.inside import tuner_in
from .lorafa import LoraFAOptimizer, create_lorafa_optimizer

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"]

# In the order in which PEFT has them, there in any case; what else there is comes behind.
GROUPS = ("adapter", "adapter_embedding", "adapter_b", "adapter_b_no_decay")


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

    Returns: with the groups that PEFT makes, first A, then embeddings, B, and what of it has no weight decay; some may
        be empty. Others follow: a head, and biases, which have no weight decay.

    """
    decay, embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", None)
    tuner = tuner_in(model)
    embeddings = any(
        slot.site.fan_in == 1 < slot.site.inn and any(p.requires_grad for p in slot.parameters())
        for name in tuner.peft_config
        for slot in tuner.installed(name).slots().values()
    )
    rate = 1e-6 if embedding is None and embeddings else embedding
    found = optimizer_groups(tuner, lr, lora_plus_ratio=loraplus_lr_ratio, embedding_lr=rate, weight_decay=decay)
    by_name = {group["name"]: group for group in found}
    rates = (lr, 1e-6 if rate is None else rate, lr * loraplus_lr_ratio, lr * loraplus_lr_ratio)
    empty: dict[str, dict[str, Any]] = {
        name: {"name": name, "params": [], "lr": own, "weight_decay": 0.0 if name.endswith("no_decay") else decay}
        for name, own in zip(GROUPS, rates, strict=True)
    }
    return optimizer_cls(list({**empty, **by_name}.values()), **kwargs)
