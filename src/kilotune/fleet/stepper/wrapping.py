"""A model for banks alone: wrapped, frozen, and without an adapter of its own."""

from __future__ import annotations

from torch import nn

from ...model.peft_model import PeftModel

__all__ = ["wrap"]


def wrap(model: nn.Module) -> PeftModel:
    """``model`` with no adapter in it, its weights frozen: what banks and routes are made for.

    Args:
        model: any ``nn.Module``; changed in place.

    """
    wrapped = PeftModel.__new__(PeftModel)
    nn.Module.__init__(wrapped)
    wrapped._take(model.requires_grad_(False))
    return wrapped
