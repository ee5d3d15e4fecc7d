"""What a transformers model remembers of having been quantised.

Tested with transformers 5.23.0. Its internals that are touched here: ``PreTrainedModel.hf_quantizer``,
``HfQuantizer.remove_quantization_config``, ``HfQuantizer.get_weight_conversions``, ``_weight_conversions``,
``is_loaded_in_4bit``, ``is_loaded_in_8bit`` and ``config.dtype``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ._base import is_a

__all__ = ["forget_quantisation", "is_pretrained", "unknown_scheme"]

KNOWN = frozenset({"bitsandbytes", "torchao"})  # those whose layers a storage makes dense


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a transformers model; imports nothing."""
    return is_a(module, "PreTrainedModel", "transformers")


def unknown_scheme(module: nn.Module) -> str | None:
    """How a transformers model is quantised, where no storage here reads such layers; else None."""
    quantiser: Any = module.__dict__.get("hf_quantizer") if is_pretrained(module) else None
    config = getattr(quantiser, "quantization_config", None)
    method = None if getattr(config, "dequantize", False) else getattr(config, "quant_method", None)
    name = getattr(method, "value", method)
    return None if name is None or name in KNOWN else str(name)


def forget_quantisation(root: nn.Module, dtype: torch.dtype) -> None:
    """Make the transformers models in ``root``, whose layers are dense now, save, move and load as dense ones."""
    for module in root.modules():
        if not is_pretrained(module):
            continue
        model: Any = module
        model.config.dtype = dtype
        if (quantiser := model.__dict__.get("hf_quantizer")) is None:
            continue
        _forget_conversions(model, quantiser)
        quantiser.remove_quantization_config(model)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if model.__dict__.get(flag):
                setattr(model, flag, False)


def _forget_conversions(model: Any, quantiser: Any) -> None:
    """A model from a quantised folder remembers how its files were read, and would undo that when it is saved."""
    own = {type(step) for conversion in quantiser.get_weight_conversions() for step in conversion.operations}
    held = getattr(model, "_weight_conversions", None) or []
    left = [c for c in held if not own & {type(step) for step in getattr(c, "operations", None) or ()}]
    if len(left) < len(held):
        model._weight_conversions = left or None
