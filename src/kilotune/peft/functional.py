"""What PEFT keeps in ``peft.functional``: adapters in a model that no object is around."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .mapping import inject_adapter_in_model
from .tuners.inside import tuner_in
from .utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make one adapter, or several, the active ones.

    Args:
        model: a base into which adapters were injected.
        adapter_name: a name, or several.
        inference_mode: True: they are frozen.

    """
    tuner_in(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "") -> list[str] | None:
    """Remove an adapter.

    Args:
        model: a base into which adapters were injected.
        adapter_name: its name.
        prefix: as in PEFT; the adapter knows its method.

    Returns: the names of the adapters that are active now; None where none is left.

    """
    tuner = tuner_in(model)
    tuner.delete_adapter(adapter_name)
    return tuner.active_adapters or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let adapters train, or freeze them, whether they are active or not."""
    tuner_in(model).set_requires_grad(adapter_names, requires_grad)
