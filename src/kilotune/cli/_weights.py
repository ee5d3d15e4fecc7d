"""How generate and chat hold the base: checked before anything large is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from ..errors import ConfigError, gather
from ..known_names import DTYPE_NAMES
from ..train.settings.fields import one_of
from ..train.settings.sections import ModelSettings

__all__ = ["Weights"]


@final
@dataclass(frozen=True)
class Weights:
    """How the base is held: as ``model.dtype``, ``model.quantization`` and ``training.device`` of a training."""

    dtype: str
    quantization: str
    device: str

    def __post_init__(self) -> None:
        faults = one_of("auto", *DTYPE_NAMES)("--dtype", self.dtype)
        faults += one_of("none", "nf4", "int8")("--quantization", self.quantization)
        faults += one_of("auto", "cpu", "cuda")("--device", self.device)
        if faults:
            raise ConfigError(gather("the model cannot be loaded so:", faults))

    @property
    def stored(self) -> str | None:
        """The dtype's name; None: as the weights are stored."""
        return None if self.dtype == "auto" else self.dtype

    def settings(self, source: str, revision: str | None = None) -> ModelSettings:
        """The same as a training has it."""
        return ModelSettings(base=source, revision=revision, dtype=self.dtype, quantization=self.quantization)

    def options(self, source: str) -> dict[str, Any]:
        """What transformers' ``from_pretrained`` is given to quantise the weights."""
        if self.quantization == "none":
            return {}
        from ..train.running import base_model as models

        device = models.device_of(self.device, "--device")
        config = models.quantised(self.settings(source), models.need_transformers("quantising"), device)
        return {"quantization_config": config, "device_map": {"": device}}

    def placed(self, model: Any) -> Any:
        """The model on the device, its weights in the dtype that is fast there; quantised weights are there already."""
        from ..train.running import base_model as models
        from ..train.running.held_dtype import held_dtype

        if self.quantization != "none":
            return model
        device = models.device_of(self.device, "--device")
        return held_dtype(model, self.dtype, device, backward=False).apply(model).to(device)
