"""Names that PEFT keeps in ``peft.utils.constants``."""

from __future__ import annotations

from ...adapter_files.names import CONFIG_NAME
from ...adapter_files.names import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from ...config import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from ..targets import MANY as MIN_TARGET_MODULES_FOR_OPTIMIZATION

__all__ = [
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
]

WEIGHTS_NAME = "adapter_model.bin"  # a pickle, which is neither read nor written here
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
