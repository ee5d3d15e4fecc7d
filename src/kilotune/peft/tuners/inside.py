"""What holds the adapters of a model."""

from __future__ import annotations

from torch import nn

from ...errors import AdapterError, type_name
from .tuners_utils import BaseTuner

__all__ = ["INJECTED", "is_injected", "tuner_in"]

WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "module")
INJECTED = "_kilotune_tuner"  # on a base into which adapters were injected


def tuner_in(model: nn.Module) -> BaseTuner:
    """What holds the adapters of a PeftModel, or of a base into which they were injected.

    Raises:
        AdapterError: there are none.

    """
    around: nn.Module | None = model
    while around is not None:  # what wraps whole models keeps them under one of these names
        for found in (around, around._modules.get("base_model"), around.__dict__.get(INJECTED)):
            if isinstance(found, BaseTuner):
                return found
        around = next((around._modules[name] for name in WRAPPERS if around._modules.get(name) is not None), None)
    raise AdapterError(
        f"{type_name(model)} has no adapters; expected a PeftModel, or a base that inject_adapter_in_model() took"
    )


def is_injected(model: nn.Module) -> bool:
    """Whether a model is a base into which adapters were injected, not what is around one."""
    return tuner_in(model).model.__dict__.get(INJECTED) is tuner_in(model)
