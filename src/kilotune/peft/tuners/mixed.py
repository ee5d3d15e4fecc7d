"""Which class PEFT has in ``model.base_model`` for a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PeftConfig, check_config
from .ia3.model import IA3Model
from .lora.model import LoraModel
from .tuners_utils import BaseTuner
from .unilora.model import UniLoraModel
from .vblora.model import VBLoRAModel
from .vera.model import VeraModel

__all__ = ["TUNERS", "tuner_of"]

if TYPE_CHECKING:
    from collections.abc import Mapping

TUNERS: Mapping[str, type[BaseTuner]] = {
    "LORA": LoraModel,
    "VERA": VeraModel,
    "IA3": IA3Model,
    "UNILORA": UniLoraModel,
    "VBLORA": VBLoRAModel,
}


def tuner_of(config: PeftConfig) -> type[BaseTuner]:
    """The class for a configuration's method. Adapters of other methods may be added beside its first."""
    check_config(config)
    config.translated()
    return TUNERS[str(config.peft_type)]
