"""How transformers' own ``model.load_adapter()`` finds a file's tensors in a model. Tested with transformers 5.23."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...adapter_files.peft_layout import PREFIX
from ...errors import UnsupportedError

__all__ = ["build_peft_weight_mapping"]

HEADS = ("lora_", "vera_lambda_", "ia3_", "unilora_", "vblora_")


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """Renamings of a file's keys to a model's names, in transformers' form, before those of the model itself.

    Args:
        weight_conversions: the model's own.
        adapter_name: what the adapter is called in the model.
        peft_config: as in PEFT.

    Raises:
        UnsupportedError: the model makes one parameter of several of a checkpoint, such as fused experts.

    """
    from transformers.core_model_loading import WeightRenaming

    own = list(weight_conversions or ())
    if any(not isinstance(one, WeightRenaming) for one in own):
        raise UnsupportedError(
            "model.load_adapter(): transformers puts parameters of this checkpoint together; load the adapter with "
            "kilotune.peft.PeftModel.from_pretrained(model, folder)"
        )
    named = [WeightRenaming(rf"({re.escape(head)}[^\.]*)", rf"\1.{adapter_name}") for head in HEADS]
    return [WeightRenaming(f"{PREFIX}model.", "model."), WeightRenaming(PREFIX, ""), *named, *own]
