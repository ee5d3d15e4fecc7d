"""get_peft_model, where PEFT keeps it."""

from __future__ import annotations

from torch import nn

from ..adapter_files.writing import DEFAULT
from .config import PeftConfig, check_config
from .mixed_model import PeftMixedModel
from .peft_model import PeftModel, model_class

__all__ = ["get_peft_model"]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = DEFAULT,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:
    """Put an adapter into a model (in place, its weights frozen) and return the model to train.

    Args:
        model: any module.
        peft_config: what to adapt and how.
        adapter_name: the adapter's name.
        mixed: give a PeftMixedModel; adapters of several methods fit into any model here.
        autocast_adapter_dtype: False: the adapter's numbers are kept in the base's dtype.
        revision: of the base, for the adapter's file.
        low_cpu_mem_usage: without numbers, on the meta device, until the adapter is loaded.

    """
    check_config(peft_config)
    if revision is not None:
        peft_config.revision = revision
    made = PeftMixedModel if mixed else model_class(peft_config, PeftModel)
    return made(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
