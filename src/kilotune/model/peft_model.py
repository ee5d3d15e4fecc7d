"""The models users hold: get_peft_model, PeftModel, VeraModel, LoraModel."""

from __future__ import annotations

import os
from typing import ClassVar, final

from torch import nn

from ..adapter_files.reading import AdapterFile
from ..config import AdapterConfig
from ..methods import LoraConfig, VeraConfig
from .adapter_model import DEFAULT, AdapterModel

__all__ = ["LoraModel", "PeftModel", "VeraModel", "get_peft_model"]


@final
class VeraModel(AdapterModel):
    """A model with VeRA adapters (arXiv 2310.11454): ``VeraModel(model, config, adapter_name)``."""

    configs: ClassVar[tuple[type[AdapterConfig], ...]] = (VeraConfig,)


@final
class LoraModel(AdapterModel):
    """A model with LoRA adapters (arXiv 2106.09685): ``LoraModel(model, config, adapter_name)``."""

    configs: ClassVar[tuple[type[AdapterConfig], ...]] = (LoraConfig,)


@final
class PeftModel(AdapterModel):
    """A model with adapters of any method, mixed as one likes."""

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str] | AdapterFile,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        strict_base: bool = False,
    ) -> PeftModel:
        """Put a saved adapter (see :meth:`load_adapter`) into a base model; it is active.

        Raises:
            CheckpointError: the files are damaged or unsafe, or do not fit, or the base has other weights
                (``strict_base``); the model is then untouched.

        """
        wrapped = cls.__new__(cls)
        nn.Module.__init__(wrapped)
        wrapped._take(model)
        wrapped.load_adapter(
            model_id,
            adapter_name,
            is_trainable,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            strict_base=strict_base,
        )
        wrapped._activate((adapter_name,), train=is_trainable)
        return wrapped


def get_peft_model(model: nn.Module, peft_config: AdapterConfig, adapter_name: str = DEFAULT) -> PeftModel:
    """Put an adapter into ``model`` (in place, its weights frozen) and return the model to train.

    Args:
        model: any ``nn.Module``.
        peft_config: for example ``VeraConfig(r=256, target_modules="all-linear")``.
        adapter_name: the adapter's name.

    """
    return PeftModel(model, peft_config, adapter_name)
